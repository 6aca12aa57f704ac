"""Attacks T5, T7 and T8 on the orchestrator's noise (`gateway` level), through the real clipping and aggregation.

Recorded updates of real gateways stand for the rest of the sum, which the attacker knows; canary gateways answer with
huge vectors, which the real worker clips. One noise serves a whole sum, so a repetition is one more call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import GroupResult, gather
from fedray.audit import power
from fedray.audit.bounds import Scores, canary_gateways_mu, count, game_bound, gaussian_bound
from fedray.audit.canaries import Directions
from fedray.audit.finding import Finding
from fedray.audit.lab import LARGEST_PLAYABLE_MU, Float32Array, Lab
from fedray.audit.releases import Place, attempts, place_of
from fedray.pool.worker import Worker
from fedray.privacy import mechanism
from fedray.privacy.streams import RoundKeys
from fedray.privacy.tally import ranges_of
from fedray.training.trainer import GatewayShards, StepObserver

Float64Array = npt.NDArray[np.float64]
_HUGE = 100.0  # times C: what a canary gateway answers before the worker clips it
_RECORDED = 16  # real gateways in the sum, at most
_CANARIES = 256  # canary gateways in one sum of T7, at most
_CANARY_BYTES = 2**27
_CANARIES_T8 = 50
_PRECISION = 0.03  # of the canaries' mean in T7, in units of C
_MOST_SUMS = 4000  # of T7
_ROUNDS_T8 = 10
_NOISE_ROUNDS = 8


class _CanaryTrainer:
    """Answers with given updates: a gateway is free to send what it likes."""

    def __init__(self, first: int, updates: Float32Array) -> None:
        self.observer: StepObserver | None = None
        self._first = first
        self._updates = updates

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        """Return the canary gateways' rows of the given updates."""
        return self._updates[[gateway - self._first for gateway in gateways]]

    def draw_ahead(self, stop: Event) -> None:
        """Draw nothing."""


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """A sum of clipped updates as the orchestrator gathers it.

    Args:
        total: `[P]`.
        weight: Sum of the weights.
        gateways: Who is in it.
    """

    total: Float64Array
    weight: float
    gateways: tuple[int, ...]


class Federation:
    """Recorded updates of real gateways, and sums of them with canary gateways.

    Args:
        lab: The run under attack.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._worker = Worker(replace(lab.plan.setup, max_update_norm=None), lab.device)
        self.num_gateways = min(lab.plan.config.gateways, _RECORDED)
        self._recorded = self._worker.train(lab.keys("recorded"), lab.params, range(self.num_gateways))

    def rest(self) -> ClippedSum:
        """Return the sum of the recorded updates alone."""
        return self._gathered([self._recorded])

    def with_canaries(self, updates: Float32Array) -> ClippedSum:
        """Return the sum of the recorded updates and canary gateways' `[K, P]`, clipped by the real worker."""
        lab = self._lab
        worker = Worker(replace(lab.plan.setup, max_update_norm=None), lab.device)
        worker._trainer = _CanaryTrainer(self.num_gateways, updates)  # everything after local training is the worker's
        ids = range(self.num_gateways, self.num_gateways + len(updates))
        return self._gathered([self._recorded, worker.train(lab.keys("canaries"), lab.params, ids)])

    def residual(self, sum_: ClippedSum, rest: ClippedSum, keys: RoundKeys) -> Float64Array:
        """Release a sum by the real mechanism; return what is left of it in units of C when the known rest is taken off."""
        spec = self._lab.spec
        released = mechanism.aggregate(spec, keys, sum_.total.copy(), sum_.weight, ranges_of(sum_.gateways))
        return (released * spec.expected_cohort - rest.total) / spec.clip_norm

    def _gathered(self, results: Sequence[GroupResult]) -> ClippedSum:
        total, weight, _ = gather(results, self._lab.plan.layout, torch.device("cpu"))
        ids = tuple(gateway for result in results for gateway in result.gateways)
        return ClippedSum(total=total, weight=weight, gateways=ids)


def attack_aggregation(lab: Lab) -> list[Finding]:
    """Run T5 and T7 with canary gateways, and T8 as a report."""
    federation = Federation(lab)
    vector = Directions(lab.num_params, lab.rng("central")).first(1)[0].astype(np.float64)
    return [_game(lab, federation, vector), *_pooled(lab, federation), _canary_gateways(lab, federation)]


def _game(lab: Lab, federation: Federation, direction: Float64Array) -> Finding:
    """T5: is the gateway's update in the sum, or zero? In every other round it sends the opposite."""
    # A canary that would be recognised nearly always is made shorter; the claim shrinks with it.
    rounds = lab.attacked_steps(lab.plan.config.rounds, at_least=2)
    full = math.sqrt(rounds) / lab.sigma
    strength = min(1.0, LARGEST_PLAYABLE_MU / full)
    length = lab.clip_norm * (_HUGE if strength == 1.0 else strength)
    rest = federation.rest()
    ways = [federation.with_canaries((sign * length * direction)[None].astype(np.float32)) for sign in (1, -1)]

    def scores(runs: int, present: bool) -> Float64Array:
        out = np.zeros(runs)
        for run in range(runs):
            for step in range(rounds):
                keys = lab.keys(f"canary gateway {present} {runs}", run, step + 1)
                way = ways[step % 2] if present else rest
                out[run] += (1 - 2 * (step % 2)) * (federation.residual(way, rest, keys) @ direction)
        return out

    runs = lab.affordable_runs(lambda pilot: (scores(pilot, True), scores(pilot, False)))
    with_canary, without = scores(runs, True), scores(runs, False)
    claim = strength * full
    return Finding(
        name="T5 canary gateway",
        level=lab.spec.noise_level,
        unit="gateway",
        adjacency="zero-out",
        claim=claim,
        lower_bound=game_bound(count(with_canary, without, strength * rounds / 2)),
        smallest_leak_caught=power.game_leak(claim, runs, runs),
        text=f"{runs} runs a world of {rounds} round{'s' * (rounds > 1)} of the real clipping and aggregation on "
        f"{federation.num_gateways} recorded updates; the attacker tells whether one more gateway's update, which moves the "
        f"sum by {strength:.3g}·C, is in it. Claim: mu = sqrt({rounds})/sigma"
        + ("." if strength == 1 else f"·{strength:.3g}."),
    )


