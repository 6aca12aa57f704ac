"""Interleaved repeats of a case, and their medians."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload

from suite.cases import Case, Entry
from suite.systems import Result

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All repeats of one system on one case."""

    name: str
    samples_per_round: int
    gateways: int
    results: tuple[Result, ...]

    @property
    def round_s(self) -> float:
        """Median seconds of a steady round, over all rounds of all repeats."""
        return statistics.median(second for result in self.results for second in result["round_seconds"])

    @property
    def samples_per_s(self) -> float:
        """Nominal samples of a round over its median seconds."""
        return self.samples_per_round / self.round_s

    @property
    def gateways_per_s(self) -> float:
        """Gateways of a round over its median seconds."""
        return self.gateways / self.round_s

    def median(self, name: str) -> float:
        """Return the median over repeats of something that a run wrote down once."""
        return statistics.median(result[name] for result in self.results)

    @property
    def repeat_round_s(self) -> list[float]:
        """Median seconds of a round in each repeat."""
        return [statistics.median(result["round_seconds"]) for result in self.results]

    def as_dict(self) -> dict[str, Any]:
        """Return medians and raw numbers as JSON values."""
        raw = [{name: value for name, value in r.items() if name != "final_weights"} for r in self.results]
        return {
            "name": self.name,
            "cold_start_s": self.median("cold_start_s"),
            "round_s": self.round_s,
            "samples_per_s": self.samples_per_s,
            "gateways_per_s": self.gateways_per_s,
            "peak_rss_mb": self.median("peak_rss_mb"),
            "own_peak_rss_mb": self.median("own_peak_rss_mb"),
            "repeats": raw,
        }


def measure(case: Case, repeats: int, folder: Path, say: Say) -> dict[str, Measured]:
    """Run all systems of a case in turn, `repeats` times over, so that a slow minute of the machine meets them all.

    Raises:
        RunFailed: one of them failed.
    """
    paths = _write(case, folder)
    results: dict[str, list[Result]] = {entry.label: [] for entry in case.entries}
    for repeat in range(case.repeats or repeats):
        for entry in case.entries:
            extra = (str(case.num_records),) if case.lazy else ()
            output = folder / f"{case.key}-{_slug(entry)}-{repeat}.json"
            result = entry.system.run(paths[entry.label], output, *extra)
            results[entry.label].append(result)
            say(f"  {entry.label}: {result['samples_per_s']:,.0f} samples/s, cold start {result['cold_start_s']:.1f} s")
    return {
        entry.label: Measured(
            name=entry.label,
            samples_per_round=case.job.samples_per_round,
            gateways=case.job.gateways,
            results=tuple(results[entry.label]),
        )
        for entry in case.entries
    }


def _write(case: Case, folder: Path) -> dict[str, Path]:
    """Write the case's data and weights once, and a workload.json for each entry beside them."""
    home = folder / case.key
    # Lazy shards are drawn in the actors: only the weights are read.
    stored = dataclasses.replace(case.job, gateways=1) if case.lazy else case.job
    workload.write(home, stored, 1 if case.lazy else case.num_records)
    return {
        entry.label: workload.write_description(home / f"{_slug(entry)}.json", case.job_of(entry))
        for entry in case.entries
    }


def _slug(entry: Entry) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in entry.label)
