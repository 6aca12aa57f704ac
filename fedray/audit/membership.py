"""Attack T6: membership of many canaries in one run at `sample` (Mahloujifar et al. 2024), with the real sampler."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import FedAvg
from fedray.audit import power
from fedray.audit.bounds import TradeOff, one_run_limit
from fedray.audit.canaries import Directions
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab
from fedray.audit.neighbours import repeated
from fedray.data.shards import Shard
from fedray.privacy.accounting import epsilon_of
from fedray.privacy.levels import level_of
from fedray.training.trainer import Release

Float64Array = npt.NDArray[np.float64]
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of the canaries that may be guessed each way
_CANARIES = 4000
_PER_GATEWAY = 1000
_DELTAS = np.concatenate([np.geomspace(1e-14, 1e-3, 24), np.geomspace(1e-3, 0.5, 40)[1:]])


class _DirectionReader:
    """A step observer that puts canary directions in the place of the records that the real sampler drew.

    Args:
        directions: M canary directions; each gateway has canaries of its own.
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
        return repeated(self._like.records(slice(1)), max(1, len(self._members[gateway])))


def attack_one_run(lab: Lab) -> list[Finding]:
    """Play T6 with gradient directions as canaries: the attacker reads every release of steps at the run's own rate."""
    each = min(lab.num_params, _PER_GATEWAY)
    gateways = max(1, min(lab.plan.config.gateways, -(-_CANARIES // each)))
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
    return [_finding(lab, inside.ravel(), reader.scores.ravel(), rounds)]


def trade_off_of(lab: Lab, steps: int) -> TradeOff:
    """Return the claimed trade-off function of so many local steps."""
    event = level_of(lab.spec).claims(lab.spec)[0].event
    return TradeOff([(epsilon_of(event, steps, float(delta)), float(delta)) for delta in _DELTAS])


def guesses_of(lab: Lab, canaries: int, steps: int) -> tuple[int, int, float | None]:
    """Return the guesses each way that catch the smallest leak, how many in all may be right, and that leak.

    Fixed by the claim and the number of canaries, before anything is read.
    """
    trade_off, found = trade_off_of(lab, steps), []
    for share in _SHARES:
        each = max(1, int(share * canaries))
        limit = one_run_limit(trade_off, canaries, 2 * each)
        leak = power.one_run_leak(lab.sigma, lab.spec.sample_rate, steps, canaries, each, limit)
        found.append((each, limit, leak))
    return min(found, key=lambda choice: np.inf if choice[2] is None else choice[2])


def _finding(lab: Lab, inside: npt.NDArray[np.bool_], scores: Float64Array, rounds: int) -> Finding:
    """Guess the highest scores "in" and the lowest "out", and hold the right guesses against what the claim allows."""
    steps = rounds * lab.spec.local_steps
    each, limit, leak = guesses_of(lab, len(inside), steps)
    order = np.argsort(scores, kind="stable")
    right = int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())
    return Finding(
        name="T6 one run",
        level=lab.spec.noise_level,
        unit="record",
        adjacency=lab.adjacency,
        measure="right guesses",
        claim=float(limit),
        lower_bound=float(right),
        smallest_leak_caught=leak,
        text=f"one run of {rounds} round{'s' * (rounds > 1)} with the real sampler; {len(inside)} orthogonal canary directions "
        f"of norm C, each in by a coin; the attacker sees every release and makes {2 * each} guesses. Claim: after {steps} "
        f"local steps more than {limit} right ones are as unlikely as a false alarm (f-DP in one run). It proves that nothing "
        "is grossly broken, no more.",
    )
