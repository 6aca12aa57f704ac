"""Attack T3: tests whether batches (cohorts at `gateway`) are the independent Poisson draws the accountant assumes.

Tested are the rate itself, of all records and of each one; draws of other steps, gateways, rounds and attempts, which
must hold the same record as often as independent ones; and the spread of batch sizes, which sampling without
replacement does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedray.audit import power
from fedray.audit.bounds import ALPHA, LARGEST_MU, binomial_lower, binomial_upper
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab
from fedray.audit.releases import Place, Releases, attempts, neighbouring, place_of
from fedray.privacy.levels import Adjacency, Unit, cohort_is_secret

_PAIRED_DRAWS = 1024  # of which all pairs are compared
_PAIRED_RECORDS = 8192
_COHORT_ROUNDS = 500


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which records (or gateways) were drawn, by the coordinates of the draw.

    Args:
        drawn: Sorted indices of those that were drawn.
        sizes: How many there are to draw from, by gateway.
        rate: The claimed chance of each.
    """

    drawn: Mapping[Place, npt.NDArray[np.int64]]
    sizes: Mapping[int, int]
    rate: float

    @property
    def trials(self) -> int:
        """How many independent yes-or-no draws were made in all."""
        return sum(self.sizes[place.gateway] for place in self.drawn)


def attack_sampler(lab: Lab, releases: Releases) -> list[Finding]:
    """Attack the batches of `sample` or `batch`."""
    draws = Draws(drawn=releases.batches, sizes=releases.num_records, rate=lab.spec.sample_rate)
    return findings(lab, draws, "record", "add-or-remove", "batch")


def attack_participation(lab: Lab) -> list[Finding]:
    """Attack the cohorts of `gateway` where they are secret and amplify."""
    if not cohort_is_secret(lab.spec) or lab.spec.arrival_may_depend_on_data:
        return []  # nothing is claimed of them
    drawn = {
        place_of(keys, 0, 0): np.array(lab.cohort(keys), np.int64) for keys in attempts(lab, "cohorts", _COHORT_ROUNDS)
    }
    sizes = {0: lab.plan.config.federation.gateways}
    return findings(lab, Draws(drawn=drawn, sizes=sizes, rate=lab.spec.participation), "gateway", "zero-out", "cohort")


def findings(lab: Lab, draws: Draws, unit: Unit, adjacency: Adjacency, what: str) -> list[Finding]:
    """Return what the draws say of their rate, their independence and the spread of their sizes."""
    where = f"{len(draws.drawn)} draws of a {what}"
    factor, how = dependence(draws)
    trials = [_trials(draws, pairs) for pairs in neighbouring(draws.drawn).values()]
    inside = share_inside(draws, lab.rng(f"{what} sizes"))
    measures = (
        (
            "rate",
            "rate",
            draws.rate,
            largest_rate(draws),
            power.rate_leak(draws.rate, draws.trials),
            f"{where}: the chance of each {unit} to be drawn, over all and for each one alone. Claim: q = {draws.rate:.4g}.",
        ),
        (
            "independence",
            "times",
            1.0,
            factor,
            power.dependence_leak(draws.rate, trials),
            f"{where}: how often two of them hold the same {unit}, over how often independent ones do: neighbouring steps, "
            f"gateways, rounds and attempts, and every pair alone. Claim: 1. Farthest: {how}.",
        ),
        (
            "spread",
            "share",
            0.5,
            share_bound(inside, len(draws.drawn)),
            power.share_leak(len(draws.drawn)) if 0 < draws.rate < 1 else None,
            f"{where}: {inside} sizes lie in the middle half of the binomial law. Fixed sizes lie there always. Claim: half.",
        ),
    )
    return [
        Finding(
            name=f"T3 {what} {name}",
            level=lab.spec.noise_level,
            unit=unit,
            adjacency=adjacency,
            measure=measure,
            claim=claim,
            lower_bound=bound,
            smallest_leak_caught=leak,
            text=text,
        )
        for name, measure, claim, bound, leak, text in measures
    ]


