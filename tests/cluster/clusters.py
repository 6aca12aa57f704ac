"""Starting clusters and running fedray on them, each in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zygote import launcher

SPY = """
import json, pathlib
import numpy as np

HERE = pathlib.Path(__file__).parent

class Spy:
    '''Shards that leave a note where, and with what share of it, each actor loads them.'''
    def __init__(self, gateways):
        self.gateways = gateways
    def __len__(self):
        return self.gateways
    def __getitem__(self, index):
        import ray
        context = ray.get_runtime_context() if ray.is_initialized() else None
        if context is not None and context.get_actor_id() is not None:
            note = HERE / "seen" / context.get_actor_id()
            if not note.exists():
                note.write_text(json.dumps([context.get_node_id(), context.get_assigned_resources()]))
        return records(index)

def records(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(64, 16)).astype(np.float32), rng.integers(0, 4, 64)

def data(gateways):
    return Spy(gateways), records(999)
"""


@dataclass(frozen=True)
class Nodes:
    """A running cluster: its address, and the ids of its nodes in the order that they were asked for."""

    address: str
    ids: list[str]
    process: subprocess.Popen[str]

    @contextmanager
    def holding(self, *shares: dict[str, float]) -> Iterator[None]:
        """Let somebody else hold shares of the cluster's resources meanwhile."""
        self._hold(shares)
        try:
            yield
        finally:
            self._hold(())

    def _hold(self, shares: tuple[dict[str, float], ...]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(shares) + "\n")
        self.process.stdin.flush()
        # Ray prints there as well, while it waits for resources.
        assert any(line == "held\n" for line in iter(self.process.stdout.readline, ""))


@contextmanager
def cluster(*nodes: dict[str, Any]) -> Iterator[Nodes]:
    """Run a cluster of several nodes; the first is the head."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.many_nodes", json.dumps(nodes), launcher()],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        while line and not line.startswith("{"):
            line = process.stdout.readline()
        if not line:
            raise RuntimeError(process.communicate(timeout=60)[1])
        started = json.loads(line)
        yield Nodes(started["address"], started["nodes"], process)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=60)
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()


@dataclass(frozen=True)
class Done:
    """An ended command: exit code, what it printed, and its seconds."""

    code: int
    out: str
    err: str
    seconds: float


def fedray(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 400) -> Done:
    """Run `python -m fedray`."""
    began = time.monotonic()
    done = subprocess.run(
        [launcher(), "-m", "fedray", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def spy(folder: Path) -> Path:
    """Write the module of a data set that notes where it is loaded; return the folder of its notes."""
    (folder / "spy.py").write_text(SPY)
    seen = folder / "seen"
    seen.mkdir()
    return seen


def notes(seen: Path) -> list[tuple[str, dict[str, float]]]:
    """Return the node and resources of each actor that loaded shards."""
    return [tuple(json.loads(note.read_text())) for note in seen.iterdir()]
