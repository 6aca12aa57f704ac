"""Asks the machines of a Ray cluster for free resources, versions, importable modules and a shared directory.

Knows nothing of gateways. Gets Ray from its caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedray.pool.placement import Node

SETTLE_S = 2.0  # what has just ended may still hold its resources
ANSWER_TIMEOUT_S = 120.0
_OURS = ("ray", "torch", "fedray")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of a cluster.

    Args:
        node_id: In hexadecimal.
        address: Its IP address.
        num_cpus: Cores that Ray may use.
        num_gpus: GPUs that Ray may use.
        free_cpus: Not held by anybody, this run's driver included.
        free_gpus: Likewise; 1.9 may be one GPU and nine tenths of another.
    """

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    free_cpus: float
    free_gpus: float

    @property
    def free(self) -> Node:
        """Return what is free, for the placement."""
        return Node(node_id=self.node_id, num_cpus=self.free_cpus, num_gpus=self.free_gpus)

    @property
    def is_idle(self) -> bool:
        """Tell whether all of it is free."""
        return self.free_cpus >= self.num_cpus and self.free_gpus >= self.num_gpus

    @property
    def name(self) -> str:
        """Return its address and the start of its id, as `ray list nodes` shows them."""
        return f"{self.address} ({self.node_id[:8]})"


def machines_of(ray: Any, settle_s: float = SETTLE_S) -> list[Machine]:
    """Return the living machines of a cluster, those that joined first in front.

    Waits a moment for resources that are not free: what has just ended frees them late.
    """
    deadline = time.monotonic() + settle_s
    while True:
        free = ray._private.state.available_resources_per_node()  # Ray has no public call for this
        found = [
            Machine(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                num_cpus=node["Resources"].get("CPU", 0.0),
                num_gpus=node["Resources"].get("GPU", 0.0),
                free_cpus=free.get(node["NodeID"], node["Resources"]).get("CPU", 0.0),
                free_gpus=free.get(node["NodeID"], node["Resources"]).get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        if all(machine.is_idle for machine in found) or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)


def describe(machines: Sequence[Machine]) -> str:
    """Return what is free where, such as "10.0.0.7 (a1b2c3d4): 0.5 of 2 GPU, 4 of 8 CPU"."""
    parts = []
    for machine in sorted(machines, key=lambda machine: -machine.num_gpus)[:_SHOWN]:
        gpus = f"{machine.free_gpus:g} of {machine.num_gpus:g} GPU, " if machine.num_gpus else ""
        parts.append(f"{machine.name}: {gpus}{machine.free_cpus:g} of {machine.num_cpus:g} CPU")
    more = [f"{len(machines) - _SHOWN} more nodes"] * (len(machines) > _SHOWN)
    return "; ".join([*parts, *more])


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the machines of a cluster answered.

    Args:
        versions: Such as "Python 3.11.9", the same everywhere unless a problem says otherwise.
        problems: What keeps gateways from running somewhere; one sentence a machine.
        remarks: What the user should know.
        sharing: How many machines can write to the directory.
    """

    versions: tuple[str, ...]
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    sharing: int = 0


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    sharing: int = 0


def survey(ray: Any, machines: Sequence[Machine], modules: Sequence[str], marker: Path | None) -> Survey:
    """Ask every machine for its versions, and whether it can import modules and see a file.

    Args:
        ray: The library, connected.
        machines: See `machines_of`.
        modules: The user's, to be importable everywhere with the same content.
        marker: A file that this process has made, in the directory that should be shared; None to ask for none.
    """
    probe = _new_probe()
    path = None if marker is None else str(marker)
    here = probe(modules, path)
    task = ray.remote(probe)
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    calls = {}
    for machine in machines:
        there = task.options(num_cpus=0, num_gpus=0, scheduling_strategy=affinity(machine.node_id, soft=False))
        calls[there.remote(list(modules), path)] = machine
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_TIMEOUT_S)
    found = _Findings()
    for call, machine in calls.items():
        if call not in ready:
            found.problems.append(f"node {machine.name} did not answer within {ANSWER_TIMEOUT_S:g} s")
            continue
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as error:
            found.problems.append(f"node {machine.name} does not run tasks ({str(error).strip().splitlines()[-1]})")
            continue
        _judge(machine, answer, here, found, marker)
    return Survey(
        versions=tuple(f"{name} {version}" for name, version in here["versions"].items()),
        problems=tuple(found.problems),
        remarks=tuple(found.remarks),
        sharing=found.sharing,
    )


def _judge(machine: Machine, answer: Any, here: Any, found: _Findings, marker: Path | None) -> None:
    wrong = [f"cannot import {name} ({error})" for name, error in answer["errors"].items()]
    for name, version in here["versions"].items():
        other = answer["versions"].get(name)
        # torch's +cpu or +cu126 may differ: a head without GPUs can do with the smaller one.
        if other is not None and other.partition("+")[0] != version.partition("+")[0]:
            wrong.append(f"has {name} {other} where the driver has {version}")
    for name, digest in here["digests"].items():
        other = answer["digests"].get(name)
        if other is not None and other != digest:
            wrong.append(f"has another {name} than the driver, under the same version")
    if wrong:
        found.problems.append(f"node {machine.name} " + ", ".join(wrong))
    if machine.num_gpus and answer["cuda"] is None:
        found.remarks.append(f"node {machine.name} offers {machine.num_gpus:g} GPU, but its torch is built for CPUs.")
    if marker is not None:
        if answer["writable"]:
            found.sharing += 1
        else:
            what = "cannot write to" if answer["sees"] else "does not share"
            found.remarks.append(
                f"node {machine.name} {what} {marker.parent}: the run cannot be resumed by a driver there; use a directory "
                "of a shared file system."
            )


def _new_probe() -> Callable[[Sequence[str], str | None], Any]:
    # A function made in a function travels as code: it runs, and can tell, where fedray itself is missing.
    ours = _OURS

    def probe(modules: Sequence[str], marker: str | None) -> Any:
        import hashlib
        import importlib
        import os
        import platform
        from pathlib import Path

        versions, digests, errors, cuda = {"Python": platform.python_version()}, {}, {}, None
        for name in [*ours, *modules]:
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit) as error:
                errors[name] = f"{type(error).__name__}: {error}"
                continue
            if name in ours:
                versions[name] = str(module.__version__)
            if name == "torch":
                cuda = module.version.cuda
            if name not in ("ray", "torch") and getattr(module, "__file__", None):
                path = Path(str(module.__file__))
                files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
                content = hashlib.sha256()
                for file in files:
                    content.update(f"{file.relative_to(path.parent)}\0".encode() + file.read_bytes())
                digests[name] = content.hexdigest()
        sees = marker is not None and os.path.exists(marker)
        return {
            "versions": versions,
            "digests": digests,
            "errors": errors,
            "cuda": cuda,
            "sees": sees,
            "writable": sees and os.access(os.path.dirname(str(marker)), os.W_OK),
        }

    return probe
