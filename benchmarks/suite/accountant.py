"""What epsilon after one more round costs, fedray's accountant against dp-accounting's, once one event's loss is known."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from workload import default_records

from fedray.privacy import accounting
from fedray.privacy.levels import Event
from suite.cases import job
from suite.gate import NotEqual

ROUNDS = (1, 10, 100, 1000)
DELTA = 1e-5
LARGEST_DIFFERENCE = 2e-3  # relative; each rounds to a grid of its own
LIBRARY_GRID = 1e-3
REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Median CPU milliseconds of epsilon after so many rounds, of both in turn, and how far apart the epsilons are."""

    rounds: int
    fedray_ms: float
    dp_accounting_ms: float
    relative_difference: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def measure() -> list[Evaluation]:
    """Measure the MLP's job (20 steps a round) after 1 to 1,000 rounds.

    Raises:
        NotEqual: the two give different epsilons.
    """
    what = job()
    from dp_accounting.pld import privacy_loss_distribution  # a second to import, and not everywhere

    event = Event(
        noise_multiplier=what.noise_multiplier, rate=what.batch_size / default_records(what.gateways), per="step"
    )
    distribution = privacy_loss_distribution.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.rate, value_discretization_interval=LIBRARY_GRID
    )
    accounting.epsilon_of(event, 1, DELTA)  # once a run
    return [_measure(event, distribution, rounds, rounds * what.local_steps) for rounds in ROUNDS]


def _measure(event: Event, distribution: Any, rounds: int, steps: int) -> Evaluation:
    ours, library = [], []
    for _ in range(REPEATS):
        began = time.thread_time()
        found = accounting.epsilon_of(event, steps, DELTA)
        middle = time.thread_time()
        expected = distribution.self_compose(steps).get_epsilon_for_delta(DELTA)
        ours.append(middle - began)
        library.append(time.thread_time() - middle)
    difference = abs(found - expected) / expected
    if not difference <= LARGEST_DIFFERENCE:
        raise NotEqual(f"epsilon after {rounds} rounds: {found} against dp-accounting's {expected}")
    return Evaluation(
        rounds=rounds,
        fedray_ms=1000 * statistics.median(ours),
        dp_accounting_ms=1000 * statistics.median(library),
        relative_difference=difference,
    )
