"""The equality gate: fedray's clipped sums must be those of torch.autograd on single records before anything is timed.

A record whose activation lies on the kink of a ReLU to within rounding has two gradients, and float32 takes either: of
512 records of the ResNet four differ by more than 1e-4 between torch's own float32 and float64. So a few small batches are
drawn, and one of them must be equal: what is wrong for any other reason is wrong in all of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from families.family import Family, call
from families.job import CPU, Job, Refused, new_keys, reason, trainer_of
from fedray.data.inputs import taken
from fedray.data.shards import Shard
from fedray.errors import FedrayError
from fedray.orchestrator.plan import Plan
from fedray.privacy.streams import RoundKeys
from fedray.training.trainer import Release

TOLERANCE = 1e-5  # relative L2 over all sums
GATEWAYS, BATCH = 2, 8
DRAWS = 8  # of batches; the ResNet's has a record on a kink in one of six
Sums = npt.NDArray[np.float64]


class NotEqual(RuntimeError):
    """fedray's sums are not those of the loop; its times may not be compared."""


class Observed:
    """Keeps each gateway's clipped sum and batch of the first step, and changes nothing."""

    def __init__(self) -> None:
        self.sums: list[Sums] = []
        self.batches: list[npt.NDArray[np.int64]] = []

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        if step == 0:  # from the second on parameters carry noise, which rounding makes differ
            self.sums.append(clipped.cpu().double().numpy().copy())
            self.batches.append(batch)
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def first_sums(plan: Plan, job: Job, keys: RoundKeys, device: torch.device = CPU) -> Observed:
    """Return the clipped sums of the first step of fedray's trainer, gateway by gateway."""
    trainer = trainer_of(plan, device)
    trainer.observer = seen = Observed()
    trainer.train(keys, plan.layout.flatten(plan.model), range(job.gateways), job.shards)
    return seen


def record_sums(plan: Plan, job: Job, batches: Sequence[npt.NDArray[np.int64]]) -> Sums:
    """Return `[G, P]`, the clipped sums of a loop of torch.autograd over single records, added up in float64."""
    model, clip_norm = copy.deepcopy(plan.model).train(), plan.spec.clip_norm
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = np.zeros((len(batches), plan.layout.num_params))
    for row, batch, shard in zip(found, batches, job.shards, strict=True):
        for index in batch.tolist():
            gradient = _gradient(job, model, parameters, shard.records(slice(index, index + 1)))
            np.add(row, gradient * min(1.0, clip_norm / max(float(np.linalg.norm(gradient)), 1e-30)), out=row)
    return found


def _gradient(job: Job, model: nn.Module, parameters: Sequence[nn.Parameter], record: Shard) -> Sums:
    loss = job.family.loss(call(model, taken(record.x, slice(1))), record.y).sum()
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return np.concatenate(
        [
            np.zeros(parameter.numel()) if part is None else part.flatten().double().numpy()
            for parameter, part in zip(parameters, parts, strict=True)
        ]
    )


def distance(found: Sequence[Sums] | Sums, expected: Sequence[Sums] | Sums) -> float:
    """Return how far apart two lists of sums are, relative to the expected ones (L2)."""
    one, other = np.stack(list(found)), np.stack(list(expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def least_distance(apart: Callable[[RoundKeys], float], allowed: float) -> float:
    """Return the distance of the first draw of batches that is allowed, or the least of all draws."""
    found = float("inf")
    for _ in range(DRAWS):
        found = min(found, apart(new_keys()))  # min keeps `found` where the new one is NaN
        if found <= allowed:
            break
    return found


def check(family: Family) -> float:
    """Return the distance of fedray's sums from the loop's, for a family on a few gateways and one step.

    A model that draws is compared without its draws (Dropout of p = 0): a loop cannot take the keyed ones.

    Raises:
        NotEqual: They are apart.
        Refused: fedray does not take the family.
    """
    job = Job(without_draws(family) if family.draws else family, gateways=GATEWAYS, local_steps=1, batch=BATCH)
    plan = job.plan()

    def apart(keys: RoundKeys) -> float:
        seen = first_sums(plan, job, keys)
        return distance(seen.sums, record_sums(plan, job, seen.batches))

    try:
        found = least_distance(apart, TOLERANCE)
    except FedrayError as error:
        raise Refused(reason(error)) from error
    if not found <= TOLERANCE:
        raise NotEqual(
            f"{family.title}: fedray's clipped sums are {found:.2g} from those of single records, at most "
            f"{TOLERANCE:g} is allowed; nothing is timed"
        )
    return found


def without_draws(family: Family) -> Family:
    """Return the family with Dropout that drops nothing."""

    def build() -> nn.Module:
        model = family.build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return dataclasses.replace(family, build=build)
