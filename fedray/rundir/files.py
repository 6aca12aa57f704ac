"""How bytes reach the disk, and whether they are still the same; nothing of what they mean."""

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


def sealed(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, allow_nan=False)
    return (body + "\n" + hashlib.sha256(body.encode()).hexdigest() + "\n").encode()


def unsealed(data: bytes) -> dict[str, Any]:
    body, seal, *rest = data.split(b"\n")
    if rest != [b""] or hashlib.sha256(body).hexdigest().encode() != seal:
        raise ValueError("its checksum does not fit")
    return json.loads(body)  # type: ignore[no-any-return]  # sealed by us


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
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


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    building = path.with_name(f".{path.name}")
    write(building, data, mode)
    building.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
