"""Decides which actor hosts which gateways, with what share of which machine; pure arithmetic.

Shares are counted in ten-thousandths, Ray's own unit, and rounded down so that they always fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fedray.errors import InputError

UNITS = 10_000
GATEWAY_SLOTS_PER_GPU = 16


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine: its id in the cluster, and what is free of its CPU cores and GPUs (1.9: one whole and most of one)."""

    node_id: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class ActorSlot:
    """One actor's place.

    Args:
        gateways: The ids it hosts, a contiguous range fixed for the run.
        node: Index of its node.
        bundle: Index of its GPU among those that are used, or None.
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
    """All actors of a run.

    Args:
        actors: In gateway order.
        gpu_bundles: What each bundle takes of its GPU: all of it, or what somebody else, such as the driver, left.
    """

    actors: tuple[ActorSlot, ...]
    gpu_bundles: tuple[float, ...] = ()

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
    gpus = [(index, units) for index, node in enumerate(nodes) for units in _gpu_units(node.num_gpus)]
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


def _gpu_units(num_gpus: float) -> list[int]:
    """Return what is free of each GPU; a rest below one gateway's slot is left to who has the others."""
    whole, rest = divmod(round(num_gpus * UNITS), UNITS)
    return [UNITS] * whole + [rest] * (rest >= UNITS // GATEWAY_SLOTS_PER_GPU)


def _on_gpus(groups: Sequence[range], nodes: Sequence[Node], gpus: Sequence[tuple[int, int]]) -> Placement:
    gpu_share, hosts = _spread([units for _, units in gpus], len(groups))
    on_node = [0] * len(nodes)
    for gpu in hosts:
        on_node[gpus[gpu][0]] += 1
    # Every node must hold the actors of all its GPUs: its cores bound the CPU share of each.
    cpu_share = min(
        UNITS, *(int(node.num_cpus * UNITS) // count for node, count in zip(nodes, on_node, strict=True) if count)
    )
    if cpu_share < 1 or gpu_share < 1:
        raise InputError(
            f"{len(groups)} actors do not fit on {len(gpus)} GPUs and the cores beside them; raise --gateways-per-actor."
        )
    used = sorted(set(hosts))
    bundles = {gpu: bundle for bundle, gpu in enumerate(used)}
    return Placement(
        actors=tuple(
            ActorSlot(
                gateways=group,
                node=gpus[gpu][0],
                bundle=bundles[gpu],
                num_cpus=cpu_share / UNITS,
                num_gpus=gpu_share / UNITS,
            )
            for group, gpu in zip(groups, hosts, strict=True)
        ),
        gpu_bundles=tuple(gpus[gpu][1] / UNITS for gpu in used),
    )


def _on_cores(groups: Sequence[range], nodes: Sequence[Node]) -> Placement:
    capacity = [int(node.num_cpus * UNITS) for node in nodes]
    share, hosts = _spread(capacity, len(groups))
    if share < 1:
        raise InputError(
            f"{len(groups)} actors do not fit on {sum(capacity) / UNITS:g} CPU cores; raise --gateways-per-actor."
        )
    return Placement(
        actors=tuple(
            ActorSlot(gateways=group, node=host, bundle=None, num_cpus=share / UNITS, num_gpus=0.0)
            for group, host in zip(groups, hosts, strict=True)
        )
    )


def _spread(capacity: Sequence[int], actors: int) -> tuple[int, list[int]]:
    """Return the largest share, at most a whole one, of which `actors` fit without straddling hosts, and their hosts.

    The emptiest host is next, so that gateways spread. The share is 0 when they do not fit.
    """
    low, high = 0, UNITS  # the number that fits falls as the share grows
    while low < high:
        middle = (low + high + 1) // 2
        if sum(units // middle for units in capacity) >= actors:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        return 0, []
    rooms = [units // low for units in capacity]
    queue = [(0.0, host, 0) for host, room in enumerate(rooms) if room]
    hosts = []
    for _ in range(actors):
        _, host, taken = heapq.heappop(queue)
        hosts.append(host)
        if taken + 1 < rooms[host]:
            heapq.heappush(queue, ((taken + 1) / rooms[host], host, taken + 1))
    return low, sorted(hosts)
