"""Measure the whole of fedray: Ray, actors, ledger, checkpoints, accounting; through the Python entry.

    PYTHON fedray_run.py WORKLOAD.json RESULT.json [RECORDS]

Gateways hold the workload's data; with RECORDS they are lazy instead, as many records each, drawn in the actor that
trains them, and data.npz is not read. A round is timed from the end of the one before it, so whatever the program does
in between counts; `round_phases` holds the medians of the run's own metrics. Nothing is held out, so nothing is scored:
Flower, which it is compared with, does not score either.
"""

from __future__ import annotations

import os

# Read when Ray is imported. Its workers run at niceness 15 otherwise; systems without workers do not.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedray_job
import torch
import workload
from measurement import Measurement

from fedray.orchestrator.rounds import Orchestrator, Run
from fedray.reports.callback import Callback, RoundDone


class RoundClock(Callback):
    """Marks the ends of rounds."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def on_round(self, done: RoundDone) -> None:
        self._measurement.round_ended()


@dataclass(frozen=True, kw_only=True)
class LazyShards:
    """Shards that are drawn where they are trained on, like the workload's own."""

    job: workload.Workload
    num_records: int

    def __len__(self) -> int:
        return self.job.gateways

    def __getitem__(self, gateway: int) -> tuple[workload.Array, workload.Array]:
        if not 0 <= gateway < len(self):
            raise IndexError(gateway)
        own = dataclasses.replace(self.job, gateways=1, seed=self.job.seed + gateway)
        x, y = workload.synthesise(own, self.num_records)
        return x[0], y[0]


def load_shards(job: workload.Workload, lazy_records: int | None) -> tuple[Any, int]:
    """Return the shards and how many records each one holds."""
    if lazy_records is not None:
        return LazyShards(job=job, num_records=lazy_records), lazy_records
    x, y = job.load_data()
    return list(zip(x, y, strict=True)), x.shape[1]


def phases(run: Run) -> dict[str, float]:
    """Return the median seconds of each phase, the first round left out where there are others."""
    steady: Sequence[dict[str, Any]] = run.history[1:] or run.history
    names = steady[0]["seconds"]
    return {name: statistics.median(record["seconds"][name] for record in steady) for name in names}


def main(workload_path: str, result_path: str, records: str | None = None) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    fedray_job.check(job)
    torch.set_num_threads(job.threads)
    measurement = Measurement("fedray", job, packages=("fedray", "ray"), tree=True)
    shards, num_records = load_shards(job, None if records is None else int(records))
    with tempfile.TemporaryDirectory() as folder:
        config = fedray_job.run_config(job, num_records, Path(folder) / "run")
        run = Orchestrator(shards, model=job.build_model, config=config, callbacks=[RoundClock(measurement)]).run()
    if job.rounds == 1:
        measurement.count_first_round(run.history[0]["seconds"]["total"])
    measurement.write(
        result_path, dict(run.model.named_parameters()), processes=job.processes, round_phases=phases(run)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