def _pooled(lab: Lab, federation: Federation) -> list[Finding]:
    """T7: many canary gateways in each sum, read against directions without one, held against 1/sigma a round."""
    directions = Directions(lab.num_params, lab.rng("pooled directions"))
    number = min(directions.size // 2, max(1, min(_CANARIES, _CANARY_BYTES // (8 * lab.num_params))))
    if number == 0:
        return []  # a model of one parameter has no free direction
    planted = np.zeros(directions.size, np.bool_)
    planted[lab.rng("pooled").permutation(directions.size)[:number]] = True
    units = np.zeros((number, directions.size))
    units[np.arange(number), np.flatnonzero(planted)] = _HUGE * lab.clip_norm
    everyone, rest = federation.with_canaries(directions.combine(units).astype(np.float32)), federation.rest()
    scores, rounds, start = Scores(), 0, time.perf_counter()
    needed = min(_MOST_SUMS, math.ceil((4.9 * max(lab.sigma, 1.0) / _PRECISION) ** 2 / number))
    while rounds < needed:
        read = directions.coefficients(federation.residual(everyone, rest, lab.keys("pooled", rounds)))
        scores.add(read[planted], read[~planted])
        rounds += 1
        if time.perf_counter() - start > lab.effort.game_seconds:
            break  # the clock decides, not what was released
    claim = 1.0 / lab.sigma
    finding = Finding(
        name="T7 one-run Gaussian",
        level=lab.spec.noise_level,
        unit="gateway",
        adjacency="zero-out",
        claim=claim,
        lower_bound=gaussian_bound(scores),
        smallest_leak_caught=power.gaussian_leak(claim, scores.canaries, scores.free),
        text=f"{scores.canaries} orthogonal canaries of norm C in {rounds} sums with {number} canary gateways each, "
        f"{scores.free} canary-free directions for the scale of the noise, which is taken to be normal. Claim: mu = 1/sigma a "
        "round.",
    )
    return [finding]


def aggregate_noise(
    lab: Lab, kept: npt.NDArray[np.int64], rounds: int = _NOISE_ROUNDS
) -> dict[Place, npt.NDArray[np.float32]]:
    """Return the noise `[d]` of real sums in units of C, by round, attempt and (as "step") set of gateways that arrived."""
    federation = Federation(lab)
    full = federation.rest()
    sums = [full]
    if federation.num_gateways > 1:  # the same total: what is left is noise, whoever is said to have arrived
        sums.append(ClippedSum(total=full.total, weight=full.weight - 1, gateways=full.gateways[:-1]))
    return {
        place_of(keys, 0, number): federation.residual(sum_, full, keys)[kept].astype(np.float32)
        for keys in attempts(lab, "aggregate noise", rounds)
        for number, sum_ in enumerate(sums)
    }


def _canary_gateways(lab: Lab, federation: Federation) -> Finding:
    """T8 (Andrew et al. 2023): cosines of canary gateways with the released update; an estimate, never a gate."""
    rng = lab.rng("canary gateways")
    most = max(1, _CANARY_BYTES // (8 * lab.num_params))
    number = max(1, min(_CANARIES_T8, lab.num_params // 10, most))
    units = rng.standard_normal((number, lab.num_params))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    everyone = federation.with_canaries((_HUGE * lab.clip_norm * units).astype(np.float32))
    empty = ClippedSum(total=np.zeros(lab.num_params), weight=0.0, gateways=())
    cosines = []
    for index in range(_ROUNDS_T8):
        update = federation.residual(everyone, empty, lab.keys("canary gateways", index))
        norm = float(np.linalg.norm(update))
        cosines.append(units @ update / norm if norm > 0 else np.zeros(number))
    estimate, low, high = canary_gateways_mu(np.concatenate(cosines), lab.num_params)
    return Finding(
        name="T8 canary gateways",
        level=lab.spec.noise_level,
        unit="gateway",
        adjacency="zero-out",
        claim=1.0 / lab.sigma,
        lower_bound=max(0.0, low),
        confidence=0.95,
        smallest_leak_caught=None,
        gate=False,
        text=f"a report, no gate: {number} canary gateways in each of {_ROUNDS_T8} rounds; their cosines with the released "
        f"update estimate mu = {estimate:.3g} a round (95 % interval {low:.3g} … {high:.3g}; Andrew et al. 2023). The "
        "attacker knows nobody's update, so the estimate is below what a stronger attacker gets.",
    )
