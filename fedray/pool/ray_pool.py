"""Gateways in Ray actors. The only module that imports Ray.

Actors are long-lived and get their setup once, from the object store. A round puts the parameters there once, calls each
actor once, and takes results as they become ready.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.errors import FedrayError, GatewayError, InputError, RunFailedError
from fedray.pool.placement import Node, Placement, place
from fedray.pool.pool import PoolInfo, members
from fedray.pool.worker import GroupResult, Worker, WorkerSetup, resolve_device
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


START_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
_FAILURE_GRACE_S = 1.0  # how long to listen for the same failure from other actors


class _Actor:
    """Hosts a group of gateways in a Ray process."""

    def __init__(self, setup: WorkerSetup, device: str, sharing: int) -> None:
        torch.set_num_threads(1)
        self._device = resolve_device(device)
        self._worker = Worker(setup, self._device, sharing)

    def ready(self) -> str:
        """Return the kind of device that this actor trains on."""
        return self._device.type

    def load(self, gateways: Sequence[int]) -> None:
        """See `Worker.load`."""
        self._worker.load(gateways)

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]) -> GroupResult:
        """See `Worker.train`."""
        return self._worker.train(keys, params, gateways)


class RayPool:
    """Trains groups of gateways in parallel, one actor a group.

    Args:
        setup: See `WorkerSetup`.
        gateways: How many.
        gateways_per_actor: "auto" or a number.
        device: --device.
        address: --ray-address; None for RAY_ADDRESS if set, else a local Ray.
    """

    def __init__(
        self, setup: WorkerSetup | None, gateways: int, gateways_per_actor: int | str, device: str, address: str | None
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
        self._actors: list[Any] = []

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
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"--ray-address {address} cannot be reached ({error}); start a cluster there, or leave it out."
                ) from error
            self._owns_ray = True
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
        ray = self._ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        if any(slot.bundle is not None for slot in placement.actors):
            self._reserve_gpus(placement)
        try:
            setup_ref = ray.put(self._setup)
        except TypeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"model, loss or shards cannot be sent to actors ({reason}); open files and connections where a shard is "
                "loaded, not before."
            ) from error
        remote = ray.remote(_Actor)
        sharing = Counter((slot.bundle, slot.node) for slot in placement.actors)
        for slot in placement.actors:
            strategy = (
                PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle)
                if slot.bundle is not None
                else NodeAffinitySchedulingStrategy(self._nodes[slot.node].node_id, soft=True)
            )
            options = {"num_cpus": slot.num_cpus, "num_gpus": slot.num_gpus, "scheduling_strategy": strategy}
            self._actors.append(
                remote.options(**options).remote(setup_ref, self._device, sharing[slot.bundle, slot.node])
            )
        kinds = set(self._wait_all([actor.ready.remote() for actor in self._actors], START_TIMEOUT_S, "start"))
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

    def load(self) -> None:
        """Load and check the shards in the actors."""
        groups = self._placement.groups if self._placement else ()
        calls = [actor.load.remote(group) for actor, group in zip(self._actors, groups, strict=True)]
        self._wait_all(calls, None, "load their shards")

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], cohort: Sequence[int]) -> Sequence[GroupResult]:
        """See `Pool.train`."""
        assert self._placement is not None, "start() comes first"
        params_ref = self._ray.put(params)
        calls = [
            self._actors[index].train.remote(keys, params_ref, ids)
            for index, ids in members(self._placement.groups, cohort)
        ]
        return self._wait_all(calls, None, f"train round {keys.round_index}")

    def close(self) -> None:
        """Stop the actors, and Ray if this pool started it."""
        if self._ray is None:
            return
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._owns_ray:
            self._ray.shutdown()
            self._owns_ray = False

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
                raise RunFailedError(
                    f"{len(pending)} of {len(calls)} actors did not {purpose} within {timeout_s:g} s; needed are "
                    f"{self._placement.describe() if self._placement else '-'}, free are "
                    f"{self._ray.available_resources()}: free resources, or raise --gateways-per-actor."
                )
            for call in ready:
                try:
                    results[call] = self._ray.get(call)
                except self._ray.exceptions.RayError as error:
                    raise self._failure(error, pending, purpose) from None
        return [results[call] for call in calls]

    def _failure(self, error: Any, pending: Sequence[Any], purpose: str) -> FedrayError:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, FedrayError):
            return RunFailedError(f"an actor failed to {purpose}: {str(error).strip().splitlines()[-1]}")
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
