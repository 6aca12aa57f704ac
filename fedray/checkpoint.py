"""A run directory: created by one rename, appended to durably, its checkpoint replaced atomically.

Knows how bytes reach the disk, not what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from fedray.errors import RunFailedError

_KEPT_CHECKPOINTS = 2  # the newest, and the one before it should the newest be damaged


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round; with the ledger it determines all that follows.

    Args:
        round: The last finished round (0: none yet).
        params: `[P]`.
        setup_key: Key of everything drawn once.
        round_key: k_round; earlier round keys cannot be found from it.
        ledger_length: Lines of the ledger when this state was reached.
        ledger_head: Their chained hash.
    """

    round: int
    params: npt.NDArray[np.float32]
    setup_key: bytes
    round_key: bytes
    ledger_length: int
    ledger_head: str


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], state: Checkpoint) -> RunDirectory:
        """Create the directory with its config, empty ledger and metrics, and a round-0 checkpoint, by one rename.

        Raises:
            RunFailedError: The disk refuses.
        """
        path = path.absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            building = cls(Path(tempfile.mkdtemp(prefix=".fedray-", dir=path.parent)))
            try:
                building.path.chmod(0o755)
                building.write_json("config.json", config)
                for name in ("ledger.jsonl", "metrics.jsonl"):
                    _write(building.path / name, b"")
                (building.path / "checkpoint").mkdir()
                building.save(state)
                if path.exists():
                    path.rmdir()  # an empty directory that the user made
                building.path.rename(path)
                _sync_directory(path.parent)
            except BaseException:
                shutil.rmtree(building.path, ignore_errors=True)
                raise
        except OSError as error:
            raise RunFailedError(f"--out {path} cannot be written ({error}); choose another place.") from error
        return cls(path)

    @property
    def ledger(self) -> Path:
        """Path of the ledger."""
        return self.path / "ledger.jsonl"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def save(self, state: Checkpoint) -> None:
        """Write a checkpoint beside the last one, then drop those before that."""
        root = self.path / "checkpoint"
        building = root / f".{state.round:08d}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(mode=0o700)
        arrays = save_arrays({"params": state.params})
        _write(building / "state.safetensors", arrays)
        description = {
            "round": state.round,
            "ledger_length": state.ledger_length,
            "ledger_head": state.ledger_head,
            "state_sha256": hashlib.sha256(arrays).hexdigest(),
        }
        _write(building / "state.json", json.dumps(description).encode())
        _write(building / "key", (state.setup_key + state.round_key).hex().encode(), mode=0o600)
        final = root / f"{state.round:08d}"
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        _sync_directory(root)
        for old in sorted(entry for entry in root.iterdir() if entry.name.isdigit())[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        _replace(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def write_model(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write model.safetensors under the model's own state_dict names; equal states give equal bytes."""
        # Clones: safetensors refuses tensors that share memory (tied weights).
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state_dict.items()}
        _replace(self.path / "model.safetensors", save_tensors(tensors))

    def forget_keys(self) -> None:
        """Unlink the round keys: what was drawn can no longer be drawn again."""
        for key in (self.path / "checkpoint").glob("*/key"):
            key.unlink()


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, data: bytes) -> None:
    building = path.with_name(f".{path.name}")
    _write(building, data)
    building.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
