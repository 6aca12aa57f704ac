"""One-run membership attacks at `sample` (T6; Steinke et al. 2023): real sampler, many canaries, each in or out by a coin."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedray.aggregation import FedAvg, gather
from fedray.audit import power
from fedray.audit.bounds import area_under_curve, one_run_epsilon
from fedray.audit.canaries import Directions, mislabelled, out_of_distribution
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab
from fedray.data.inputs import Array, InputArrays, arrays
from fedray.data.shards import Shard, joined
from fedray.models import Loss, call_model
from fedray.params import Layout
from fedray.pool.worker import Worker
from fedray.privacy import mechanism
from fedray.privacy.accounting import epsilon_of
from fedray.privacy.ledger import ranges_of
from fedray.privacy.levels import level_of
from fedray.training.trainer import Release

Float64Array = npt.NDArray[np.float64]
_DELTA = 1e-12  # with alpha = 1e-6 a larger delta would make every bound 0
_GUESSED = 0.1  # of the canaries each way, fixed beforehand
_DIRECTIONS = 4000  # canaries in all
_PER_GATEWAY = 1000
_SHARE = 0.05  # of a shard's records that canary records may be


def _finding(
    lab: Lab, name: str, inside: npt.NDArray[np.bool_], scores: Float64Array, steps: int, text: str
) -> Finding:
    """Guess the highest scores "in" and the lowest "out", and hold the right guesses against the run's epsilon."""
    each = max(1, int(_GUESSED * len(inside)))
    order = np.argsort(scores, kind="stable")
    right = int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())
    first = level_of(lab.spec).claims(lab.spec)[0]
    claim = epsilon_of(first.event, steps, _DELTA)
    return Finding(
        name=name,
        level=lab.spec.noise_level,
        unit=first.unit,
        adjacency=first.adjacency,
        measure="epsilon",
        claim=claim,
        lower_bound=one_run_epsilon(len(inside), 2 * each, right, _DELTA),
        smallest_leak_caught=power.one_run_leak(claim, len(inside), 2 * each, _DELTA),
        text=f"{text} {right} of {2 * each} guesses were right ({len(inside)} canaries, each in by a coin). Claim: epsilon "
        f"{claim:.3g} at delta {_DELTA:g} after {steps} local steps. It proves that nothing is grossly broken, no more.",
    )


class _DirectionReader:
    """A step observer that puts canary directions in the place of the records that the real sampler drew.

    Args:
        directions: M of them, for each gateway of its own.
        members: Of each gateway, the canaries that are in its shard, one a record.
        lab: The run under attack.
    """

    def __init__(self, directions: list[Directions], members: list[npt.NDArray[np.int64]], lab: Lab) -> None:
        self.scores = np.zeros((len(members), directions[0].size))
        self._directions = directions
        self._members = members
        self._clip_norm = lab.clip_norm

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the drawn canaries, each of norm C."""
        coefficients = np.zeros(self.scores.shape[1])
        coefficients[self._members[gateway][batch]] = self._clip_norm
        return torch.from_numpy(self._directions[gateway].combine(coefficients)).to(clipped)

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Add up what the release says of each canary."""
        self.scores[release.gateway] += self._directions[release.gateway].coefficients(gradient.cpu().numpy())
        return gradient


class _MemberShards:
    """Shards of as many copies of one record as a gateway has canaries; at least one."""

    def __init__(self, like: Shard, members: list[npt.NDArray[np.int64]]) -> None:
        self._like = like
        self._members = members

    def __getitem__(self, gateway: int, /) -> Shard:
        index = torch.zeros(max(1, len(self._members[gateway])), dtype=torch.long)
        return self._like.records(index)


