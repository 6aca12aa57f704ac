"""Gives every attack the run's own trainer, shards, keys and constants, and the number of runs it may play."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import gather
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.server_optimizer import State
from fedray.data.shards import Shard, ShardCache
from fedray.errors import InputError
from fedray.orchestrator.charged_rounds import participation
from fedray.orchestrator.plan import Plan
from fedray.pool import worker
from fedray.privacy import mechanism
from fedray.privacy.levels import Adjacency, level_of
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys, derive_key, numpy_generator
from fedray.privacy.tally import ranges_of
from fedray.training import engines
from fedray.training.trainer import GatewayShards, LocalTraining, Trainer

Float32Array = npt.NDArray[np.float32]
_PILOT_RUNS = 64
_PART_BYTES = 64 * 2**20  # of updates at a time
_FEWEST_RUNS = 300  # half the noise is caught with so many
_TRAINED_ROUNDS = 3  # before the attacks: what is zero at the start (gates, LoRA) has moved by then
_TRAINED_GATEWAYS = 64
LARGEST_PLAYABLE_MU = 3.0  # above it two worlds are told apart nearly always, so that counting cannot tell how well
QUIET = 1e-9  # a noise multiplier that stands for none


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much an audit tries.

    Args:
        runs: The most runs that an attack plays with its canary, and again without.
        game_seconds: Time that one attack may take; fewer runs are played where each is slow.
        training_seconds: Time for the training before the attacks; fewer rounds are trained where it is slow.
        trials: Groups of uploads that the outlier report looks at.
    """

    runs: int
    game_seconds: float
    training_seconds: float
    trials: int


DEFAULT = Effort(runs=5000, game_seconds=5.0, training_seconds=5.0, trials=24)
THOROUGH = Effort(runs=40_000, game_seconds=60.0, training_seconds=30.0, trials=150)


class SameShard:
    """Gives every gateway the same shard: each gateway is one more repetition, with noise and batches of its own."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def __getitem__(self, gateway: int, /) -> Shard:
        return self._shard


class Lab:
    """The run under attack.

    Args:
        plan: The run's own plan; nothing is charged by it.
        effort: How much to try.

    Raises:
        InputError: Its algorithm uploads more than an update.
    """

    def __init__(self, plan: Plan, effort: Effort) -> None:
        if len(plan.training.algorithm.uploads) != 1:
            raise InputError(
                f"--algorithm {plan.config.federation.algorithm} uploads {', '.join(plan.training.algorithm.uploads)}; audit "
                "attacks algorithms that upload the update alone."
            )
        self.plan = plan
        self.effort = effort
        self.spec = plan.spec
        self.num_params = plan.layout.num_params
        self.device = worker.resolve_device(plan.config.machine.device)
        self.shards = ShardCache(plan.setup.shards, plan.setup.rules)
        self.warm_model: torch.nn.Module | None = None  # see scenes.warmed_up

    @property
    def clip_norm(self) -> float:
        """C."""
        return self.spec.clip_norm

    @property
    def sigma(self) -> float:
        """The claimed noise multiplier; claims are computed from it, bounds never."""
        return self.spec.charged_multiplier

    @property
    def by_record(self) -> bool:
        """Whether single records are clipped."""
        return level_of(self.spec).local == "record"

    @property
    def divisor(self) -> float:
        """What a local step divides its noised sum by."""
        return float(self.spec.batch_size) if self.by_record else 1.0

    @property
    def adjacency(self) -> Adjacency:
        """The neighbouring relation of the level's first claim."""
        return level_of(self.spec).claims(self.spec)[0].adjacency

    @cached_property
    def params(self) -> Float32Array:
        """Parameters `[P]` after a few rounds of the run itself, noise and all: attacks on initial ones miss what grows."""
        initial = self.plan.layout.flatten(self.plan.model)
        trainer = worker.Worker(replace(self.plan.setup, max_update_norm=None), self.device)
        cohort = range(min(self.plan.config.federation.gateways, _TRAINED_GATEWAYS))
        params, keys, start = initial, self.keys("trained"), time.perf_counter()
        state: State = {}
        for _ in range(min(_TRAINED_ROUNDS, self.plan.config.federation.rounds)):
            uploads = gather([trainer.train(keys, params, cohort)], self.plan.layout, torch.device("cpu"))
            arrived = ranges_of(uploads.arrived)
            released = mechanism.aggregate(self.spec, keys, uploads.total, uploads.weight, arrived)
            params, state = self.plan.server(params, released, uploads, state)
            keys = keys.following()
            if time.perf_counter() - start > self.effort.training_seconds:
                break
        return params if np.isfinite(params).all() else initial

    @cached_property
    def model(self) -> torch.nn.Module:
        """A copy of the model that holds `params`."""
        model = copy.deepcopy(self.plan.model)
        self.plan.layout.load(model, self.params)
        return model

    def trainer(self, spec: PrivacySpec, plain_steps: float | None = None) -> Trainer:
        """Return the run's trainer.

        Args:
            spec: Public constants (the run's, or with other steps or rate).
            plain_steps: Learning rate of plain SGD in place of the run's optimizer: then the update shows what was released.
        """
        setup = self.plan.setup
        training = self.training(spec, plain_steps)
        return engines.new_trainer(setup.engine, setup.model, training, self.device, program=setup.program)

    def training(self, spec: PrivacySpec, plain_steps: float | None = None) -> LocalTraining:
        """Return how gateways train, as `trainer` takes it."""
        # What an algorithm makes of released gradients is post-processing: attacks read them as FedAvg uploads them.
        training = replace(self.plan.training, privacy=spec, algorithm=FedAvg())
        return training if plain_steps is None else replace(training, optimizer="sgd", lr=plain_steps)

    def keys(self, attack: str, number: int = 0, round_index: int = 1) -> RoundKeys:
        """Return keys that no run and no other attack uses."""
        return RoundKeys(
            round_key=derive_key(self.plan.first_round_key, f"audit {attack}", number), round_index=round_index
        )

    def cohort(self, keys: RoundKeys) -> Sequence[int]:
        """Return the gateways that the run would draw for this attempt at a round."""
        return participation(self.plan, keys)

    def train(
        self, trainer: Trainer, keys: RoundKeys, gateways: int, shards: GatewayShards
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Train gateways 0, 1, … and yield their updates in parts `[n, P]` that fit into memory."""
        together = max(1, _PART_BYTES // (4 * self.num_params))
        for first in range(0, gateways, together):
            yield trainer.train(keys, self.params, range(first, min(first + together, gateways)), shards)

    def rng(self, attack: str) -> np.random.Generator:
        """Return the attacker's own draws."""
        return numpy_generator(self.plan.first_round_key, f"audit draws {attack}")

    def affordable_runs(self, play: Callable[[int], object]) -> int:
        """Return how many runs a world fit into the game's time, from a pilot that is thrown away.

        The number depends on the clock alone, never on what was released.
        """
        play(2)  # what is slow only once
        fixed = _seconds(play, 2)
        each = max(1e-9, _seconds(play, 2 + _PILOT_RUNS) - fixed) / _PILOT_RUNS
        return int(min(self.effort.runs, max(_FEWEST_RUNS, self.effort.game_seconds / each)))

    def attacked_steps(self, most: int, at_least: int = 1) -> int:
        """Return how many steps or rounds to attack so that mu = sqrt(n)/sigma comes near 1, at most `most`."""
        return max(1, min(most, max(at_least, round(self.sigma**2))))


def _seconds(play: Callable[[int], object], runs: int) -> float:
    start = time.perf_counter()
    play(runs)
    return time.perf_counter() - start
