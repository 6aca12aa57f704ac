"""Starts, calls, awaits and stops Ray actors: one for each group of gateways, where the placement says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import GroupResult
from fedray.errors import FedrayError, GatewayError, InputError, RunFailedError
from fedray.pool.machines import Machine, describe
from fedray.pool.placement import Placement
from fedray.pool.worker import Worker, WorkerSetup, resolve_device
from fedray.privacy.streams import RoundKeys

START_TIMEOUT_S = 300.0
_FAILURE_GRACE_S = 1.0  # how long to listen for the same failure from other actors


def last_line(error: object) -> str:
    """Return the last line of an error's message, or its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def names_of(group: range) -> str:
    """Return how messages call a group of gateways."""
    # Of the whole group: who of it takes part may be secret.
    return f"gateways {group.start}-{group.stop - 1}" if len(group) > 1 else f"gateway {group.start}"


class ActorLostError(RunFailedError):
    """An actor, its node or an object that it needs is gone."""


class _Actor:
    """Hosts a group of gateways in a Ray process."""

    def __init__(self, setup: WorkerSetup, device: str, sharing: int) -> None:
        self._arguments = (setup, device, sharing)
        self._worker: Worker | None = None

    def ready(self) -> tuple[str, str]:
        """Build the worker; return its kind of device and its hardware."""
        return resolve_device(self._arguments[1]).type, self._built().hardware

    def load(self, gateways: Sequence[int], key: bytes) -> dict[int, str]:
        """See `Worker.load`."""
        return self._built().load(gateways, key)

    def train(
        self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]
    ) -> tuple[str, GroupResult]:
        """See `Worker.train`; draw for the next round while the orchestrator is at work.

        Returns:
            The hardware that the result was computed on, and the result.
        """
        worker = self._built()
        result = worker.train(keys, params, gateways)
        worker.draw_ahead()
        return worker.hardware, result

    def _built(self) -> Worker:
        # Not in the constructor, whose errors Ray reports as deaths.
        if self._worker is None:
            torch.set_num_threads(1)
            setup, name, sharing = self._arguments
            self._worker = Worker(setup, resolve_device(name), sharing)
        return self._worker