def largest_rate(draws: Draws, alpha: float = ALPHA) -> float:
    """Return a lower bound of the largest chance to be drawn, of all together and of each one alone (Clopper–Pearson)."""
    total = sum(len(indices) for indices in draws.drawn.values())
    found = binomial_lower(total, draws.trials, alpha / 2)
    each = alpha / 2 / sum(draws.sizes.values())
    for gateway, size in draws.sizes.items():
        own = [indices for place, indices in draws.drawn.items() if place.gateway == gateway]
        counts = np.bincount(np.concatenate([*own, np.array([], np.int64)]), minlength=size)
        found = max(found, binomial_lower(int(counts.max()), len(own), each))
    return found


def dependence(draws: Draws, alpha: float = ALPHA) -> tuple[float, str]:
    """Return a lower bound of how far joint draws are from independent ones, as a factor of at least 1, and where.

    Each relation's pairs share no draw, so that what they hold in common is binomial(N, q²); a factor above 1 is too much
    or, for sampling without replacement, too little of it. A third of alpha goes to single pairs.
    """
    if not 0 < draws.rate < 1 or len(draws.drawn) < 2:
        return 1.0, "-"
    joint, relations = draws.rate**2, neighbouring(draws.drawn)
    best, where = 1.0, "-"
    for name, pairs in relations.items():
        trials = _trials(draws, pairs)
        common = sum(_common(draws, a, b) for a, b in pairs)
        each = alpha / 3 / len(relations)
        most, least = binomial_upper(common, trials, each), binomial_lower(common, trials, each)
        for factor in (least / joint, min(LARGEST_MU, joint / most)):
            if factor > best:
                best, where = factor, f"{name}s next to each other"
    factor, pair = _closest_pair(draws, alpha / 3)
    return (factor, pair) if factor > best else (best, where)


def _trials(draws: Draws, pairs: Sequence[tuple[Place, Place]]) -> int:
    return sum(min(draws.sizes[one.gateway], draws.sizes[other.gateway]) for one, other in pairs)


def _common(draws: Draws, one: Place, other: Place) -> int:
    size = min(draws.sizes[one.gateway], draws.sizes[other.gateway])
    both = np.intersect1d(draws.drawn[one], draws.drawn[other], assume_unique=True)
    return int((both < size).sum())


def _closest_pair(draws: Draws, alpha: float) -> tuple[float, str]:
    """Return a lower bound of the largest factor of any single pair, and the pair."""
    places = list(draws.drawn)[:_PAIRED_DRAWS]
    width = min(_PAIRED_RECORDS, *(draws.sizes[place.gateway] for place in places))
    held = np.zeros((len(places), width), np.float32)
    for row, place in zip(held, places, strict=True):
        indices = draws.drawn[place]
        row[indices[indices < width]] = 1.0
    common = np.triu(held @ held.T, 1)
    one, other = np.unravel_index(int(common.argmax()), common.shape)
    number = len(places) * (len(places) - 1) / 2
    factor = binomial_lower(round(float(common[one, other])), width, alpha / number) / draws.rate**2
    return factor, f"{_name(places[int(one)])} and {_name(places[int(other)])}"


def _name(place: Place) -> str:
    return f"(round {place.round}, attempt {place.attempt}, opening {place.opening}, gateway {place.gateway}, step {place.step})"


def share_inside(draws: Draws, rng: np.random.Generator) -> int:
    """Return how many sizes lie in the middle half of their law; a coin of the attacker's own makes it half exactly."""
    sizes = np.array([len(indices) for indices in draws.drawn.values()])
    of = np.array([draws.sizes[place.gateway] for place in draws.drawn])
    below = stats.binom.cdf(sizes - 1, of, draws.rate)
    levels = below + rng.random(len(sizes)) * (stats.binom.cdf(sizes, of, draws.rate) - below)
    return int(((levels > 0.25) & (levels < 0.75)).sum())


def share_bound(inside: int, draws: int, alpha: float = ALPHA) -> float:
    """Return a lower bound of the larger of the two shares, inside and outside of the middle half."""
    return max(binomial_lower(count, draws, alpha / 2) for count in (inside, draws - inside))
