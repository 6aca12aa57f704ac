"""What is trained when a family is measured: its model, the gateways' shards and the settings, the same for all systems.

It must not know the systems, other than what fedray itself makes of the job (`Job.plan`).
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from families.family import Family, class_losses
from fedray.config.settings import RunConfig
from fedray.data.inputs import arrays, on, tensors
from fedray.data.shards import Shard, as_arrays
from fedray.errors import FedrayError
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.pool.worker import memory_share
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.tasks.classification import Classification
from fedray.tasks.own_loss import OwnLoss
from fedray.training.engines import new_trainer
from fedray.training.trainer import Trainer

CPU = torch.device("cpu")
GATEWAYS, BATCH, RECORDS, LR = 16, 32, 512, 1e-3
SEED = 17
_PLANNED = 2  # gateways of a plan: the engine that it chooses does not depend on how many there are


class Refused(RuntimeError):
    """A system does not train this family; the message is its reason in one line."""


def reason(error: BaseException) -> str:
    """Return an error as one line of bounded length for tables."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, FedrayError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:300]


class Job:
    """A family's model, shards and settings.

    Args:
        family: What is trained.
        gateways: How many.
        local_steps: None for the family's own.
        num_shards: How many shards differ; gateways past that many hold the same records again, which spares memory.
        device: Where it is trained.
        batch: B, the expected records of a step.
    """

    def __init__(
        self,
        family: Family,
        gateways: int = GATEWAYS,
        local_steps: int | None = None,
        num_shards: int = GATEWAYS,
        device: torch.device = CPU,
        batch: int = BATCH,
    ) -> None:
        self.family = family
        self.gateways = gateways
        self.local_steps = family.local_steps if local_steps is None else local_steps
        self.device = device
        self.batch = batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self._model = family.build().train()
        generator = torch.Generator().manual_seed(SEED)
        own = [_shard(family, generator) for _ in range(min(num_shards, gateways))]
        self.shards = [own[gateway % len(own)] for gateway in range(gateways)]

    @property
    def samples(self) -> int:
        """Expected records a round."""
        return self.gateways * self.local_steps * self.batch

    @property
    def privacy(self) -> PrivacySpec:
        """The public constants, as fedray would set them."""
        return PrivacySpec(
            noise_level="sample",
            noise_multiplier=1.0,
            clip_norm=1.0,
            delta=1e-5,
            batch_size=self.batch,
            sample_rate=self.batch / RECORDS,
            local_steps=self.local_steps,
            expected_cohort=float(self.gateways),
        )

    def model(self) -> nn.Module:
        """Return a copy of the model with its initial state, on the CPU."""
        return copy.deepcopy(self._model)

    def shared_batch(self) -> Shard:
        """Return the one large batch that is trained on without privacy, on the device."""
        x, y = self.family.records(self.family.shared_batch, torch.Generator().manual_seed(SEED))
        return Shard(x=on(x, self.device), y=y.to(self.device))

    def shards_on_device(self) -> list[Shard]:
        """Return every gateway's records on the device, each shard copied once."""
        copies = {id(shard): shard for shard in self.shards}
        there = {key: Shard(x=on(one.x, self.device), y=one.y.to(self.device)) for key, one in copies.items()}
        return [there[id(shard)] for shard in self.shards]

    def plan(self) -> Plan:
        """Return what a fedray run would do with this job: its checks, its choice of engine.

        Raises:
            Refused: fedray does not take the family.
        """
        config = RunConfig().resolve(
            gateways=_PLANNED,
            local_steps=self.local_steps,
            batch_size=self.batch,
            lr=LR,
            noise_multiplier=1.0,
            samples_per_gateway=RECORDS,
            pool="inline",
            device="cpu",
            seed=SEED,
        )
        some = [self.shards[gateway % len(self.shards)] for gateway in range(_PLANNED)]
        shards = [(arrays(shard.x), shard.y.numpy()) for shard in some]
        task = None if self.family.loss is class_losses else OwnLoss(self.family.loss)
        try:
            return prepare(config, UserParts(shards=shards, model=self.model, task=task))
        except Exception as error:  # whatever stops a run before it starts
            raise Refused(reason(error)) from error


def _shard(family: Family, generator: torch.Generator) -> Shard:
    task = Classification() if family.loss is class_losses else OwnLoss(family.loss)
    x, y = as_arrays(family.records(RECORDS, generator), "records", task)  # sorts names, as a run
    return Shard(x=tensors(x), y=torch.from_numpy(y))


def trainer_of(plan: Plan, device: torch.device) -> Trainer:
    """Return the trainer that fedray itself would take for a plan, with an only actor's memory limit."""
    limit = memory_share(device, 1) // 2
    return new_trainer(plan.setup.engine, plan.model, plan.training, device, limit, plan.setup.program)


def new_keys() -> RoundKeys:
    """Return the keys of a round that nobody has seen."""
    return RoundKeys(round_key=secrets.token_bytes(32), round_index=1)


def batches(privacy: PrivacySpec, keys: RoundKeys, gateway: int) -> Iterator[torch.Tensor]:
    """Yield the record indices of each local step: those that fedray draws under the same keys."""
    drawn, sizes = PoissonSampler(privacy, keys, gateway).batches(range(privacy.local_steps), RECORDS)
    for chosen in np.split(drawn, np.cumsum(sizes)[:-1]):
        if len(chosen):  # Opacus' hooks fail on empty batches of some layers; at B = 32 there are hardly any
            yield torch.from_numpy(chosen)