def attack_one_run(lab: Lab) -> list[Finding]:
    """T6 with gradient directions: all steps of the run at its own rate, with the attacker reading every release."""
    each = min(lab.num_params, _PER_GATEWAY)
    gateways = max(1, min(lab.plan.config.gateways, -(-_DIRECTIONS // each)))
    rng = lab.rng("one run")
    inside = rng.random((gateways, each)) < 0.5
    members = [np.flatnonzero(row) if row.any() else np.array([0]) for row in inside]
    inside = np.stack([np.isin(np.arange(each), row) for row in members])
    directions = [Directions(lab.num_params, lab.rng(f"one run {gateway}"), each) for gateway in range(gateways)]
    reader = _DirectionReader(directions, members, lab)
    trainer = lab.trainer(lab.spec)
    trainer.observer = reader
    shards = _MemberShards(lab.shards[0], members)
    params, keys, server, rounds = lab.params, lab.keys("one run"), FedAvg(), 0
    start = time.perf_counter()
    while rounds < lab.plan.config.rounds and time.perf_counter() - start < lab.effort.game_seconds:
        updates = trainer.train(keys, params, range(gateways), shards)
        params = server.step(params, updates.astype(np.float64).mean(axis=0))
        keys = keys.following()
        rounds += 1
    steps = rounds * lab.spec.local_steps
    text = f"one run of {rounds} round{'s' * (rounds > 1)} with the real sampler; orthogonal canary directions of norm C in "
    text += f"{gateways} gateway{'s' * (gateways > 1)}, the attacker sees every release."
    return [_finding(lab, "T6 one run, directions", inside.ravel(), reader.scores.ravel(), steps, text)]


@dataclass(frozen=True, kw_only=True)
class _Planted:
    """Canary records of one gateway: all of them, and which are in."""

    records: Shard
    inside: npt.NDArray[np.bool_]


class _ShardsWithCanaries:
    """The run's shards, with each gateway's chosen canary records added."""

    def __init__(self, lab: Lab, planted: list[_Planted]) -> None:
        self._lab = lab
        self._planted = planted

    def __len__(self) -> int:
        return len(self._planted)

    def __getitem__(self, index: int, /) -> tuple[InputArrays, Array]:
        planted = self._planted[index]
        both = joined([self._lab.shards[index], planted.records.records(torch.from_numpy(planted.inside))])
        return arrays(both.x), both.y.numpy()


def attack_model(lab: Lab) -> list[Finding]:
    """T6 on the final model: real canary records, guessed by how much the training lowered their loss."""
    planted = _plant(lab)
    total = sum(len(one.inside) for one in planted)
    if total < 10:
        return []  # too few records for a guess
    params, rounds = _train(lab, _ShardsWithCanaries(lab, planted))
    scores = np.concatenate([_loss_drop(lab, params, one.records) for one in planted])
    inside = np.concatenate([one.inside for one in planted])
    area = area_under_curve(scores[inside], scores[~inside]) if inside.any() and not inside.all() else math.nan
    text = f"membership in the final model of a run of {rounds} round{'s' * (rounds > 1)}: real canary records, half of them "
    text += (
        f"mislabelled and half out-of-distribution, guessed by how far training lowered their loss (AUC {area:.3f})."
    )
    return [_finding(lab, "T6 loss on the final model", inside, scores, rounds * lab.spec.local_steps, text)]


def _plant(lab: Lab) -> list[_Planted]:
    gateways = min(lab.plan.config.gateways, 16)
    nominal = lab.plan.federation.nominal_records
    planted = []
    for gateway in range(gateways):
        rng, shard = lab.rng(f"planted {gateway}"), lab.shards[gateway]
        half = max(1, min(32, int(_SHARE * nominal), shard.num_records))
        model, labels = lab.plan.model, lab.plan.class_labels
        both = [make(model, shard, half, rng, labels) for make in (mislabelled, out_of_distribution)]
        records = joined(both)
        planted.append(_Planted(records=records, inside=rng.random(records.num_records) < 0.5))
    return planted


def _train(lab: Lab, shards: _ShardsWithCanaries) -> tuple[npt.NDArray[np.float32], int]:
    """Train the run on other shards, as the orchestrator does, for as many of its rounds as there is time for."""
    worker = Worker(replace(lab.plan.setup, shards=shards), lab.device)
    params, keys, server, rounds = lab.params, lab.keys("final model"), FedAvg(), 0
    start = time.perf_counter()
    while rounds < lab.plan.config.rounds and time.perf_counter() - start < lab.effort.training_seconds:
        result = worker.train(keys, params, range(len(shards)))
        total, weight, _ = gather([result], lab.plan.layout, torch.device("cpu"))
        params = server.step(params, mechanism.aggregate(lab.spec, keys, total, weight, ranges_of(result.gateways)))
        keys = keys.following()
        rounds += 1
    return params, rounds


def _loss_drop(lab: Lab, params: npt.NDArray[np.float32], records: Shard) -> Float64Array:
    before = _losses(lab.plan.model, lab.plan.layout, lab.params, lab.plan.training.loss, records)
    return before - _losses(lab.plan.model, lab.plan.layout, params, lab.plan.training.loss, records)


@torch.no_grad()
def _losses(
    model: torch.nn.Module, layout: Layout, params: npt.NDArray[np.float32], loss: Loss, records: Shard
) -> Float64Array:
    model = copy.deepcopy(model).eval()
    layout.load(model, params)
    values = loss(call_model(model, records.x), records.y).double().numpy()
    finite: Float64Array = np.nan_to_num(values, nan=0.0, posinf=1e30, neginf=-1e30)
    return finite
