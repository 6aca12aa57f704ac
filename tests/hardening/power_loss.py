"""A disk that loses power: every change of a run directory is recorded, and played back up to a point with what was not synced
kept, lost or torn at random; or one change fails, as a disk does. What is left must go on to the same result.

Model of the disk: the bytes of `write_durably` and `append_durably` are safe when these return (they sync the file). Names are
safe when their directory was synced: until then each creation, renaming and removal may be missing on its own. Writes in place
that nobody synced (the ledger's note, private.jsonl) may be old, new or cut anywhere.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

from fedray import Orchestrator, Run, RunConfig
from fedray.privacy import durable, ledger
from fedray.rundir import directory, files

SETTINGS: dict[str, Any] = {
    "pool": "inline", "device": "cpu", "gateways": 3, "rounds": 3, "local_steps": 1, "batch_size": 4,
    "samples_per_gateway": 16, "seed": 3, "noise_level": "gateway", "participation": 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change of the disk.

    Args:
        kind: write, append, truncate, place, rename, unlink, mkdir or sync.
        path: Relative to the folder that holds the run.
        data: Content or appended bytes; for rename the new name.
    """

    kind: str
    path: str
    data: Any = None


class PowerError(BaseException):
    """The power went: nothing of fedray may catch it."""


@dataclass
class Disk:
    """Records changes under a folder; can fail one of them.

    Args:
        folder: All of whose changes are recorded.
        fails_at: Number of the change that raises an OSError; None for none.
    """

    folder: Path
    fails_at: int | None = None
    changes: list[Change] = field(default_factory=list)

    def note(self, kind: str, path: Path, data: Any = None) -> None:
        """Record a change that is about to happen."""
        path = path.absolute()
        if not path.is_relative_to(self.folder):
            return
        if self.fails_at is not None and len(self.changes) == self.fails_at:
            self.fails_at = None
            raise OSError(errno.EIO, "the disk failed", str(path))
        self.changes.append(Change(kind, str(path.relative_to(self.folder)), data))


@contextmanager
def recorded(disk: Disk) -> Iterator[None]:
    """Record all changes that fedray makes in the block."""

    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        disk.note("write", path, bytes(data))
        durable.write_durably(path, data, mode)

    def append(path: Path, data: bytes) -> None:
        disk.note("append", path, bytes(data))
        durable.append_durably(path, data)

    def truncate(path: Path, size: int) -> None:
        disk.note("truncate", path, size)
        durable.truncate_durably(path, size)

    @contextmanager
    def opened(path: Path, flags: int, mode: int = 0o600, **named: Any) -> Iterator[IO[bytes]]:
        with durable.open_regular(path, flags, mode, **named) as file:
            yield file
        if flags & (os.O_RDWR | os.O_WRONLY):
            disk.note("place", path, path.read_bytes())

    def method(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Path, *arguments: Any, **named: Any) -> Any:
            if kind == "rename":
                target = Path(arguments[0]).absolute()
                disk.note(
                    kind, self, str(target.relative_to(disk.folder)) if target.is_relative_to(disk.folder) else None
                )
            elif kind != "unlink" or self.exists() or self.is_symlink():
                disk.note(kind, self)
            return original(self, *arguments, **named)

        return call

    def sync(path: Path) -> None:
        disk.note("sync", path)
        synced(path)

    synced = files.sync_directory
    with ExitStack() as stack:
        for module in (files, directory, ledger):
            for name, stand_in in {
                "write_durably": write, "append_durably": append, "truncate_durably": truncate, "open_regular": opened,
                "sync_directory": sync,
            }.items():  # fmt: skip
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        for name, kind in {"rename": "rename", "replace": "rename", "unlink": "unlink", "mkdir": "mkdir"}.items():
            stack.enter_context(mock.patch.object(Path, name, method(kind, getattr(Path, name))))
        yield


def played(changes: list[Change], folder: Path, rng: random.Random) -> None:  # noqa: PLR0912 - one branch a kind of change
    """Leave in a folder what the disk may hold when the power goes after these changes, the last of which may be torn."""
    content: dict[str, bytes] = {}  # of names as a process would see them
    folders: set[str] = set()
    safe: dict[str, bytes] = {}  # as the disk surely has them
    safe_folders: set[str] = set()
    loose: list[Change] = []  # changes of names since their directory was synced
    for number, change in enumerate(changes):
        last = number == len(changes) - 1
        path, data = change.path, change.data
        if change.kind in ("write", "place"):
            old = content.get(path, b"")
            if last:
                data = rng.choice([old, data[: rng.randrange(len(data) + 1)], data])
            content[path] = data
            if path in safe and (change.kind == "write" or rng.random() < 0.5):
                safe[path] = data
            loose.append(Change("create", path, data))
        elif change.kind == "append":
            data = data[: rng.randrange(len(data) + 1)] if last and rng.random() < 0.7 else data
            content[path] = content.get(path, b"") + data
            if path in safe:
                safe[path] = content[path]
            else:
                loose.append(Change("create", path, content[path]))
        elif change.kind == "truncate":
            content[path] = content[path][:data]
            if path in safe:
                safe[path] = content[path]
        elif change.kind == "mkdir":
            folders.add(path)
            loose.append(change)
        elif change.kind in ("rename", "unlink"):
            if change.kind == "rename" and path in folders:  # what waits for a sync in a folder moves with it
                loose = [_moved(one, path, data) for one in loose]
            loose.append(change)
            _apply(change, content, folders)
        elif change.kind == "sync":
            here = [one for one in loose if _parent(one) == path]
            loose = [one for one in loose if _parent(one) != path]
            for one in here:
                _apply(one, safe, safe_folders)
                if one.kind == "create":
                    safe[one.path] = content.get(one.path, one.data)
    for one in loose:
        if rng.random() < 0.5:
            _apply(one, safe, safe_folders)
    for name in sorted(safe_folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, data in safe.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _moved(change: Change, old: str, new: str) -> Change:
    if not change.path.startswith(f"{old}/"):
        return change
    return Change(change.kind, new + change.path[len(old) :], change.data)


def _parent(change: Change) -> str:
    return str(Path(change.path).parent)


def _apply(change: Change, content: dict[str, bytes], folders: set[str]) -> None:
    path, to = change.path, change.data
    if change.kind == "create":
        content.setdefault(path, change.data)
    elif change.kind == "mkdir":
        folders.add(path)
    elif change.kind == "unlink":
        content.pop(path, None)
    elif change.kind == "rename" and to is not None:
        moved = {name: data for name, data in content.items() if name == path or name.startswith(f"{path}/")}
        for name, data in moved.items():
            del content[name]
            content[to + name[len(path) :]] = data
        for name in [name for name in folders if name == path or name.startswith(f"{path}/")]:
            folders.discard(name)
            folders.add(to + name[len(path) :])


def train(folder: Path) -> Run:
    """Run the job into a folder."""
    return Orchestrator(config=RunConfig().resolve(**SETTINGS, out=folder / "run")).run()


def resume(folder: Path) -> Run:
    """Go on with what is in a folder."""
    return Orchestrator(config=RunConfig().resolve(resume=folder / "run")).run()


def emptied(folder: Path) -> Path:
    """Return a folder that is there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
