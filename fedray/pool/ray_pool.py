"""Gateways in Ray actors. The only module that imports Ray.

Actors are long-lived and get their setup once, from the object store. A round puts the parameters there once, calls each
actor once, and takes results as they become ready.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.aggregation import GroupResult
from fedray.errors import FedrayError, GatewayError, InputError, RunFailedError
from fedray.pool.placement import Node, Placement, place
from fedray.pool.pool import Patience, PoolInfo, members
from fedray.pool.worker import Worker, WorkerSetup, resolve_device
from fedray.streams import RoundKeys


def _import_ray() -> Any:
    # A local Ray would otherwise write a token file into the home directory and warn about it at each start.
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _check_reachable(address: str) -> None:
    """Raise InputError when nothing listens at host:port; Ray itself would try for minutes and then end the process."""
    if address.startswith("ray://"):
        raise InputError(
            f"--ray-address {address} is Ray Client, which is too slow for fedray; give the cluster's own host:port, or "
            "start the run with `ray job submit`."
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "local" or "auto"; Ray answers at once for anything else
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"--ray-address {address} cannot be reached ({error}); start a cluster there, or leave it out."
        ) from error


def _last_line(error: object) -> str:
    return str(error).strip().splitlines()[-1].strip()


log = logging.getLogger("fedray")
START_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
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

    def ready(self) -> str:
        """Build the worker (not in the constructor, whose errors Ray reports as deaths); return its kind of device."""
        torch.set_num_threads(1)
        setup, name, sharing = self._arguments
        device = resolve_device(name)
        self._worker = Worker(setup, device, sharing)
        return device.type

    def load(self, gateways: Sequence[int], key: bytes) -> dict[int, str]:
        """See `Worker.load`."""
        return self._built().load(gateways, key)

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]) -> GroupResult:
        """See `Worker.train`."""
        return self._built().train(keys, params, gateways)

    def _built(self) -> Worker:
        assert self._worker is not None, "ready() comes first"
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
        self._owns_ray = False
        self._placement: Placement | None = None
        self._group: Any = None
        self._patience = patience
        self._actors: dict[int, Any] = {}
        self._failures = 0
        self._setup_ref: Any = None
        self._sharing: Counter[tuple[int | None, int]] = Counter()
        self._round: _Round | None = None

    def connect(self) -> Placement:
        """Connect to Ray, or start it, and place the actors without starting them.

        Raises:
            InputError: No such cluster, or the gateways do not fit on it.
        """
        self._ray = ray = _import_ray()
        if not ray.is_initialized():
            address = self._address or os.environ.get("RAY_ADDRESS") or "local"
            _check_reachable(address)
            options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            terminate = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"--ray-address {address} cannot be reached ({error}); start a cluster there, or leave it out."
                ) from error
            self._owns_ray = True
            if callable(terminate) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place, which prints and exits with 15
        nodes = [
            Node(
                node_id=node["NodeID"],
                num_cpus=node["Resources"].get("CPU", 0.0),
                num_gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        has_gpus = any(node.num_gpus >= 1 for node in nodes)
        if self._device == "cuda" and not has_gpus:
            raise InputError("--device is cuda but the cluster has no GPU; use --device cpu or auto.")
        self._placement = place(
            self._gateways, nodes, self._gateways_per_actor, use_gpus=has_gpus and self._device != "cpu"
        )
        self._nodes = nodes
        return self._placement

    def describe(self) -> str:
        """See `Pool.describe`."""
        return self.connect().describe()

    def start(self) -> PoolInfo:
        """Start all actors and wait until they are ready."""
        placement = self._placement or self.connect()
        if any(slot.bundle is not None for slot in placement.actors):
            self._reserve_gpus(placement)
        self._setup_ref = self._ray.put(self._setup)
        self._sharing = Counter((slot.bundle, slot.node) for slot in placement.actors)
        for index in range(len(placement.actors)):
            self._actors[index] = self._new_actor(index)
        ready = {index: actor.ready.remote() for index, actor in self._actors.items()}
        kinds = set()
        for index, call in ready.items():
            try:
                kinds |= set(self._wait_all([call], START_TIMEOUT_S, "start"))
            except _ActorLostError as error:
                kinds.add(self._restart(index, error, "the start", time.monotonic() + START_TIMEOUT_S))
        if len(kinds) != 1:
            raise InputError(
                f"actors found different devices ({', '.join(sorted(kinds))}), so results would depend on placement; "
                "use --device cpu."
            )
        device = kinds.pop()
        return PoolInfo(
            summary=f"{placement.describe()}, on {device}, 1 thread each, on {len(self._nodes)} "
            f"node{'s' * (len(self._nodes) > 1)}",
            groups=placement.groups,
            device=device,
        )

    def load(self, key: bytes) -> dict[int, str]:
        """See `Pool.load`."""
        assert self._placement is not None, "start() comes first"
        calls = [self._actors[index].load.remote(group, key) for index, group in enumerate(self._placement.groups)]
        found: dict[int, str] = {}
        for part in self._wait_all(calls, max(START_TIMEOUT_S, self._patience.round_timeout_s), "load their shards"):
            found |= part
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
            ready, _ = self._ray.wait(list(current.pending), num_returns=1, timeout=left)
            if not ready:
                self._give_up_on(current)
            for call in ready:
                index = current.pending.pop(call)
                try:
                    results[index] = self._ray.get(call)
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
        if self._owns_ray:
            self._ray.shutdown()
            self._owns_ray = False

    def _new_actor(self, index: int, anywhere: bool = False) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        assert self._placement is not None
        slot = self._placement.actors[index]
        strategy: Any = NodeAffinitySchedulingStrategy(self._nodes[slot.node].node_id, soft=True)
        if slot.bundle is not None:
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle)
        elif anywhere:  # its node may be gone; a node that joined later serves as well
            strategy = "SPREAD"
        options = {"num_cpus": slot.num_cpus, "num_gpus": slot.num_gpus, "scheduling_strategy": strategy}
        actor = self._ray.remote(_Actor).options(**options)
        return actor.remote(self._setup_ref, self._device, self._sharing[slot.bundle, slot.node])

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
            self._restart(index, error, f"round {current.keys.round_index}", current.deadline)
        except RunFailedError:
            if not self._patience.drop:
                raise
            return
        self._call(index)

    def _restart(self, index: int, error: Any, when: str, deadline: float) -> str:
        """Start an actor again after back-off, as often as --max-failures allows; return its kind of device."""
        assert self._placement is not None
        group = self._placement.groups[index]
        names = f"{group.start}-{group.stop - 1}"
        while True:
            self._stop(index)
            self._failures += 1
            log.warning(
                "when=%r gateways=%s event=actor_lost failure=%d/%d cause=%r",
                when, names, self._failures, self._patience.max_failures, _last_line(error),
            )  # fmt: skip
            if self._failures > self._patience.max_failures:
                raise RunFailedError(
                    f"the actor of gateways {names} was lost in {when} ({_last_line(error)}), and --max-failures "
                    f"{self._patience.max_failures} is used up; see why actors die, or raise it."
                )
            time.sleep(min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** (self._failures - 1)))
            self._actors[index] = self._new_actor(index, anywhere=True)
            limit = min(START_TIMEOUT_S, max(1.0, deadline - time.monotonic()))
            try:
                return str(self._wait_all([self._actors[index].ready.remote()], limit, "start again")[0])
            except _ActorLostError as again:
                error = again

    def _give_up_on(self, current: _Round) -> None:
        """Kill what has not answered in time; end the run, or go on without it."""
        late = sorted(current.pending.values())
        current.pending.clear()
        names = ", ".join(f"{current.groups[index][0]}-{current.groups[index][-1]}" for index in late)
        for index in late:
            self._stop(index)
        log.warning("round=%d gateways=%s event=timeout", current.keys.round_index, names)
        if not self._patience.drop:
            raise RunFailedError(
                f"gateways {names} did not finish round {current.keys.round_index} within --round-timeout "
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
        wanted = [{"GPU": 1, "CPU": round(cpus, 4)} for _, cpus in sorted(bundles.items())]
        self._group = self._ray.util.placement_group(wanted, strategy="PACK")
        ready, _ = self._ray.wait([self._group.ready()], timeout=START_TIMEOUT_S)
        if not ready:
            raise InputError(
                f"{len(wanted)} whole GPUs with {wanted[0]['CPU']:g} CPU each are needed, free are "
                f"{self._ray.available_resources()}; free some, or raise --gateways-per-actor."
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
