"""The files of a run: created by one rename, appended to durably, replaced atomically, and checked when read back.

Config, metrics, ledger or keys that do not agree with the newest good checkpoint are damaged: errors name the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from fedray.config.files import check_format
from fedray.errors import DamagedRunError, RunFailedError
from fedray.privacy.durable import (
    append_durably,
    open_regular,
    parse_json,
    read_regular,
    truncate_durably,
    write_durably,
)
from fedray.privacy.ledger import Ledger, drop_torn_line
from fedray.privacy.ledger import read as read_ledger
from fedray.privacy.streams import commitment
from fedray.rundir.checkpoint import (
    DESCRIPTION,
    ROUND_KEY,
    Checkpoint,
    arrays_digest,
    checkpoints_in,
    contents_of,
    key_of,
    read_checkpoint,
    write_checkpoint,
)
from fedray.rundir.files import as_json, bytes_of, removed_if_killed, replace, sealed, sync_directory, unsealed
from fedray.rundir.identity import grouped
from fedray.rundir.lock import locked

_UNFINISHED = f".fedray-{socket.gethostname()}-"  # a process number follows; other machines may share the disk
_KEPT_CHECKPOINTS = 2  # the newest, and the one before it should the newest be damaged

_SETUP_KEY, _LEDGER_HEAD, _IDENTITY = "setup.key", "ledger.json", "identity.json"


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """The state that a run goes on from, as read from its directory and checked.

    Args:
        checkpoint: The newest good checkpoint.
        setup_key: Key of everything drawn once (partition, initial model).
        ledger: All that was charged.
        history: The metrics records up to the checkpoint's round.
        finished: Whether the run is complete.
    """

    checkpoint: Checkpoint
    setup_key: bytes = field(repr=False)
    ledger: Ledger
    history: list[dict[str, Any]]
    finished: bool


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics_hash = hashlib.sha256()
        self._metrics_size = 0
        self._setup_commitment: str | None = None
        self._private: set[bytes] | None = None

    @classmethod
    def create(cls, path: Path, setup_key: bytes, state: Checkpoint, identity: Mapping[str, Any]) -> RunDirectory:
        """Create the directory with its config, empty ledger and metrics, and a round-0 checkpoint, by one rename.

        Args:
            path: Where the directory will be.
            setup_key: Kept for resuming (mode 0600).
            state: The checkpoint before the first round.
            identity: Digests of model and test data, MACs of shards, see `differences`.

        Raises:
            RunFailedError: The disk refuses.
        """
        path = path.absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_half_made(path.parent)
            building = cls(path.parent / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")
            with removed_if_killed(building.path):
                building.path.mkdir()
                building.write_json("config.json", state.card)
                for name in ("ledger.jsonl", "metrics.jsonl"):
                    write_durably(building.path / name, b"")
                (building.path / "checkpoint").mkdir()
                write_durably(building.path / "checkpoint" / _SETUP_KEY, setup_key.hex().encode(), mode=0o600)
                write_durably(building.path / "checkpoint" / _IDENTITY, sealed(grouped(identity)))
                write_durably(building.path / "checkpoint" / _LEDGER_HEAD, sealed(_length_and_head(Ledger(None))))
                building._setup_commitment = commitment(setup_key)
                building.save(state, Ledger(None))
                for made in (building.path / "checkpoint", building.path):
                    sync_directory(made)  # or a loss of power could leave the directory's name without its files
                if path.exists():
                    path.rmdir()  # an empty directory that the user made
                building.path.rename(path)
                sync_directory(path.parent)
        except OSError as error:
            raise RunFailedError(f"--out {path} cannot be written ({error}); choose another place.") from error
        created = cls(path)
        created._setup_commitment = commitment(setup_key)
        return created

    @property
    def ledger(self) -> Path:
        """Path of the ledger."""
        return self.path / "ledger.jsonl"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the directory for this process, see `fedray.rundir.lock`."""
        # The setup key's file: it is never replaced.
        return locked(self.path, self.path / "checkpoint" / _SETUP_KEY)

    def note_ledger(self, ledger: Ledger) -> None:
        """Note the ledger's length and head in a file of their own, so that a line lost at its end is found.

        In place and by one write, which a kill does not tear: a note is never shorter than the one before. It is not
        synced, as each checkpoint holds a note that is.
        """
        with open_regular(self.path / "checkpoint" / _LEDGER_HEAD, os.O_RDWR) as file:
            file.write(sealed(_length_and_head(ledger)))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's line to metrics.jsonl, durably: the checkpoint that follows counts on it."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        append_durably(self._metrics, line)
        self._metrics_hash.update(line)
        self._metrics_size += len(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all rounds' records."""
        return [parse_json(line) for line in read_regular(self._metrics).splitlines()]

    def append_private(self, record: Mapping[str, Any]) -> None:
        """Append a line that only the orchestrator may know to private.jsonl (mode 0600), unless it is there."""
        line = (json.dumps(record) + "\n").encode()
        with open_regular(self.path / "private.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            if self._private is None:  # read once: a run that goes on repeats its last rounds, and may find a torn line
                file.seek(0)
                complete, newline, torn = file.read().rpartition(b"\n")
                self._private = set((complete + newline).splitlines(keepends=True))
                if torn:
                    file.truncate(len(complete + newline))
            if line not in self._private:
                file.write(line)
                self._private.add(line)

    def save(self, state: Checkpoint, ledger: Ledger) -> None:
        """Write a checkpoint beside the last one, then drop those before that.

        Args:
            state: The checkpoint after a round.
            ledger: As it is now; it may have grown since the round.
        """
        description = {
            "round": state.round,
            "generation": state.generation,
            **_length_and_head(ledger),
            "arrays_sha256": arrays_digest(state.arrays),
            "metrics_size": self._metrics_size,
            "metrics_sha256": self._metrics_hash.hexdigest(),
            "setup_key_commitment": self._setup_commitment,
            "round_key_commitment": None if state.round_key is None else commitment(state.round_key),
            "config": dict(state.card),
        }
        texts = {DESCRIPTION: sealed(description).decode()}
        if state.round_key is not None:
            texts[ROUND_KEY] = state.round_key.hex()
        write_checkpoint(self.path / "checkpoint" / state.name, state.arrays, texts)
        self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        for old in checkpoints_in(self.path / "checkpoint")[:-_KEPT_CHECKPOINTS]:
            old.unlink()

    def restore(self, mend: bool = True) -> SavedState:
        """Read the newest good checkpoint.

        Args:
            mend: Whether to make ledger, metrics and config agree with it.

        Raises:
            DamagedRunError: A file is missing or damaged beyond what the last two checkpoints can make good.
            InputError: A newer fedray wrote it.
        """
        root = self.path / "checkpoint"
        with contextlib.suppress(OSError, ValueError):  # a damaged one is mended from the checkpoint
            check_format(parse_json(read_regular(self.path / "config.json")), str(self.path))
        ledger = self._read_ledger()
        ended = (self.path / "privacy.json").exists()  # written before the keys go
        problems: list[str] = []
        for file in reversed(checkpoints_in(root)):
            try:
                checkpoint, description = read_checkpoint(file, key_may_be_gone=ended)
                check_format(checkpoint.card, str(self.path))
                setup_key = _read_key(root / _SETUP_KEY, description["setup_key_commitment"])
                history = self._read_metrics(description)
            except DamagedRunError as error:
                problems.append(str(error))
                continue
            finished = ended and checkpoint.round_key is None
            if finished and (problems or self._metrics.stat().st_size != description["metrics_size"]):
                problems.append(f"{root} lacks the checkpoint of the last round; restore it.")
                break  # without its key nothing can go on from an earlier round
            if not ledger.holds(description["length"], description["head"]):
                raise DamagedRunError(
                    f"{self.ledger} has {len(ledger)} lines that do not continue the {description['length']} that "
                    f"{file.name} counted; lines were changed or lost: restore the file."
                )
            self._setup_commitment = description["setup_key_commitment"]
            if mend:
                self._mend(checkpoint, description["metrics_size"])
            return SavedState(
                checkpoint=checkpoint,
                setup_key=setup_key,
                ledger=ledger,
                history=history,
                finished=finished,
            )
        raise DamagedRunError(problems[0] if problems else f"{root} holds no checkpoint; restore it.")

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Return the names of what is not the same as when the run began.

        Raises:
            DamagedRunError: The record of what it was is damaged.
        """
        path = self.path / "checkpoint" / _IDENTITY
        try:
            before = unsealed(read_regular(path))
        except (OSError, ValueError) as error:
            raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
        old, new = grouped(before), grouped(identity)
        return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        replace(self.path / name, as_json(value))

    def write_model(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write model.safetensors under the model's own state_dict names; equal states give equal bytes."""
        # Clones: safetensors refuses tensors that share memory (tied weights).
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state_dict.items()}
        replace(self.path / "model.safetensors", save_tensors(tensors))

    def forget_keys(self) -> None:
        """Delete all checkpoints but the newest, and its round key: what was drawn can no longer be drawn again."""
        root = self.path / "checkpoint"
        newest = checkpoints_in(root)[-1]
        for other in root.glob("*.safetensors"):  # hidden ones too, which a crash left unfinished
            if other != newest:
                other.unlink()
        texts, arrays = contents_of(newest)
        if texts.keys() != {DESCRIPTION}:
            write_checkpoint(newest, arrays, {DESCRIPTION: texts[DESCRIPTION]})

    def remove_final_files(self) -> None:
        """Remove the files that only a finished run has, because more rounds follow."""
        for name in ("manifest.json", "privacy.json", "model.safetensors"):
            (self.path / name).unlink(missing_ok=True)

    def _read_ledger(self) -> Ledger:
        ledger, path = read_ledger(self.ledger), self.path / "checkpoint" / _LEDGER_HEAD
        try:
            noted = unsealed(read_regular(path))
        except (OSError, ValueError) as error:
            raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
        if not ledger.holds(noted["length"], noted["head"]):
            raise DamagedRunError(
                f"{self.ledger} has {len(ledger)} lines that do not continue the {noted['length']} that were written; "
                "lines were changed or lost: restore the file."
            )
        return ledger

    def _read_metrics(self, description: Mapping[str, Any]) -> list[dict[str, Any]]:
        size = int(description["metrics_size"])
        try:
            raw = read_regular(self._metrics)[:size]
        except OSError as error:
            raise DamagedRunError(f"{self._metrics} cannot be read ({error}); restore the file.") from error
        if len(raw) != size or hashlib.sha256(raw).hexdigest() != description["metrics_sha256"]:
            raise DamagedRunError(
                f"{self._metrics} is not what the checkpoint counted; lines were changed or lost: restore it."
            )
        self._metrics_hash, self._metrics_size = hashlib.sha256(raw), size
        return [parse_json(line) for line in raw.splitlines()]

    def _mend(self, checkpoint: Checkpoint, metrics_size: int) -> None:
        drop_torn_line(self.ledger)
        self._trim_metrics(metrics_size)
        if bytes_of(self.path / "config.json") != as_json(checkpoint.card):
            self.write_json("config.json", checkpoint.card)

    def _trim_metrics(self, size: int) -> None:
        if self._metrics.stat().st_size > size:
            truncate_durably(self._metrics, size)


def _read_key(path: Path, expected: str | None) -> bytes:
    try:
        text = read_regular(path).decode("ascii")
    except (OSError, ValueError) as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    return key_of(text, expected, path)


def _length_and_head(ledger: Ledger) -> dict[str, Any]:
    return {"length": len(ledger), "head": ledger.head}


def _remove_half_made(parent: Path) -> None:
    """Remove half-made run directories that killed processes left, when their watchers were killed too."""
    for left in parent.glob(f"{_UNFINISHED}*-*"):
        pid = left.name.removeprefix(_UNFINISHED).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
