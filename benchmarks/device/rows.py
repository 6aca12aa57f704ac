"""What the GPU benchmark measures, row by row: which system trains which model for how many gateways, and how fast.

Every row is handed over as soon as it is there, so that a run that ends early leaves what it has found.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from families import gate
from families.family import Family
from families.job import BATCH, Job, Refused, reason
from families.systems import Fedray, Opacus, Plain, PlainLoop, System

from fedray.orchestrator.plan import Plan
from fedray.privacy.streams import RoundKeys

TOLERANCE = 1e-4  # of the device's clipped sums against the CPU's (relative L2)
GATEWAYS = (16, 256, 4096)
ALL, ONE, HOOKS, GHOST, LOOP, SHARED = (
    *("fedray, all at once", "fedray, one gateway at a time", "Opacus hooks", "Opacus ghost"),
    *("no privacy, one gateway at a time", "no privacy, one large batch"),
)
_SHARDS = 16  # that differ
_MOST_ROUNDS = 50


@dataclass(frozen=True, kw_only=True)
class Equality:
    """The first step's clipped sums of a model, on the device against the CPU.

    Args:
        model: Its key.
        distance: Relative L2 over all gateways' sums; None where the device failed.
        repeatable: Whether a second call gave the same bits.
        failure: Why the device failed.
    """

    model: str
    distance: float | None = None
    repeatable: bool | None = None
    failure: str | None = None

    @property
    def met(self) -> bool:
        """Whether the two are equal."""
        return self.distance is not None and self.distance <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Args:
        model: Its key.
        system: A name of this module.
        gateways: How many train in a round.
        engine: How, in a word.
        samples: Expected records a round.
        round_s: Seconds of each timed round.
        first_round_s: Seconds of building and of the first round.
        peak_mb: Most memory that torch held on the device; 0 on a CPU.
        failure: Why there are no figures.
    """

    model: str
    system: str
    gateways: int
    engine: str = ""
    samples: int = 0
    round_s: tuple[float, ...] = ()
    first_round_s: float | None = None
    peak_mb: float = 0.0
    failure: str | None = None

    @property
    def samples_per_s(self) -> float | None:
        """By the median round."""
        return self.samples / statistics.median(self.round_s) if self.round_s else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "samples_per_s": self.samples_per_s}


class Benchmark:
    """All measurements on one device within a time budget.

    Args:
        families: The models by key.
        device: Where.
        deadline: `time.monotonic()` at which nothing new begins.
        least_s: Seconds that a row is timed for at least.
        sizes: Gateways of the rows that train all at once; the first size is that of all other rows.
    """

    def __init__(
        self,
        families: dict[str, Family],
        device: torch.device,
        deadline: float,
        least_s: float = 1.0,
        sizes: tuple[int, ...] = GATEWAYS,
    ) -> None:
        self._families = families
        self._device = device
        self._deadline = deadline
        self._least_s = least_s
        self._sizes = sizes
        self._plans: dict[str, Plan] = {}
        self._rates: dict[tuple[str, str], float] = {}

    def equalities(self) -> Iterator[Equality]:
        """Yield, model by model, how far the device is from the CPU."""
        for key, family in self._families.items():
            try:
                yield self._equality(key, Job(family, gateways=gate.GATEWAYS, local_steps=1, batch=gate.BATCH))
            except Exception as error:  # whatever a device does to a model: the other models are still worth measuring
                yield Equality(model=key, failure=reason(error))

    def _equality(self, key: str, job: Job) -> Equality:
        plan, repeatable = job.plan(), True

        def apart(keys: RoundKeys) -> float:
            nonlocal repeatable
            here = gate.first_sums(plan, job, keys)
            there, again = (gate.first_sums(plan, job, keys, self._device) for _ in range(2))
            repeatable &= all(map(np.array_equal, there.sums, again.sums))
            return gate.distance(there.sums, here.sums)

        return Equality(model=key, distance=gate.least_distance(apart, TOLERANCE), repeatable=repeatable)

    def rows(self) -> Iterator[Row]:
        """Yield rows, those of few gateways first; systems that go gateway by gateway are as fast with many."""
        few, *more = self._sizes
        for key in self._families:
            for system in (ALL, ONE, SHARED, LOOP, HOOKS, GHOST):
                yield self._row(key, system, few)
        for gateways in more:
            for key in self._families:
                yield self._row(key, ALL, gateways)

    def _row(self, key: str, system: str, gateways: int) -> Row:
        family = self._families[key]
        left_s = self._deadline - time.monotonic()
        samples = gateways * family.local_steps * BATCH
        # The first round and one more, with room for what the first one has to prepare.
        expected_s = 2.5 * samples / self._rates[key, system] if (key, system) in self._rates else self._least_s
        if left_s < expected_s:
            failure = f"not measured: {left_s:.0f} s are left and it would take {expected_s:.0f} s"
            return Row(model=key, system=system, gateways=gateways, failure=failure)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            row = self._measured(key, system, gateways)
        except Exception as error:  # a row that fails is a finding, and the others are still worth measuring
            failure = str(error) if isinstance(error, Refused) else reason(error)
            return Row(model=key, system=system, gateways=gateways, failure=failure)
        self._rates[key, system] = row.samples_per_s or 1.0
        return row

    def _measured(self, key: str, system: str, gateways: int) -> Row:
        began = time.perf_counter()
        job = Job(self._families[key], gateways, num_shards=_SHARDS, device=self._device)
        if system in (ALL, ONE) and key not in self._plans:
            self._plans[key] = job.plan()
        trained = self._system(system, job, self._plans.get(key))
        trained.round()
        first_round_s = time.perf_counter() - began
        seconds: list[float] = []
        while not seconds or (sum(seconds) < self._least_s and len(seconds) < _MOST_ROUNDS):
            start = time.perf_counter()
            trained.round()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return Row(
            model=key,
            system=system,
            gateways=gateways,
            engine=trained.engine,
            samples=trained.samples,
            round_s=tuple(seconds),
            first_round_s=first_round_s,
            peak_mb=peak / 2**20,
        )

    def _system(self, name: str, job: Job, plan: Plan | None) -> System:
        builders: dict[str, Callable[[], System]] = {
            ALL: lambda: Fedray(job, plan),
            ONE: lambda: Fedray(job, plan, one_by_one=True),
            HOOKS: lambda: Opacus(job),
            GHOST: lambda: Opacus(job, ghost=True),
            LOOP: lambda: PlainLoop(job),
            SHARED: lambda: Plain(job),
        }
        if name in (HOOKS, GHOST):
            try:
                importlib.import_module("opacus")
            except ImportError as error:
                raise Refused(f"Opacus is not here ({error})") from error
        return builders[name]()


class TimeUp(BaseException):
    """The time budget is spent; what was found so far is kept. No Exception, which trainers take for the user's."""
