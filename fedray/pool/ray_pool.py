"""Gateways in Ray actors.

Actors are long-lived and get their setup once, from the object store. A round puts the parameters there once, calls each
actor once, and takes results as they become ready.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import GroupResult
from fedray.errors import FedrayError, GatewayError, InputError, RunFailedError
from fedray.pool import connection
from fedray.pool.machines import describe, machines_of, survey
from fedray.pool.placement import Placement, place
from fedray.pool.pool import Inspection, Patience, PoolInfo, members
from fedray.pool.worker import Worker, WorkerSetup, resolve_device
from fedray.privacy.streams import RoundKeys


def _last_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _names(group: range) -> str:
    # Of the whole group: who of it takes part may be secret.
    return f"gateways {group.start}-{group.stop - 1}" if len(group) > 1 else f"gateway {group.start}"


log = logging.getLogger("fedray")
START_TIMEOUT_S = 300.0
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.1, 5.0
_FAILURE_GRACE_S = 1.0  # how long to listen for the same failure from other actors


class _ActorLostError(RunFailedError):
    """An actor, its node or an object that it needs is gone."""


@dataclass
class _Round:
    """A round under way.

    Args:
        keys: Of the attempt.
        params_ref: The broadcast parameters in the object store.
        groups: Gateways of each group that takes part.
        deadline: Monotonic time at which patience ends.
        pending: Group of each call that has not answered.
    """

    keys: RoundKeys
    params_ref: Any
    groups: dict[int, list[int]]
    deadline: float
    pending: dict[Any, int] = field(default_factory=dict)


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


class RayPool:
    """Trains groups of gateways in parallel, one actor a group.

    Args:
        setup: See `WorkerSetup`.
        gateways: How many.
        gateways_per_actor: "auto" or a number.
        device: --device.
        address: --ray-address; None for RAY_ADDRESS if set, else a local Ray.
        patience: How failures are dealt with.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        gateways: int,
        gateways_per_actor: int | str,
        device: str,
        address: str | None,
        patience: Patience,
    ) -> None:
        self._setup = setup
        self._gateways = gateways
        self._gateways_per_actor = gateways_per_actor
        self._device = device
        self._address = address
        self._ray: Any = None
        self._connection: connection.Connection | None = None
        self._placement: Placement | None = None
        self._group: Any = None
        self._patience = patience
        self._actors: dict[int, Any] = {}
        self._failures = 0
        self._kind = ""
        self._hardware: dict[int, str] = {}  # of each actor, as last heard
        self._setup_ref: Any = None
        self._sharing: Counter[tuple[int | None, int]] = Counter()
        self._round: _Round | None = None

    def connect(self) -> Placement:
        """Connect to Ray, or start it, and place the actors without starting them.

        Raises:
            InputError: No such cluster, or the gateways do not fit on it.
        """
        self._connection = connection.connect(self._address)
        self._ray = ray = self._connection.ray
        self._nodes = machines_of(ray)
        has_gpus = any(machine.num_gpus >= 1 for machine in self._nodes)
        if self._device == "cuda" and not has_gpus:
            raise InputError("--device is cuda but the cluster has no GPU; use --device cpu or auto.")
        free = [machine.free for machine in self._nodes]
        try:
            self._placement = place(
                self._gateways, free, self._gateways_per_actor, use_gpus=has_gpus and self._device != "cpu"
            )
        except InputError as error:
            if all(machine.is_idle for machine in self._nodes):
                raise
            raise InputError(f"{str(error).removesuffix('.')} (free are {describe(self._nodes)}).") from None
        return self._placement

    def describe(self) -> str:
        """See `Pool.describe`."""
        return self.connect().describe()

    def inspect(self, modules: Sequence[str], marker: Path | None) -> Inspection:
        """See `Pool.inspect`."""
        placement = self._placement or self.connect()
        if placement.gpu_bundles:
            self._reserve_gpus(placement)
        found = survey(self._ray, self._nodes, modules, marker)
        if found.problems:
            raise InputError(
                f"{'; '.join(found.problems)}: run the same image on every node, or send your module along with `ray job "
                "submit --working-dir`."
            )
        rows = [("nodes", describe(self._nodes)), ("versions", f"{', '.join(found.versions)} on all nodes")]
        if modules:
            rows.append(("modules", f"{', '.join(modules)}: the same on all nodes"))
        if marker is not None:
            rows.append(("files", f"{marker.parent}: writable on {found.sharing} of {len(self._nodes)} nodes"))
        return Inspection(rows=tuple(rows), remarks=found.remarks)

    def start(self) -> PoolInfo:
        """Start all actors and wait until they are ready."""
        placement = self._placement or self.connect()
        if placement.gpu_bundles:
            self._reserve_gpus(placement)
        try:
            self._setup_ref = self._ray.put(self._setup)
        except TypeError as error:  # Ray's own message is a page
            raise InputError(
                f"model, loss or shards cannot be sent to actors ({error.__cause__ or 'not serializable'}); open files and "
                "connections where a shard is loaded, not before."
            ) from error
        self._sharing = Counter((slot.bundle, slot.node) for slot in placement.actors)
        for index in range(len(placement.actors)):
            self._actors[index] = self._new_actor(index)
        ready = {index: actor.ready.remote() for index, actor in self._actors.items()}
        kinds = set()
        for index, call in ready.items():
            try:
                kind, self._hardware[index] = self._wait_all([call], START_TIMEOUT_S, "start")[0]
            except _ActorLostError as error:
                kind = self._restart(index, error, 0, time.monotonic() + START_TIMEOUT_S)
            kinds.add(kind)
        if len(kinds) != 1:
            raise InputError(
                f"actors found different devices ({', '.join(sorted(kinds))}), so results would depend on placement; "
                "use --device cpu."
            )
        self._kind = kinds.pop()
        return self.info()

    def info(self) -> PoolInfo:
        """See `Pool.info`."""
        placement = self._placement
        assert placement is not None, "start() comes first"
        hosts = len({slot.node for slot in placement.actors})
        return PoolInfo(
            summary=f"{placement.describe()}, on {self._kind}, 1 thread each, on {hosts} node{'s' * (hosts > 1)}",
            groups=placement.groups,
            device=self._kind,
            hardware=tuple(self._hardware[index] for index in range(len(placement.actors))),
        )

    def load(self, key: bytes) -> dict[int, str]:
        """See `Pool.load`."""
        assert self._placement is not None, "start() comes first"
        limit = max(START_TIMEOUT_S, self._patience.round_timeout_s)
        deadline = time.monotonic() + limit
        calls = {
            index: self._actors[index].load.remote(group, key) for index, group in enumerate(self._placement.groups)
        }
        found: dict[int, str] = {}
        while calls:
            index, call = next(iter(calls.items()))
            try:
                found |= self._wait_all([call], max(0.0, deadline - time.monotonic()), "load their shards")[0]
                del calls[index]
            except _ActorLostError as error:
                self._restart(index, error, 0, deadline)
                calls[index] = self._actors[index].load.remote(self._placement.groups[index], key)
        return found

    def begin(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> None:
        """See `Pool.begin`."""
        assert self._placement is not None, "start() comes first"
        for index in range(len(self._placement.actors)):
            if index not in self._actors:  # killed in an earlier round
                self._actors[index] = self._new_actor(index)
        self._round = _Round(
            keys=keys,
            params_ref=self._ray.put(params),
            groups=dict(members(self._placement.groups, cohort)),
            deadline=time.monotonic() + self._patience.round_timeout_s,
        )
        for index in self._round.groups:
            self._call(index)

    def collect(self) -> list[GroupResult]:
        """See `Pool.collect`."""
        current = self._round
        assert current is not None, "begin() comes first"
        results: dict[int, GroupResult] = {}
        while current.pending:
            left = max(0.0, current.deadline - time.monotonic())
            # On one machine there is nothing to fetch, and asking for it takes time.
            ready, _ = self._ray.wait(
                list(current.pending), num_returns=1, timeout=left, fetch_local=len(self._nodes) > 1
            )
            if not ready:
                self._give_up_on(current)
            for call in ready:
                index = current.pending.pop(call)
                try:
                    self._hardware[index], results[index] = self._ray.get(
                        call, timeout=max(1.0, current.deadline - time.monotonic())
                    )
                except self._ray.exceptions.GetTimeoutError:  # it is on a machine that joined since, and does not come
                    current.pending[call] = index
                    self._give_up_on(current)
                except self._ray.exceptions.RayTaskError as error:
                    raise self._failure(
                        error, list(current.pending), f"train round {current.keys.round_index}"
                    ) from None
                except self._ray.exceptions.RayError as error:
                    self._replace(index, error)
        self._round = None  # lets go of the broadcast parameters
        return [results[index] for index in sorted(results)]

    def close(self) -> None:
        """Stop the actors, and Ray if this pool started it."""
        if self._ray is None:
            return
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors = {}
        self._round = None
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _new_actor(self, index: int, anywhere: bool = False) -> Any:
        strategies = self._ray.util.scheduling_strategies
        assert self._placement is not None
        slot = self._placement.actors[index]
        strategy: Any = strategies.NodeAffinitySchedulingStrategy(self._nodes[slot.node].node_id, soft=True)
        if slot.bundle is not None:
            strategy = strategies.PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=slot.bundle
            )
        elif anywhere:  # its node may be gone; a node that joined later serves as well
            strategy = "SPREAD"
        options = {"num_cpus": slot.num_cpus, "num_gpus": slot.num_gpus, "scheduling_strategy": strategy}
        actor = self._ray.remote(_Actor).options(**options)
        return actor.remote(self._setup_ref, self._device, self._sharing[slot.bundle, slot.node])

    @property
    def _groups(self) -> tuple[range, ...]:
        assert self._placement is not None, "start() comes first"
        return self._placement.groups

    def _call(self, index: int) -> None:
        current = self._round
        assert current is not None
        call = self._actors[index].train.remote(current.keys, current.params_ref, current.groups[index])
        current.pending[call] = index

    def _replace(self, index: int, error: Any) -> None:
        """Start the lost group again with the same members and repeat its round, as often as patience allows.

        A gateway's round is a pure function of its key and inputs, so the repetition changes nothing.
        """
        current = self._round
        assert current is not None
        try:
            kind = self._restart(index, error, current.keys.round_index, current.deadline)
        except RunFailedError:
            self._stop(index)
            if not self._patience.drop:
                raise
            return
        if kind != self._kind:
            raise RunFailedError(
                f"the actor of {_names(self._groups[index])} came back on {kind} instead of {self._kind}, so results would "
                "depend on placement; use --device cpu, or free a GPU."
            )
        self._call(index)

    def _restart(self, index: int, error: Any, round_index: int, deadline: float) -> str:
        """Start an actor again after back-off, as often as --max-failures allows; return its kind of device."""
        names, allowed = _names(self._groups[index]), self._patience.max_failures
        while True:
            self._stop(index)
            self._failures += 1
            log.warning(
                "event=actor_lost round=%d gateways=%s failure=%d allowed=%d cause=%r",
                round_index, names.split()[-1], self._failures, allowed, _last_line(error),
            )  # fmt: skip
            if self._failures > allowed:
                raise RunFailedError(
                    f"the actor of {names} was lost in {f'round {round_index}' if round_index else 'the start'} "
                    f"({_last_line(error)}), and --max-failures {allowed} is used up; see why actors die, or raise it."
                )
            time.sleep(min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** min(self._failures - 1, 10)))
            self._actors[index] = self._new_actor(index, anywhere=True)
            limit = min(START_TIMEOUT_S, max(1.0, deadline - time.monotonic()))
            try:
                kind, self._hardware[index] = self._wait_all(
                    [self._actors[index].ready.remote()], limit, "start again"
                )[0]
                return str(kind)
            except _ActorLostError as again:
                error = again

    def _give_up_on(self, current: _Round) -> None:
        """Kill what has not answered in time; end the run, or go on without it."""
        late = sorted(current.pending.values())
        current.pending.clear()
        names = ", ".join(_names(self._groups[index]) for index in late)
        for index in late:
            self._stop(index)
            log.warning(
                "event=timeout round=%d gateways=%s limit_s=%g",
                current.keys.round_index, _names(self._groups[index]).split()[-1], self._patience.round_timeout_s,
            )  # fmt: skip
        if not self._patience.drop:
            raise RunFailedError(
                f"{names} did not finish round {current.keys.round_index} within --round-timeout "
                f"{self._patience.round_timeout_s:g} s; raise it, or use --on-failure drop to go on without them."
            )

    def _stop(self, index: int) -> None:
        actor = self._actors.pop(index, None)
        if actor is not None:
            self._ray.kill(actor)

    def _reserve_gpus(self, placement: Placement) -> None:
        bundles: dict[int, float] = {}
        for slot in placement.actors:
            assert slot.bundle is not None
            bundles[slot.bundle] = bundles.get(slot.bundle, 0.0) + slot.num_cpus
        gpus = placement.gpu_bundles
        wanted = [{"GPU": gpus[bundle], "CPU": round(cpus, 4)} for bundle, cpus in sorted(bundles.items())]
        self._group = self._ray.util.placement_group(wanted, strategy="PACK")
        if not self._group.wait(self._patience.placement_timeout_s):
            counts = Counter(f"{bundle['GPU']:g} of one GPU with {bundle['CPU']:g} CPU beside it" for bundle in wanted)
            needs = ", ".join(f"{count} × {what}" for what, count in counts.items())
            raise InputError(
                f"{len(placement.actors)} actors need {needs}, and did not get it within --placement-timeout "
                f"{self._patience.placement_timeout_s:g} s; free were {describe(self._nodes)}: free some, wait longer, or "
                "use --device cpu."
            )

    def _wait_all(self, calls: Sequence[Any], timeout_s: float | None, purpose: str) -> list[Any]:
        """Return the results of all calls in order; the first failure ends the wait."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pending, results = list(calls), {}
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = self._ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                raise RunFailedError(self._too_little(len(pending), timeout_s or 0.0, purpose))
            for call in ready:
                try:
                    results[call] = self._ray.get(call)
                except self._ray.exceptions.RayTaskError as error:
                    raise self._failure(error, pending, purpose) from None
                except self._ray.exceptions.RayError as error:
                    if "error raised in its creation task" in str(error):  # it would be raised again
                        raise RunFailedError(
                            f"an actor could not be created ({_last_line(error)}); what model, loss and shards import must "
                            "be importable where gateways run."
                        ) from None
                    raise _ActorLostError(_last_line(error)) from None
        return [results[call] for call in calls]

    def _too_little(self, missing: int, seconds: float, purpose: str) -> str:
        needs = self._placement.describe() if self._placement else "-"
        free = {
            name: value for name, value in self._ray.available_resources().items() if name in ("CPU", "GPU", "memory")
        }
        return (
            f"{missing} actors did not {purpose} within {seconds:g} s; needed are {needs}, free are {free}: free resources, "
            "or raise --gateways-per-actor."
        )

    def _failure(self, error: Any, pending: Sequence[Any], purpose: str) -> FedrayError:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, FedrayError):
            return RunFailedError(f"an actor failed to {purpose}: {_last_line(error)}")
        if not isinstance(cause, GatewayError) or not pending:
            return cause
        # Sixteen equal failures are one line: listen a moment for the others.
        ready, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=_FAILURE_GRACE_S)
        others = []
        for call in ready:
            try:
                self._ray.get(call)
            except self._ray.exceptions.RayError as other:
                if isinstance(getattr(other, "cause", None), GatewayError):
                    others.append(other)
        more = f" ({len(others)} more actors failed in the same round)" if others else ""
        return GatewayError(cause.message + more, cause.details)
