"""Computes epsilon from the charged events: in closed form, or by the composed privacy loss where sampling helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from fedray.privacy.composition import ComposedLoss
from fedray.privacy.levels import Adjacency, Claim, Event, Unit, level_of
from fedray.privacy.loss import Direction, PrivacyLoss
from fedray.privacy.spec import PrivacySpec

SMALLEST_SIGMA = 0.05  # where calibration stops to look for less noise


@dataclass(frozen=True, kw_only=True)
class Charges:
    """What the ledger has charged to the most charged gateway.

    Args:
        steps: Started local steps.
        rounds: Started attempts at rounds.
    """

    steps: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """One privacy guarantee: a line of the privacy card.

    Args:
        unit: Whom it protects.
        adjacency: Between which neighbours.
        observer: Against whom.
        epsilon: At `delta`.
        delta: The run's --delta.
        mu: Of the whole curve, which is that of a mu-GDP mechanism (Dong et al. 2019) where nothing is sampled: epsilon at
            any other delta follows from it alone. None where it is no Gaussian's curve; 0 where nothing was released.
        mechanism: Its description in words.
        accountant: The name of the method that gave epsilon.
    """

    unit: Unit
    adjacency: Adjacency
    observer: str
    epsilon: float
    delta: float
    mu: float | None
    mechanism: str
    accountant: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as privacy.json holds them."""
        return asdict(self)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return delta(epsilon) of a mu-GDP mechanism, exactly (Balle and Wang 2018; Dong et al. 2019)."""
    first = math.erfc((epsilon / mu - mu / 2) / math.sqrt(2)) / 2  # NormalDist.cdf loses the lower tail
    # e^eps · Phi(-z) in the log domain: for large eps the factors overflow and underflow on their own.
    log_second = epsilon + _log_cdf(-epsilon / mu - mu / 2)
    return first - math.exp(min(log_second, 0.0))


def _log_cdf(z: float) -> float:
    if z > -30:
        return math.log(max(math.erfc(-z / math.sqrt(2)) / 2, 5e-324))
    return -z * z / 2 - math.log(-z) - math.log(2 * math.pi) / 2 + math.log1p(-1 / z**2 + 3 / z**4)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a mu-GDP mechanism at delta, by bisection over the exact delta(epsilon).

    Edge cases:
        mu = 0 (nothing was released) gives 0.
    """
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def mu_of(event: Event, count: int) -> float | None:
    """Return mu after `count` events, sqrt(count) · sensitivity / sigma (Dong et al. 2019, Corollary 3.3).

    Edge cases:
        None at a rate below 1: the curve of a sampled Gaussian is no Gaussian's.
    """
    if event.rate < 1.0:
        return None
    return (2 if event.replaces else 1) * math.sqrt(count) / event.noise_multiplier


def epsilon_of(event: Event, count: int, delta: float) -> float:
    """Return epsilon after `count` events.

    Edge cases:
        No event gives 0. A rate of 1 uses the closed form, for which a PLD would take seconds.
    """
    if count == 0:
        return 0.0
    mu = mu_of(event, count)
    if mu is not None:
        return gaussian_epsilon(mu, delta)
    return max(loss.epsilon(count, delta) for loss in _losses(event))


@lru_cache(maxsize=64)
def _losses(event: Event) -> tuple[ComposedLoss, ...]:
    """Return the privacy loss of an event in each direction that differs."""
    directions: tuple[Direction, ...] = ("replace",) if event.replaces else ("remove", "add")
    return tuple(ComposedLoss(PrivacyLoss(event.noise_multiplier, event.rate, direction)) for direction in directions)


def accountant_of(event: Event) -> str:
    """Name the accountant that `epsilon_of` uses for an event."""
    if event.rate >= 1.0:
        return "closed form of Gaussian differential privacy"
    return "privacy loss distribution (connect the dots, pessimistic)"


def count_of(claim: Claim, charges: Charges) -> int:
    """Return how many of the claim's events the charges hold."""
    return charges.steps if claim.event.per == "step" else charges.rounds


def guarantees(spec: PrivacySpec, charges: Charges) -> tuple[Guarantee, ...]:
    """Return what holds after these charges, the level's first guarantee first; nothing for level `none`."""
    return tuple(
        Guarantee(
            unit=claim.unit,
            adjacency=claim.adjacency,
            observer=claim.observer,
            epsilon=epsilon_of(claim.event, count_of(claim, charges), spec.delta),
            delta=spec.delta,
            mu=mu_of(claim.event, count_of(claim, charges)),
            mechanism=claim.mechanism,
            accountant=accountant_of(claim.event),
        )
        for claim in level_of(spec).claims(spec)
    )


def epsilon_by_unit(spec: PrivacySpec, charges: Charges) -> dict[Unit, float]:
    """Return epsilon per unit, under the first adjacency that the level lists for it."""
    first: dict[Unit, Claim] = {}
    for claim in level_of(spec).claims(spec):
        first.setdefault(claim.unit, claim)
    return {unit: epsilon_of(claim.event, count_of(claim, charges), spec.delta) for unit, claim in first.items()}


def first_epsilon(spec: PrivacySpec, charges: Charges) -> float:
    """Return epsilon of the level's first guarantee, which budgets and targets mean."""
    claim = level_of(spec).claims(spec)[0]
    return epsilon_of(claim.event, count_of(claim, charges), spec.delta)


def calibrate(spec: PrivacySpec, charges: Charges, target_epsilon: float, tolerance: float = 1e-4) -> float:
    """Return the smallest noise multiplier whose first guarantee is at most `target_epsilon`.

    Args:
        spec: Its own noise multiplier is ignored.
        charges: The whole planned run.
        target_epsilon: Positive.
        tolerance: Relative; the result is at most this much larger than needed, never smaller.

    Edge cases:
        Where less than 0.05 would do (a delta above the chance to be sampled at all), 0.05 is returned.

    Raises:
        ValueError: Even sigma = 1e6 is not enough.
    """

    def fits(sigma: float) -> bool:
        return first_epsilon(replace(spec, noise_multiplier=sigma), charges) <= target_epsilon

    low, high = 0.2, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError("no noise multiplier up to 1e6 reaches the target")
    while fits(low):
        if low <= SMALLEST_SIGMA:
            return low
        low, high = max(low / 2, SMALLEST_SIGMA), low
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def affordable_rounds(spec: PrivacySpec, max_epsilon: float, rounds: int) -> int:
    """Return how many of the planned rounds fit into the budget of the first guarantee (bisection; 0 when none)."""
    low, high = 0, rounds + 1
    while high - low > 1:
        middle = (low + high) // 2
        charges = Charges(steps=middle * spec.local_steps, rounds=middle)
        low, high = (middle, high) if first_epsilon(spec, charges) <= max_epsilon else (low, middle)
    return low


def noise_multipliers_for(spec: PrivacySpec, charges: Charges, epsilons: Sequence[float]) -> dict[float, float]:
    """Return, to 1 %, the noise multiplier that reaches each epsilon of the first guarantee."""
    return {epsilon: calibrate(spec, charges, epsilon, tolerance=0.01) for epsilon in epsilons}
