"""Small jobs for tests that break things: run in processes of their own, killed, resumed and compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedray
from fedray.rundir.evidence import checkpoint_texts, checkpoints
from fedray.rundir.verification import examine

SMALL: dict[str, Any] = {
    "gateways": 4,
    "rounds": 3,
    "local_steps": 2,
    "batch_size": 8,
    "samples_per_gateway": 32,
    "noise_level": "gateway",  # its epsilon is a closed form
    "pool": "inline",
    "seed": 5,
}
# Children are forked from a process that has imported everything and started no thread.
_FORGE = multiprocessing.get_context("forkserver")
_FORGE.set_forkserver_preload(["tests.recovery.warm"])
_TIMEOUT_S = 60


def train(out: Path, **changes: Any) -> fedray.Run:
    """Run the small job into a new directory."""
    return fedray.Orchestrator(config=fedray.RunConfig().resolve(**{**SMALL, "out": out, **changes})).run()


def resume(path: Path, **changes: Any) -> fedray.Run:
    """Go on with a run directory."""
    return fedray.Orchestrator(config=fedray.RunConfig().resolve(resume=path, **{"pool": "inline", **changes})).run()


def in_child(function: Callable[..., Any], *arguments: Any, kill_after_s: float | None = None, **named: Any) -> int:
    """Call a function of a test module in a process of its own; return its exit code, -9 when it was killed.

    Args:
        function: Importable.
        arguments: Its arguments.
        kill_after_s: Kill it -9 after so many seconds.
        named: Its named arguments.
    """
    child = _FORGE.Process(target=function, args=arguments, kwargs=named)
    child.start()
    child.join(_TIMEOUT_S if kill_after_s is None else kill_after_s)
    if child.is_alive():
        child.kill()
        child.join()
        assert kill_after_s is not None, "the child hung"
    assert child.exitcode is not None
    return child.exitcode


class DiskWatch:
    """Counts what this process does to files below a folder; kills the process just before operation number `fatal`.

    Args:
        folder: Where to look.
        fatal: Which operation, from 0; None to count only.
        tear: Whether the fatal operation, when it is a sync, finds the last bytes missing (a torn write).
    """

    def __init__(self, folder: Path, fatal: int | None, tear: bool = False) -> None:
        self.log: list[str] = []
        self._folder, self._fatal, self._tear = str(folder), fatal, tear
        self._sync = os.fsync

    def start(self) -> None:
        """Watch until the process ends."""
        os.fsync = self._fsync
        sys.addaudithook(self._hook)

    def _fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        self._count(f"fsync {name}", name, descriptor)
        self._sync(file)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR):
                self._count(f"{event} {path}", str(path))
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            self._count(f"{event} {arguments[0]}", str(arguments[0]))

    def _count(self, what: str, path: str, descriptor: int | None = None) -> None:
        if not path.startswith(self._folder):
            return
        if len(self.log) == self._fatal:
            if self._tear and descriptor is not None and os.path.isfile(path):
                os.truncate(path, max(0, os.path.getsize(path) - 5))
            os.kill(os.getpid(), signal.SIGKILL)
        self.log.append(what)


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def entries(run: Path) -> list[dict[str, Any]]:
    """Return a run's ledger without its incarnations, of which an unseeded run has one for each process that charged."""
    return [entry for entry in lines(run / "ledger.jsonl") if entry["event"] != "incarnation"]


def round_keys(run: Path) -> int:
    """Return how many checkpoints of a run directory hold a round key, or cannot be read."""
    texts = [checkpoint_texts(file) for file in checkpoints(run)]
    return sum(found is None or "round_key" in found for found in texts)


def timeless_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run but for what depends on the clock."""
    clock = ("seconds", "samples_per_s")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines(path / "metrics.jsonl")]


def outcome(path: Path) -> dict[str, Any]:
    """Return all that must not depend on what happened to a finished run on its way."""
    card = json.loads((path / "privacy.json").read_text())
    return {
        "model": (path / "model.safetensors").read_bytes(),
        "ledger": (path / "ledger.jsonl").read_bytes(),
        "metrics": timeless_metrics(path),
        "card": {name: value for name, value in card.items() if name != "digests"},
        "files": sorted(str(file.relative_to(path)) for file in path.rglob("*")),
    }


def assert_true(path: Path) -> None:
    """Fail when `verify` finds anything off in a run directory."""
    verdict = examine(path)
    assert verdict.finished
    assert verdict.holds, [finding for finding in verdict.findings if not finding.holds]
