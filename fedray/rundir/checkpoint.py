"""A run directory: created by one rename, appended to durably, its checkpoints replaced atomically, read back with care.

Knows how bytes reach the disk and whether they are still the same, not what they mean. A checkpoint is one safetensors file
that appears by one rename and describes all it depends on: config, metrics so far, ledger so far, keys. What does not
agree with the newest good checkpoint is damaged, and is named.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from fedray.errors import DamagedRunError, InputError, RunFailedError
from fedray.privacy.ledger import Ledger, drop_torn_line
from fedray.privacy.ledger import read as read_ledger
from fedray.privacy.streams import commitment

_UNFINISHED = f".fedray-{socket.gethostname()}-"  # a process number follows; other machines may share the disk
_KEPT_CHECKPOINTS = 2  # the newest, and the one before it should the newest be damaged
_PARAMS, _DESCRIPTION, _ROUND_KEY = "params", "description", "round_key"  # in a checkpoint
_SETUP_KEY, _LEDGER_HEAD, _IDENTITY = "setup.key", "ledger.json", "identity.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round; with the ledger it determines all that follows.

    Args:
        round: The last finished round (0: none yet).
        generation: How often the run was extended.
        params: `[P]`.
        round_key: k_round, from which later round keys follow; None when it was not kept.
        card: Content of config.json.
    """

    round: int
    generation: int = 0
    params: npt.NDArray[np.float32]
    round_key: bytes | None
    card: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its file; later states sort after earlier ones."""
        return f"{self.round:08d}-{self.generation:04d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a run directory holds, checked.

    Args:
        checkpoint: The newest good one.
        setup_key: Key of everything drawn once.
        ledger: All that was charged.
        history: The metrics records up to the checkpoint's round.
        finished: Whether the run is complete.
    """

    checkpoint: Checkpoint
    setup_key: bytes
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
            path: Of the directory.
            setup_key: Kept for resuming (mode 0600).
            state: Before the first round.
            identity: Digests of model and test data, MACs of shards, see `differences`.

        Raises:
            RunFailedError: The disk refuses.
        """
        path = path.absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            building = cls(path.parent / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")
            with _removed_if_killed(building.path):
                building.path.mkdir()
                building.write_json("config.json", state.card)
                for name in ("ledger.jsonl", "metrics.jsonl"):
                    _write(building.path / name, b"")
                (building.path / "checkpoint").mkdir()
                _write(building.path / "checkpoint" / _SETUP_KEY, setup_key.hex().encode(), mode=0o600)
                _write(building.path / "checkpoint" / _IDENTITY, _sealed(identity))
                _write(building.path / "checkpoint" / _LEDGER_HEAD, _sealed(_note(Ledger(None))))
                building._setup_commitment = commitment(setup_key)
                building.save(state, Ledger(None))
                if path.exists():
                    path.rmdir()  # an empty directory that the user made
                building.path.rename(path)
                _sync_directory(path.parent)
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

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the operating system lets go when the process ends, however it ends.

        Raises:
            InputError: Another process holds it.
        """
        # The setup key's file: it is never replaced. (Network file systems lock files that are open for writing only.)
        path = self.path / "checkpoint" / _SETUP_KEY
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise InputError(f"{self.path} is no run directory (it has no {path.name}); check the path.") from error
            except BlockingIOError as error:
                raise InputError(
                    f"{self.path} is in use by another process; wait for it to end, or stop it."
                ) from error
            except OSError as error:
                raise InputError(f"{path} cannot be locked ({error}); it must be a file that you may write.") from error
            yield

    def note_ledger(self, ledger: Ledger) -> None:
        """Remember the ledger's length and head outside of it, so that a line lost at its end is found.

        In place and by one write, which a kill does not tear: a note is never shorter than the one before. It is not
        synced, as each checkpoint holds a note that is.
        """
        with (self.path / "checkpoint" / _LEDGER_HEAD).open("r+b") as file:
            file.write(_sealed(_note(ledger)))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's line to metrics.jsonl, durably: the checkpoint that follows counts on it."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with self._metrics.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._metrics_hash.update(line)
        self._metrics_size += len(line)

    def append_private(self, record: Mapping[str, Any]) -> None:
        """Append a line to private.jsonl (mode 0600), unless it is there: what only the orchestrator may know."""
        line = (json.dumps(record) + "\n").encode()
        descriptor = os.open(self.path / "private.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a+b") as file:
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
            state: After a round.
            ledger: As it is now; it may have grown since.
        """
        description = {
            "round": state.round,
            "generation": state.generation,
            **_note(ledger),
            "params_sha256": hashlib.sha256(state.params.data).hexdigest(),
            "metrics_size": self._metrics_size,
            "metrics_sha256": self._metrics_hash.hexdigest(),
            "setup_key_commitment": self._setup_commitment,
            "round_key_commitment": None if state.round_key is None else commitment(state.round_key),
            "config": dict(state.card),
        }
        texts = {_DESCRIPTION: _sealed(description).decode()}
        if state.round_key is not None:
            texts[_ROUND_KEY] = state.round_key.hex()
        _write_checkpoint(self.path / "checkpoint" / state.name, state.params, texts)
        self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        for old in _checkpoints(self.path / "checkpoint")[:-_KEPT_CHECKPOINTS]:
            old.unlink()

    def restore(self, mend: bool = True) -> Restored:
        """Read the newest good checkpoint.

        Args:
            mend: Bring ledger, metrics and config to agree with it.

        Raises:
            DamagedRunError: A file is missing or damaged beyond what the last two checkpoints can make good.
        """
        root = self.path / "checkpoint"
        ledger = self._read_ledger()
        ended = (self.path / "privacy.json").exists()  # written before the keys go
        problems: list[str] = []
        for file in reversed(_checkpoints(root)):
            try:
                checkpoint, description = _read_checkpoint(file, key_may_be_gone=ended)
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
            return Restored(
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
            before = _unsealed(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
        return sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        _replace(self.path / name, _as_json(value))

    def write_model(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write model.safetensors under the model's own state_dict names; equal states give equal bytes."""
        # Clones: safetensors refuses tensors that share memory (tied weights).
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state_dict.items()}
        _replace(self.path / "model.safetensors", save_tensors(tensors))

    def forget_keys(self) -> None:
        """Leave one checkpoint, without its round key: what was drawn can no longer be drawn again."""
        root = self.path / "checkpoint"
        newest = _checkpoints(root)[-1]
        for other in root.glob("*.safetensors"):  # hidden ones too, which a crash left unfinished
            if other != newest:
                other.unlink()
        texts, params = _contents(newest)
        if texts.keys() != {_DESCRIPTION}:
            _write_checkpoint(newest, params, {_DESCRIPTION: texts[_DESCRIPTION]})

    def reopen(self) -> None:
        """Drop what only a finished run holds, because more rounds follow."""
        for name in ("manifest.json", "privacy.json", "model.safetensors"):
            (self.path / name).unlink(missing_ok=True)

    def _read_ledger(self) -> Ledger:
        ledger, path = read_ledger(self.ledger), self.path / "checkpoint" / _LEDGER_HEAD
        try:
            noted = _unsealed(path.read_bytes())
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
            raw = self._metrics.read_bytes()[:size]
        except OSError as error:
            raise DamagedRunError(f"{self._metrics} cannot be read ({error}); restore the file.") from error
        if len(raw) != size or hashlib.sha256(raw).hexdigest() != description["metrics_sha256"]:
            raise DamagedRunError(
                f"{self._metrics} is not what the checkpoint counted; lines were changed or lost: restore it."
            )
        self._metrics_hash, self._metrics_size = hashlib.sha256(raw), size
        return [json.loads(line) for line in raw.splitlines()]

    def _mend(self, checkpoint: Checkpoint, metrics_size: int) -> None:
        drop_torn_line(self.ledger)
        self._trim_metrics(metrics_size)
        if _bytes_of(self.path / "config.json") != _as_json(checkpoint.card):
            self.write_json("config.json", checkpoint.card)

    def _trim_metrics(self, size: int) -> None:
        if self._metrics.stat().st_size > size:
            with self._metrics.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())


