"""What a run would cost before it runs: epsilon from the public constants, or the missing constant from an epsilon.

Every claim of a level is answered on its own: a budget per gateway under zero-out allows other settings than one per record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fedray.privacy.accounting import epsilon_of, mu_of
from fedray.privacy.levels import Claim, level_of
from fedray.privacy.spec import NoiseLevelName, PrivacySpec, WeightsName

Unknown = Literal["epsilon", "noise_multiplier", "rounds", "records", "batch_size", "local_steps", "participation"]
LARGEST_COUNT = 1_000_000
LARGEST_RECORDS = 10**9
SMALLEST_NOISE, LARGEST_NOISE = 0.01, 1e6
_ANY_BELOW = 2.0**-32  # the smallest participation that a run takes


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The public constants of a run that has not been run; defaults are those of the main job.

    Args:
        noise_level: One of the private levels.
        noise_multiplier: sigma.
        rounds: R.
        local_steps: L, local steps a round.
        batch_size: B, the expected batch size.
        records: Nominal shard size; q = B / records.
        gateways: How many gateways there are.
        participation: Chance of a gateway to take part in a round; only the `gateway` level is amplified by it.
        delta: Of every guarantee.
        weights: How updates are averaged; "records" makes the record adjacency zero-out.
    """

    noise_level: NoiseLevelName = "sample"
    noise_multiplier: float = 1.0
    rounds: int = 10
    local_steps: int = 16
    batch_size: int = 64
    records: int = 4096
    gateways: int = 16
    participation: float = 1.0
    delta: float = 1e-5
    weights: WeightsName = "uniform"

    @property
    def spec(self) -> PrivacySpec:
        """The constants as a run would hold them."""
        return PrivacySpec(
            noise_level=self.noise_level,
            noise_multiplier=self.noise_multiplier,
            clip_norm=1.0,
            delta=self.delta,
            batch_size=self.batch_size,
            sample_rate=self.batch_size / self.records,
            local_steps=self.local_steps,
            expected_cohort=self.gateways * self.participation,
            weights=self.weights,
            participation=self.participation,
        )

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What the level promises, its first guarantee first."""
        return level_of(self.spec).claims(self.spec)

    @property
    def noise_on_average(self) -> float:
        """Standard deviation, in units of C, of the noise on the average of one round's first steps (or updates)."""
        cohort = self.gateways * self.participation
        if level_of(self.spec).central_noise:
            return self.noise_multiplier / cohort
        divisor = self.batch_size if level_of(self.spec).local == "record" else 1
        return self.noise_multiplier / (divisor * math.sqrt(cohort))

    def epsilon(self, index: int) -> float:
        """Return epsilon of the claim at this index after the whole run."""
        return epsilon_of(self.claims[index].event, self._count(index), self.delta)

    def mu(self, index: int) -> float | None:
        """Return mu of the claim at this index after the whole run; None where its curve is no Gaussian's."""
        return mu_of(self.claims[index].event, self._count(index))

    def _count(self, index: int) -> int:
        return self.rounds * self.local_steps if self.claims[index].event.per == "step" else self.rounds


def solve(setting: Setting, index: int, unknown: Unknown, epsilon: float) -> float | None:
    """Return the cheapest value of the unknown with which a claim holds at `epsilon`.

    Args:
        setting: Its value of the unknown is ignored.
        index: Of the claim.
        unknown: What to solve for: the smallest noise multiplier or number of records, the largest of the others.
        epsilon: Positive.

    Returns:
        The value, never one that passes epsilon: a noise multiplier is at most 0.1 % and a participation 1 % from the
        optimum; counts are exact. math.inf (0 for a noise multiplier or records) when even the extreme value that is
        tried holds, so that the unknown does not matter; None when no value does.
    """

    def fits(value: float) -> bool:
        whole = value if unknown in ("noise_multiplier", "participation") else int(value)
        return replace(setting, **{unknown: whole}).epsilon(index) <= epsilon  # type: ignore[arg-type]  # by name

    if unknown == "noise_multiplier":
        return _smallest_noise(setting, index, epsilon)
    if unknown == "participation":
        return _largest_participation(fits)
    if unknown == "records":
        return _smallest_count(fits, setting.batch_size)
    return _largest_count(fits, setting.records if unknown == "batch_size" else LARGEST_COUNT)


def _smallest_noise(setting: Setting, index: int, epsilon: float) -> float | None:
    """Search on the logarithms, where epsilon is nearly a straight line: half a dozen evaluations."""

    def excess(log_sigma: float) -> float:
        found = replace(setting, noise_multiplier=math.exp(log_sigma)).epsilon(index)
        return math.log(max(found, 1e-12) / epsilon)

    low = high = 0.0
    below = above = excess(0.0)
    while above > 0:
        low, below, high = high, above, high + math.log(2)
        if high > math.log(LARGEST_NOISE):
            return None
        above = excess(high)
    while below <= 0:
        high, above, low = low, below, low - math.log(2)
        if low < math.log(SMALLEST_NOISE):
            return 0.0
        below = excess(low)
    while high - low > 1e-3:
        share = min(max(below / (below - above), 0.02), 0.98)
        middle = low + share * (high - low)
        for guess in (middle, middle + 4e-4):  # the second closes the bracket from the other side
            if not low < guess < high:
                continue
            there = excess(guess)
            if there > 0:
                low, below = guess, there
            else:
                high, above = guess, there
                break
    return math.exp(high)


def _largest_participation(fits: Callable[[float], bool]) -> float | None:
    if fits(1.0):
        return math.inf
    low, high = _ANY_BELOW, 1.0
    if not fits(low):
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest_count(fits: Callable[[float], bool], smallest: int) -> float | None:
    if fits(smallest):
        return 0.0
    low, high = smallest, 2 * smallest
    while not fits(high):
        low, high = high, 2 * high
        if high > LARGEST_RECORDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _largest_count(fits: Callable[[float], bool], largest: int) -> float | None:
    if not fits(1):
        return None
    low, high = 1, 2
    while high <= largest and fits(high):
        low, high = high, 2 * high
    if high > largest:
        if fits(largest):
            return math.inf
        high = largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
