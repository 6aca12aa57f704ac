"""Writes files durably and finds changed bytes; knows nothing of what they mean."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedray.privacy.durable import parse_json, read_regular, write_durably


def sealed(value: Mapping[str, Any]) -> bytes:
    """Return a mapping as one line of JSON and a line with its SHA-256."""
    body = json.dumps(value, allow_nan=False)
    return (body + "\n" + hashlib.sha256(body.encode()).hexdigest() + "\n").encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the mapping that `sealed` wrote; raise ValueError when its checksum does not fit."""
    body, seal, *rest = data.split(b"\n")
    if rest != [b""] or hashlib.sha256(body).hexdigest().encode() != seal:
        raise ValueError("its checksum does not fit")
    return parse_json(body)  # type: ignore[no-any-return]  # sealed by us


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return a mapping as indented JSON."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def bytes_of(path: Path) -> bytes | None:
    """Return a file's content; None when it cannot be read."""
    try:
        return read_regular(path)
    except OSError:
        return None


@contextlib.contextmanager
def removed_if_killed(folder: Path) -> Iterator[None]:
    """Remove a folder that is still there at the end of the block, even when kill -9 is what ends it.

    A small process waits for the end of a pipe whose other end only this process holds.
    """
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; rm -rf -- "$0"', str(folder)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and the end of the terminal are not for it
    )
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        watcher.communicate(b"\n")  # a line, as a child of another thread may hold the pipe open


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically and durably: after a crash it has the old content or the new one."""
    building = path.with_name(f".{path.name}")
    write_durably(building, data, mode)
    building.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory's list of files to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