class RayActors:
    """The actors of a pool.

    Args:
        ray: The module, connected.
        nodes: Machines of the cluster.
        placement: Where each actor runs.
        setup_ref: `WorkerSetup` in the object store.
        device: --device.
        placement_timeout_s: Seconds to wait for GPUs.
    """

    def __init__(
        self,
        ray: Any,
        nodes: Sequence[Machine],
        placement: Placement,
        device: str,
        placement_timeout_s: float,
    ) -> None:
        self.ray, self.nodes, self.placement = ray, nodes, placement
        self.by_group: dict[int, Any] = {}
        self.hardware: dict[int, str] = {}  # of each actor, as last heard
        self._device = device
        self._placement_timeout_s = placement_timeout_s
        self._setup_ref: Any = None
        self._group: Any = None
        self._sharing = Counter((slot.bundle, slot.node) for slot in placement.actors)

    def take_setup(self, setup: WorkerSetup) -> None:
        """Put the setup, which every actor gets, into the object store.

        Raises:
            InputError: It cannot be sent.
        """
        try:
            self._setup_ref = self.ray.put(setup)
        except TypeError as error:  # Ray's own message is a page
            raise InputError(
                f"model, loss or shards cannot be sent to actors ({error.__cause__ or 'not serializable'}); open files and "
                "connections where a shard is loaded, not before."
            ) from error

    def start(self, index: int, anywhere: bool = False) -> None:
        """Start the actor of a group; `anywhere` when its node may be gone."""
        strategies = self.ray.util.scheduling_strategies
        slot = self.placement.actors[index]
        strategy: Any = strategies.NodeAffinitySchedulingStrategy(self.nodes[slot.node].node_id, soft=True)
        if slot.bundle is not None:
            strategy = strategies.PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=slot.bundle
            )
        elif anywhere:  # its node may be gone; a node that joined later serves as well
            strategy = "SPREAD"
        options = {"num_cpus": slot.num_cpus, "num_gpus": slot.num_gpus, "scheduling_strategy": strategy}
        actor = self.ray.remote(_Actor).options(**options)
        self.by_group[index] = actor.remote(self._setup_ref, self._device, self._sharing[slot.bundle, slot.node])

    def stop(self, index: int) -> None:
        """Kill the actor of a group."""
        actor = self.by_group.pop(index, None)
        if actor is not None:
            self.ray.kill(actor)

    def reserve_gpus(self) -> None:
        """Wait for the GPUs of the placement."""
        placement = self.placement
        if not placement.gpu_bundles or self._group is not None:
            return
        bundles: dict[int, float] = {}
        for slot in placement.actors:
            assert slot.bundle is not None
            bundles[slot.bundle] = bundles.get(slot.bundle, 0.0) + slot.num_cpus
        gpus = placement.gpu_bundles
        wanted = [{"GPU": gpus[bundle], "CPU": round(cpus, 4)} for bundle, cpus in sorted(bundles.items())]
        self._group = self.ray.util.placement_group(wanted, strategy="PACK")
        if not self._group.wait(self._placement_timeout_s):
            counts = Counter(f"{bundle['GPU']:g} of one GPU with {bundle['CPU']:g} CPU beside it" for bundle in wanted)
            needs = ", ".join(f"{count} × {what}" for what, count in counts.items())
            raise InputError(
                f"{len(placement.actors)} actors need {needs}, and did not get it within --placement-timeout "
                f"{self._placement_timeout_s:g} s; free were {describe(self.nodes)}: free some, wait longer, or "
                "use --device cpu."
            )

    def wait_all(self, calls: Sequence[Any], timeout_s: float | None, purpose: str) -> list[Any]:
        """Return the results of all calls in order; the first failure ends the wait."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pending, results = list(calls), {}
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = self.ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                raise RunFailedError(self._too_little(len(pending), timeout_s or 0.0, purpose))
            for call in ready:
                try:
                    results[call] = self.ray.get(call)
                except self.ray.exceptions.RayTaskError as error:
                    raise self.failure(error, pending, purpose) from None
                except self.ray.exceptions.RayError as error:
                    if "error raised in its creation task" in str(error):  # it would be raised again
                        raise RunFailedError(
                            f"an actor could not be created ({last_line(error)}); what model, loss and shards import must "
                            "be importable where gateways run."
                        ) from None
                    raise ActorLostError(last_line(error)) from None
        return [results[call] for call in calls]

    def _too_little(self, missing: int, seconds: float, purpose: str) -> str:
        needs = self.placement.describe()
        free = {
            name: value for name, value in self.ray.available_resources().items() if name in ("CPU", "GPU", "memory")
        }
        return (
            f"{missing} actors did not {purpose} within {seconds:g} s; needed are {needs}, free are {free}: free resources, "
            "or raise --gateways-per-actor."
        )

    def failure(self, error: Any, pending: Sequence[Any], purpose: str) -> FedrayError:
        """Return the error to raise for an actor that failed; `pending` are the calls of other actors."""
        cause = getattr(error, "cause", None)
        if not isinstance(cause, FedrayError):
            return RunFailedError(f"an actor failed to {purpose}: {last_line(error)}")
        if not isinstance(cause, GatewayError) or not pending:
            return cause
        # Sixteen equal failures are one line: listen a moment for the others.
        ready, _ = self.ray.wait(list(pending), num_returns=len(pending), timeout=_FAILURE_GRACE_S)
        others = []
        for call in ready:
            try:
                self.ray.get(call)
            except self.ray.exceptions.RayError as other:
                if isinstance(getattr(other, "cause", None), GatewayError):
                    others.append(other)
        more = f" ({len(others)} more actors failed in the same round)" if others else ""
        return GatewayError(cause.message + more, cause.details)

    def close(self) -> None:
        """Stop all of them and let go of their GPUs."""
        for index in [*self.by_group]:
            self.stop(index)
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)
            self._group = None
