"""Everything that is fixed before the first round."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedray.algorithms.aggregation import Float32Array, Float64Array, Gathered
from fedray.algorithms.aggregator import Aggregator, combined
from fedray.algorithms.algorithm import apart
from fedray.algorithms.server_optimizer import ServerOptimizer, State
from fedray.config.settings import RunConfig
from fedray.config.user_code import code_digest
from fedray.data import inputs
from fedray.data.source import Federation
from fedray.errors import user_code
from fedray.models.layout import Layout
from fedray.pool.pool import FailurePolicy, Pool
from fedray.pool.worker import WorkerSetup, shard_mac
from fedray.privacy import accounting
from fedray.privacy.accounting import Charges
from fedray.privacy.levels import level_of
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import mac
from fedray.rundir.cards import delta_warnings
from fedray.tasks.classification import Classification
from fedray.tasks.task import Task
from fedray.training.engines import Isolation
from fedray.training.held_state import held_arrays
from fedray.training.trainer import LocalTraining

_HIGH_EPSILON = 20.0

_HIGH_NOISE_TO_SIGNAL = 10.0

_HINTED_EPSILONS = (1.0, 4.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is fixed before the first round.

    Args:
        config: With a resolved noise multiplier.
        setup_key: Key of everything drawn once.
        first_round_key: k_0 of a fresh run.
        spec: The public privacy constants.
        federation: The data.
        model: With its initial state.
        layout: Of its trainable parameters.
        training: How gateways train.
        task: What is learned.
        aggregator: How uploads become one.
        server_optimizer: How the average update moves the model.
        setup: What each actor gets.
        isolation: How records are kept apart.
    """

    config: RunConfig
    setup_key: bytes = field(repr=False)
    first_round_key: bytes = field(repr=False)
    spec: PrivacySpec
    federation: Federation
    model: torch.nn.Module
    layout: Layout
    training: LocalTraining
    task: Task
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    setup: WorkerSetup
    isolation: Isolation

    @property
    def class_labels(self) -> bool:
        """Whether targets are class indices."""
        return isinstance(self.task, Classification)

    @property
    def charges(self) -> Charges:
        """What the whole planned run will be charged."""
        rounds = self.config.federation.rounds
        return Charges(steps=rounds * self.spec.local_steps, rounds=rounds)

    def test_tensors(self) -> tuple[inputs.Inputs, torch.Tensor] | None:
        """Return the held-out data as tensors."""
        test = self.federation.test
        return None if test is None else (inputs.tensors(test[0]), torch.from_numpy(test[1].copy()))

    def constants(self) -> dict[str, Any]:
        """Return the public constants that decide what a round computes, for the digest of its inputs."""
        return {
            **self.spec.constants,
            "optimizer": self.training.optimizer,
            "lr": self.training.lr,
            "layout": self.layout.digest,
            "engine": self.setup.engine,
            "code": self._code,
            "program": None if self.setup.program is None else self.setup.program.digest,
        }

    @functools.cached_property
    def _code(self) -> str:
        own = [self.training.algorithm, self.spec.clipping, self.spec.noise_shape]
        return code_digest([self.training.loss, *own, *self.model.modules()])

    def warnings(self) -> list[str]:
        """Return what the user should know before training; may take seconds when it has to calibrate."""
        level = level_of(self.spec)
        if not level.is_private:
            return []
        found = []
        epsilon = accounting.first_epsilon(self.spec, self.charges)
        claims = level.claims(self.spec)
        claim = claims[0]
        if epsilon > _HIGH_EPSILON:
            found.append(
                f"the planned run ends at epsilon {epsilon:.0f} per {claim.unit} ({claim.adjacency}); above "
                f"{_HIGH_EPSILON:g} the promise is weak."
            )
        ratio = level.noise_to_signal(self.spec, self.layout.num_params)
        if ratio > _HIGH_NOISE_TO_SIGNAL:
            found.append(
                f"the noise is {ratio:.0f} times as long as the largest signal it hides; expect to learn little: use a "
                "smaller model, larger batches (sample) or more gateways (gateway)."
            )
        if found:
            sigmas = accounting.noise_multipliers_for(self.spec, self.charges, _HINTED_EPSILONS)
            hints = ", ".join(f"{sigma:.3g} for epsilon {epsilon:g}" for epsilon, sigma in sigmas.items())
            found.append(f"--noise-multiplier would have to be {hints}.")
        records, gateways = self.federation.nominal_records, self.config.federation.gateways
        return found + delta_warnings([claim.unit for claim in claims], self.spec.delta, records, gateways)

    def new_pool(self) -> Pool:
        """Return the pool of --pool, not yet started."""
        machine, federation = self.config.machine, self.config.federation
        where = (self.setup, federation.gateways, machine.gateways_per_actor, machine.device)
        if machine.pool == "inline":
            from fedray.pool.inline_pool import InlinePool  # so that a Ray run does not import it, and the reverse

            return InlinePool(*where)
        from fedray.pool.ray_pool import RayPool

        patience = FailurePolicy(
            max_failures=machine.max_failures,
            round_timeout_s=machine.round_timeout,
            placement_timeout_s=machine.placement_timeout,
            drop=federation.on_failure == "drop",
        )
        return RayPool(*where, machine.ray_address, patience)

    def server(
        self, params: Float32Array, released: Float64Array, uploads: Gathered, state: State
    ) -> tuple[Float32Array, State]:
        """Return the next parameters and the server's state from what a round released.

        Args:
            params: `[P]`.
            released: `[W]`, the average upload, noised at the `gateway` level; may be overwritten.
            uploads: What it is the average of; for aggregators in stack form.
            state: Of the round before.

        Raises:
            UserCodeError: An aggregator, algorithm or server optimizer raised, or returned something else.
        """
        algorithm = self.training.algorithm
        with user_code("aggregating the uploads failed"):
            if self.aggregator.form == "sum":
                found = self.aggregator.combine(released[None], np.ones(1))
            else:
                found = combined(self.aggregator, uploads.rows, uploads.weights) if uploads.rows else released
            params_found, state_found = algorithm.server(params, apart(algorithm, found), self.server_optimizer, state)
            if (
                not isinstance(params_found, np.ndarray)
                or params_found.dtype != np.float32
                or params_found.shape != params.shape
            ):
                raise TypeError(f"the server's parameters must be an array {params.shape} of float32")
            kept = {str(name): np.array(value) for name, value in state_found.items()}  # nobody changes it from outside
            if any(value.dtype.kind not in "fiub" for value in kept.values()):
                raise TypeError("the server's state must be arrays of numbers")
        return params_found, kept

    def identity(self, lazy_shards: dict[int, str]) -> dict[str, str]:
        """Return what must be the same when the run is resumed: digests of public parts, MACs of private ones.

        Args:
            lazy_shards: MACs of shards that were loaded where gateways train.
        """
        # Its structure as well: layers without parameters decide what it computes. Addresses differ in every process.
        structure = re.sub(r" at 0x[0-9a-f]+", "", repr(self.model)).encode()
        found = {"model": hashlib.sha256(_digest(self.model.state_dict().values()).encode() + structure).hexdigest()}
        loss = self.training.loss  # by its names, which are the same in every version of Python
        name, code = getattr(loss, "__name__", type(loss).__name__), getattr(loss, "__code__", None)
        found["loss"] = " ".join((name, *(() if code is None else code.co_names)))
        # As of shards: weights of classes may come from private counts.
        held = held_arrays(self.model, loss)
        found |= {part: mac(self.setup_key, b"held " + digest) for part, digest in held.items()}
        if self.federation.test is not None:
            x, y = self.federation.test
            parts = [torch.from_numpy(part) for part in (*inputs.leaves(x), y)]
            found["test data"] = _digest(parts, () if isinstance(x, np.ndarray) else inputs.leaf_names(x))
        if not self.federation.generated:
            macs = lazy_shards
            if not self.federation.lazy:
                macs = {
                    i: shard_mac(self.setup_key, *self.federation.shards[i])
                    for i in range(self.config.federation.gateways)
                }
            found |= {f"shard {index}": value for index, value in macs.items()}
        return found


def _digest(tensors: Iterable[torch.Tensor], names: Sequence[str] = ()) -> str:
    found = hashlib.sha256("".join(names).encode())
    for tensor in tensors:
        # contiguous() would leave expanded dimensions of size 1, whose bytes cannot be viewed
        values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        found.update(f"{values.dtype}{tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
