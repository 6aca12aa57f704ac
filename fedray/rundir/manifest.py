"""The manifest of a finished run: the SHA-256 of each of its files, and the run digest, the manifest's own SHA-256.

Finds damage. Against somebody who recomputes everything only the run digest helps, kept away from the run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fedray.privacy.durable import digest_of, read_regular

FILES = ("config.json", "ledger.jsonl", "metrics.jsonl", "model.safetensors", "privacy.json")
NAME = "manifest.json"


def manifest_of(path: Path) -> dict[str, dict[str, str]]:
    """Return what manifest.json holds: the SHA-256 of each file of a finished run.

    Raises:
        OSError: A file cannot be read.
    """
    return {"sha256": {name: digest_of(path / name) for name in FILES}}


def as_bytes(manifest: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return the only bytes that this manifest may have."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def holds(path: Path) -> bool:
    """Tell whether all files of a finished run are there and as its manifest lists them."""
    try:
        return read_regular(path / NAME) == as_bytes(manifest_of(path))
    except OSError:
        return False


def run_digest(path: Path) -> str:
    """Return the SHA-256 of a run directory's manifest, which stands for all of its files.

    Raises:
        OSError: There is no readable manifest.
    """
    return hashlib.sha256(read_regular(path / NAME)).hexdigest()
