"""Interleaved repeats of the systems on one family, by wall clock and by processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from families.job import Job, Refused
from families.systems import System

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Timed:
    """What was measured of one system.

    Args:
        samples: (Expected) records a round.
        engine: How it trains, in a word.
        refusal: Why it does not train the family; None where it does.
        wall_s: Seconds of a round, one figure a repeat.
        cpu_s: The same by the process's processor time, which neighbours on the machine disturb less.
    """

    samples: int = 0
    engine: str = ""
    refusal: str | None = None
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def samples_per_s(self) -> float | None:
        """Median over repeats; None where nothing was measured."""
        return self.samples / statistics.median(self.wall_s) if self.wall_s else None

    @property
    def samples_per_cpu_s(self) -> float | None:
        """The same by processor time."""
        return self.samples / statistics.median(self.cpu_s) if self.cpu_s else None

    def as_dict(self) -> dict[str, Any]:
        """Return medians and raw numbers as JSON values."""
        rates = {"samples_per_s": self.samples_per_s, "samples_per_cpu_s": self.samples_per_cpu_s}
        return {**self.__dict__, **rates}


def measure(
    job: Job, systems: Mapping[str, Callable[[Job], System]], repeats: int, least_s: float, say: Say
) -> dict[str, Timed]:
    """Build all systems, train one round of each to warm up, then time them in turn, `repeats` times over.

    Args:
        job: What is trained.
        systems: By name.
        repeats: Figures a system.
        least_s: Seconds that a figure takes at least: short rounds are repeated.
        say: Tells how far it is.
    """
    found = {name: Timed() for name in systems}
    ready: dict[str, System] = {}
    for name, build in systems.items():
        try:
            system = build(job)
            system.round()
        except Refused as refused:
            found[name].refusal = str(refused)
            say(f"  {name}: refused: {refused}")
        else:
            ready[name] = system
            found[name].samples, found[name].engine = system.samples, system.engine
    for _ in range(repeats):
        for name, system in ready.items():
            wall_s, cpu_s = _time(system, least_s)
            found[name].wall_s.append(wall_s)
            found[name].cpu_s.append(cpu_s)
    for name in ready:
        say(f"  {name}: {found[name].samples_per_s:,.0f} samples/s")
    return found


def _time(system: System, least_s: float) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of a round, the mean over as many as fill `least_s`."""
    rounds, wall, cpu = 0, time.perf_counter(), time.process_time()
    while rounds == 0 or time.perf_counter() - wall < least_s:
        system.round()
        rounds += 1
    return (time.perf_counter() - wall) / rounds, (time.process_time() - cpu) / rounds
