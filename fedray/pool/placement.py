"""Which actor hosts which gateways, with what share of which machine: pure arithmetic.

Shares are counted in ten-thousandths, Ray's own unit, and rounded down so that they always fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.errors import InputError

UNITS = 10_000
GATEWAY_SLOTS_PER_GPU = 16


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine: its id in the cluster, CPU cores and GPUs."""

    node_id: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class ActorSlot:
    """One actor's place.

    Args:
        gateways: The ids it hosts, a contiguous range fixed for the run.
        node: Index of its node.
        bundle: Index of its GPU over the whole cluster, or None.
        num_cpus: Share of CPU cores.
        num_gpus: Share of its GPU.
    """

    gateways: range
    node: int
    bundle: int | None
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All actors of a run."""

    actors: tuple[ActorSlot, ...]

    @property
    def groups(self) -> tuple[range, ...]:
        """The gateways of each actor."""
        return tuple(actor.gateways for actor in self.actors)

    def describe(self) -> str:
        """Return a line such as "2 actors × 8 gateways, 1 CPU each"."""
        sizes = sorted({len(actor.gateways) for actor in self.actors})
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        first = self.actors[0]
        shares = f"{first.num_cpus:g} CPU" + (f", {first.num_gpus:g} GPU" if first.num_gpus else "")
        actors = "1 actor" if len(self.actors) == 1 else f"{len(self.actors)} actors"
        gateways = "gateway" if each == "1" else "gateways"
        return f"{actors} × {each} {gateways}, {shares} each"


def groups_of(gateways: int, actors: int) -> tuple[range, ...]:
    """Split gateways into contiguous groups whose sizes differ by at most one."""
    small, larger = divmod(gateways, actors)
    groups, start = [], 0
    for index in range(actors):
        size = small + (index < larger)
        groups.append(range(start, start + size))
        start += size
    return tuple(groups)


def place(gateways: int, nodes: Sequence[Node], gateways_per_actor: int | str, use_gpus: bool) -> Placement:
    """Place gateways on nodes.

    A gateway gets an actor of its own while there is a slot for it (a CPU core, or a sixteenth of a GPU); past that,
    actors host groups.

    Args:
        gateways: How many.
        nodes: What the cluster has free.
        gateways_per_actor: "auto" or a number; 1 forces one actor per gateway.
        use_gpus: Place on GPUs rather than on CPU cores.

    Raises:
        InputError: Nothing fits.
    """
    cores = sum(int(node.num_cpus) for node in nodes)
    gpus = [index for index, node in enumerate(nodes) for _ in range(int(node.num_gpus))]
    slots = GATEWAY_SLOTS_PER_GPU * len(gpus) if use_gpus else cores
    if slots < 1:
        needs = "one GPU" if use_gpus else "one CPU core"
        raise InputError(
            f"the cluster has no {needs[4:]} for gateways; at least {needs} is needed: add one, or free one."
        )
    actors = -(-gateways // gateways_per_actor) if isinstance(gateways_per_actor, int) else min(gateways, slots)
    if use_gpus:
        return _on_gpus(groups_of(gateways, actors), nodes, gpus)
    return _on_cores(groups_of(gateways, actors), nodes)


def _on_gpus(groups: Sequence[range], nodes: Sequence[Node], gpus: Sequence[int]) -> Placement:
    per_gpu = -(-len(groups) // len(gpus))
    gpu_share = UNITS // per_gpu
    # Every node must hold the actors of all its GPUs: its cores bound the CPU share of each.
    cpu_share = min(
        UNITS, *(int(node.num_cpus * UNITS) // (int(node.num_gpus) * per_gpu) for node in nodes if int(node.num_gpus))
    )
    if cpu_share < 1 or gpu_share < 1:
        raise InputError(
            f"{len(groups)} actors do not fit on {len(gpus)} GPUs and the cores beside them; raise --gateways-per-actor."
        )
    shared = groups_of(len(groups), min(len(groups), len(gpus)))  # evenly: 17 actors leave none of 16 GPUs idle
    hosts = [bundle for bundle, actors in enumerate(shared) for _ in actors]
    return Placement(
        actors=tuple(
            ActorSlot(
                gateways=group,
                node=gpus[bundle],
                bundle=bundle,
                num_cpus=cpu_share / UNITS,
                num_gpus=gpu_share / UNITS,
            )
            for group, bundle in zip(groups, hosts, strict=True)
        )
    )


def _on_cores(groups: Sequence[range], nodes: Sequence[Node]) -> Placement:
    capacity = [int(node.num_cpus * UNITS) for node in nodes]
    share = _largest_share(capacity, len(groups))
    if share < 1:
        raise InputError(
            f"{len(groups)} actors do not fit on {sum(capacity) / UNITS:g} CPU cores; raise --gateways-per-actor."
        )
    rooms = [units // share for units in capacity]
    hosts: list[int] = []
    taken = [0] * len(nodes)
    for _ in groups:  # the emptiest node next, so that gateways spread
        node = min((n for n in range(len(nodes)) if taken[n] < rooms[n]), key=lambda n: (taken[n] / rooms[n], n))
        taken[node] += 1
        hosts.append(node)
    hosts.sort()
    return Placement(
        actors=tuple(
            ActorSlot(gateways=group, node=host, bundle=None, num_cpus=share / UNITS, num_gpus=0.0)
            for group, host in zip(groups, hosts, strict=True)
        )
    )


def _largest_share(capacity: Sequence[int], actors: int) -> int:
    """Return the largest share, at most one core, of which `actors` fit without straddling nodes."""
    candidates = {UNITS} | {units // k for units in capacity for k in range(1, actors + 1) if units // k <= UNITS}
    fitting = [share for share in candidates if share >= 1 and sum(units // share for units in capacity) >= actors]
    return max(fitting, default=0)
