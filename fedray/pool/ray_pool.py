"""Runs gateways in Ray actors.

Actors are long-lived and get their setup once, from the object store. A round puts the parameters there once, calls each
actor once, and takes results as they become ready.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.algorithms.aggregation import GroupResult
from fedray.errors import InputError, RunFailedError
from fedray.pool import connection
from fedray.pool.machines import describe, machines_of, survey
from fedray.pool.placement import place
from fedray.pool.pool import FailurePolicy, Inspection, PoolInfo, cohort_by_group
from fedray.pool.ray_actors import START_TIMEOUT_S, ActorLostError, RayActors, last_line, names_of
from fedray.pool.watch import Watch, watched
from fedray.pool.worker import WorkerSetup
from fedray.privacy.streams import RoundKeys

log = logging.getLogger("fedray")
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.1, 5.0
CLOSE_TIMEOUT_S = 20.0


@dataclass
class _Round:
    """A round under way.

    Args:
        keys: Of the attempt.
        params_ref: The broadcast parameters in the object store.
        groups: Gateways of each group that takes part.
        deadline: Monotonic time at which the round times out.
        pending: The group of each call that has not answered.
    """

    keys: RoundKeys
    params_ref: Any
    groups: dict[int, list[int]]
    deadline: float
    pending: dict[Any, int] = field(default_factory=dict)


class RayPool:
    """Trains groups of gateways in parallel, one actor a group.

    Args:
        setup: See `WorkerSetup`.
        gateways: How many.
        gateways_per_actor: "auto" or a number.
        device: --device.
        address: --ray-address; None for RAY_ADDRESS if set, else a local Ray.
        patience: How failures are treated.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        gateways: int,
        gateways_per_actor: int | str,
        device: str,
        address: str | None,
        patience: FailurePolicy,
    ) -> None:
        self._setup = setup
        self._gateways = gateways
        self._gateways_per_actor = gateways_per_actor
        self._device = device
        self._address = address
        self._ray: Any = None
        self._connection: connection.Connection | None = None
        self._patience = patience
        self._actors: RayActors | None = None
        self._failures = 0
        self._kind = ""
        self._round: _Round | None = None
        self.watch = Watch()

    def say_at_the_end(self, remedy: str) -> None:
        """See `Pool.say_at_the_end`."""
        self.watch.remedy = remedy

    @watched("answer", lambda pool: START_TIMEOUT_S)
    def connect(self) -> RayActors:
        """Connect to Ray, or start it, and place the actors without starting them.

        Raises:
            InputError: No such cluster, or the gateways do not fit on it.
        """
        self._connection = connection.connect(self._address)
        self._ray = ray = self._connection.ray
        if self._connection.local:
            self.watch.processes(ray)
        self._nodes = machines_of(ray)
        has_gpus = any(machine.num_gpus >= 1 for machine in self._nodes)
        if self._device == "cuda" and not has_gpus:
            raise InputError("--device is cuda but the cluster has no GPU; use --device cpu or auto.")
        free = [machine.free for machine in self._nodes]
        try:
            placement = place(
                self._gateways, free, self._gateways_per_actor, use_gpus=has_gpus and self._device != "cpu"
            )
        except InputError as error:
            if all(machine.is_idle for machine in self._nodes):
                raise
            raise InputError(f"{str(error).removesuffix('.')} (free are {describe(self._nodes)}).") from None
        self._actors = RayActors(ray, self._nodes, placement, self._device, self._patience.placement_timeout_s)
        return self._actors

    def describe(self) -> str:
        """See `Pool.describe`."""
        return self.connect().placement.describe()

    @watched("survey its machines", lambda pool: pool._patience.placement_timeout_s + 2 * START_TIMEOUT_S)
    def inspect(self, modules: Sequence[str], marker: Path | None) -> Inspection:
        """See `Pool.inspect`."""
        (self._actors or self.connect()).reserve_gpus()
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

    @watched("start its actors", lambda pool: pool._patience.placement_timeout_s + 2 * START_TIMEOUT_S)
    def start(self) -> PoolInfo:
        """Start all actors and wait until they are ready."""
        actors = self._actors or self.connect()
        actors.reserve_gpus()
        actors.take_setup(self._setup)
        groups = range(len(actors.placement.actors))
        for index in groups:
            actors.start(index)
        ready = {index: actors.by_group[index].ready.remote() for index in groups}
        kinds = set()
        for index, call in ready.items():
            try:
                kind, actors.hardware[index] = actors.wait_all([call], START_TIMEOUT_S, "start")[0]
            except ActorLostError as error:
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
        actors = self._started
        placement = actors.placement
        hosts = len({slot.node for slot in placement.actors})
        return PoolInfo(
            summary=f"{placement.describe()}, on {self._kind}, 1 thread each, on {hosts} node{'s' * (hosts > 1)}",
            groups=placement.groups,
            device=self._kind,
            hardware=tuple(actors.hardware[index] for index in range(len(placement.actors))),
        )

    @watched("load the shards", lambda pool: max(START_TIMEOUT_S, pool._patience.round_timeout_s))
    def load(self, key: bytes) -> dict[int, str]:
        """See `Pool.load`."""
        actors = self._started
        limit = max(START_TIMEOUT_S, self._patience.round_timeout_s)
        deadline = time.monotonic() + limit
        groups = actors.placement.groups
        calls = {index: actors.by_group[index].load.remote(group, key) for index, group in enumerate(groups)}
        found: dict[int, str] = {}
        while calls:
            index, call = next(iter(calls.items()))
            try:
                found |= actors.wait_all([call], max(0.0, deadline - time.monotonic()), "load their shards")[0]
                del calls[index]
            except ActorLostError as error:
                self._restart(index, error, 0, deadline)
                calls[index] = actors.by_group[index].load.remote(groups[index], key)
        return found

    @watched("begin the round", lambda pool: pool._patience.round_timeout_s)
    def begin(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> None:
        """See `Pool.begin`."""
        actors = self._started
        for index in range(len(actors.placement.actors)):
            if index not in actors.by_group:  # killed in an earlier round
                actors.start(index)
        self._round = _Round(
            keys=keys,
            params_ref=self._ray.put(params),
            groups=dict(cohort_by_group(actors.placement.groups, cohort)),
            deadline=time.monotonic() + self._patience.round_timeout_s,
        )
        for index in self._round.groups:
            self._call(index)

    @watched("finish the round", lambda pool: pool._left())
    def collect(self) -> list[GroupResult]:
        """See `Pool.collect`."""
        current, actors = self._round, self._started
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
                    actors.hardware[index], results[index] = self._ray.get(
                        call, timeout=max(1.0, current.deadline - time.monotonic())
                    )
                except self._ray.exceptions.GetTimeoutError:  # it is on a machine that joined since, and does not come
                    current.pending[call] = index
                    self._give_up_on(current)
                except self._ray.exceptions.RayTaskError as error:
                    raise actors.failure(
                        error, list(current.pending), f"train round {current.keys.round_index}"
                    ) from None
                except self._ray.exceptions.RayError as error:
                    self._replace(index, error)
        self._round = None  # lets go of the broadcast parameters
        return [results[index] for index in sorted(results)]

    @watched("stop", lambda pool: CLOSE_TIMEOUT_S)
    def close(self) -> None:
        """Stop the actors, and Ray if this pool started it."""
        if self._actors is not None:
            self._actors.close()
            self._actors = None
        self._round = None
        if self._connection is not None:
            self.watch.close_processes()
            self._connection.close()
            self._connection = None
        self.watch.close()

    def _left(self) -> float:
        return 0.0 if self._round is None else max(0.0, self._round.deadline - time.monotonic())

    def _names(self, index: int) -> str:
        return names_of(self._started.placement.groups[index])

    @property
    def _started(self) -> RayActors:
        assert self._actors is not None, "start() comes first"
        return self._actors

    def _call(self, index: int) -> None:
        current = self._round
        assert current is not None
        call = self._started.by_group[index].train.remote(current.keys, current.params_ref, current.groups[index])
        current.pending[call] = index

    def _replace(self, index: int, error: Any) -> None:
        """Start the lost group again with the same members and repeat its round, as often as --max-failures allows.

        A gateway's round is a pure function of its key and inputs, so the repetition changes nothing.
        """
        current = self._round
        assert current is not None
        try:
            kind = self._restart(index, error, current.keys.round_index, current.deadline)
        except RunFailedError:
            self._started.stop(index)
            if not self._patience.drop:
                raise
            return
        if kind != self._kind:
            raise RunFailedError(
                f"the actor of {self._names(index)} came back on {kind} instead of {self._kind}, so results would "
                "depend on placement; use --device cpu, or free a GPU."
            )
        self._call(index)

    def _restart(self, index: int, error: Any, round_index: int, deadline: float) -> str:
        """Start an actor again after back-off, as often as --max-failures allows; return its kind of device."""
        actors = self._started
        names, allowed = names_of(actors.placement.groups[index]), self._patience.max_failures
        while True:
            actors.stop(index)
            self._failures += 1
            log.warning(
                "event=actor_lost round=%d gateways=%s failure=%d allowed=%d cause=%r",
                round_index, names.split()[-1], self._failures, allowed, last_line(error),
            )  # fmt: skip
            if self._failures > allowed:
                raise RunFailedError(
                    f"the actor of {names} was lost in {f'round {round_index}' if round_index else 'the start'} "
                    f"({last_line(error)}), and --max-failures {allowed} is used up; see why actors die, or raise it."
                )
            time.sleep(min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** min(self._failures - 1, 10)))
            actors.start(index, anywhere=True)
            limit = min(START_TIMEOUT_S, max(1.0, deadline - time.monotonic()))
            try:
                call = actors.by_group[index].ready.remote()
                kind, actors.hardware[index] = actors.wait_all([call], limit, "start again")[0]
                return str(kind)
            except ActorLostError as again:
                error = again

    def _give_up_on(self, current: _Round) -> None:
        """Kill what has not answered in time; end the run, or go on without it."""
        late = sorted(current.pending.values())
        current.pending.clear()
        names = ", ".join(self._names(index) for index in late)
        for index in late:
            self._started.stop(index)
            log.warning(
                "event=timeout round=%d gateways=%s limit_s=%g",
                current.keys.round_index, self._names(index).split()[-1], self._patience.round_timeout_s,
            )  # fmt: skip
        if not self._patience.drop:
            raise RunFailedError(
                f"{names} did not finish round {current.keys.round_index} within --round-timeout "
                f"{self._patience.round_timeout_s:g} s; raise it, or use --on-failure drop to go on without them."
            )