def _checkpoints(root: Path) -> list[Path]:
    return sorted(root / name for name in os.listdir(root) if name.endswith(".safetensors") and name[0] != ".")


def _write_checkpoint(path: Path, params: npt.NDArray[np.float32], texts: Mapping[str, str]) -> None:
    # Private, as it may hold a key; so is what is left of it should a crash come before it has its name.
    _replace(path, save_arrays({_PARAMS: params}, dict(texts)), mode=0o600)


def _contents(path: Path) -> tuple[dict[str, str], npt.NDArray[np.float32]]:
    """Return the texts of a checkpoint's file and its parameters `[P]`, unchecked.

    Raises:
        DamagedRunError: It is no checkpoint.
    """
    try:
        data = path.read_bytes()
        params = load_arrays(data)[_PARAMS]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if params.dtype != np.float32 or params.ndim != 1:
        raise DamagedRunError(f"{path} is damaged (it holds something else); restore the file.")
    return header.get("__metadata__") or {}, params


def _read_checkpoint(path: Path, key_may_be_gone: bool) -> tuple[Checkpoint, dict[str, Any]]:
    texts, params = _contents(path)
    try:
        description = _unsealed(texts.get(_DESCRIPTION, "").encode())
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if hashlib.sha256(params.data).hexdigest() != description["params_sha256"]:
        raise DamagedRunError(f"{path} is damaged (its checksum does not fit); restore the file.")
    expected, key = description["round_key_commitment"], None
    if expected is not None and not (key_may_be_gone and _ROUND_KEY not in texts):
        key = _key_of(texts.get(_ROUND_KEY, ""), expected, path)
    checkpoint = Checkpoint(
        round=description["round"],
        generation=description["generation"],
        params=params,
        round_key=key,
        card=description["config"],
    )
    return checkpoint, description


def _read_key(path: Path, expected: str | None) -> bytes:
    try:
        text = path.read_bytes().decode("ascii")
    except (OSError, ValueError) as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    return _key_of(text, expected, path)


def _key_of(text: str, expected: str | None, path: Path) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if not key or commitment(key) != expected:
        raise DamagedRunError(f"{path} is damaged: it is not the key that the run used; restore the file.")
    return key


def _note(ledger: Ledger) -> dict[str, Any]:
    return {"length": len(ledger), "head": ledger.head}


def _sealed(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, allow_nan=False)
    return (body + "\n" + hashlib.sha256(body.encode()).hexdigest() + "\n").encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    body, seal, *rest = data.split(b"\n")
    if rest != [b""] or hashlib.sha256(body).hexdigest().encode() != seal:
        raise ValueError("its checksum does not fit")
    return json.loads(body)  # type: ignore[no-any-return]  # sealed by us


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@contextlib.contextmanager
def _removed_if_killed(folder: Path) -> Iterator[None]:
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


def _sweep(parent: Path) -> None:
    """Remove what a process that was killed together with its watcher left of a directory that it was creating."""
    for left in parent.glob(f"{_UNFINISHED}*-*"):
        pid = left.name.removeprefix(_UNFINISHED).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    building = path.with_name(f".{path.name}")
    _write(building, data, mode)
    building.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
