"""Measure fedray's broadcast and gather alone, against memcpy of the same bytes in the same process.

    PYTHON transfer.py WORKLOAD.json RESULT.json

The pool and its actors are the real ones; only local training is replaced by an answer that is there already. A round
is timed from the driver's parameters to the driver's view of all updates: object store, the call of each actor. The
float64 sum that follows, and the check that it is finite, are timed apart (`sum_seconds`), as they move nothing between
processes. Bytes: the vector once out, one update of its size back per actor. memcpy copies as many between buffers that
have been touched before, on one thread: the fastest that it can be.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fedray_job
import numpy as np
import torch
import workload

from fedray.algorithms.aggregation import gather
from fedray.data.shards import RecordRules
from fedray.models.layout import Layout
from fedray.pool.pool import FailurePolicy
from fedray.pool.ray_pool import RayPool
from fedray.pool.worker import WorkerSetup
from fedray.privacy.streams import RoundKeys
from fedray.training.stacked import StackedTrainer
from fedray.training.trainer import Float32Array, GatewayShards

NUM_ROUNDS, WARM_UP = 30, 5
RECORD_SHAPE = (32,)


def answer(
    trainer: StackedTrainer, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
) -> Float32Array:
    """Stand for local training: the updates of each gateway, made once."""
    made: Float32Array | None = getattr(trainer, "_answer", None)
    if made is None:
        made = np.full((len(gateways), len(params)), 1e-3, np.float32)
        trainer._answer = made  # type: ignore[attr-defined]
    return made


@dataclass(frozen=True, kw_only=True)
class EchoSetup(WorkerSetup):
    """A setup that replaces local training in the process that unpickles it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        StackedTrainer.train = answer  # type: ignore[method-assign,assignment]
        self.__dict__.update(state)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of each round's transfer, of the sum after it, and of the memcpy in between; and the bytes moved."""

    rounds: list[float]
    sums: list[float]
    copies: list[float]
    size_bytes: int


def time_rounds(job: workload.Workload) -> Times:
    """Run the rounds, each followed by a memcpy of as many bytes."""
    model = job.build_model()
    layout = Layout.of(model)
    params = layout.flatten(model)
    rules = RecordRules.of(np.zeros((1, *RECORD_SHAPE), np.float32))
    training = fedray_job.local_training(job, job.batch_size)
    setup = EchoSetup(model=model, training=training, shards=[], rules=rules, engine="stacked")
    pool = RayPool(
        setup, job.processes, 1, "cpu", None, FailurePolicy(max_failures=0, round_timeout_s=60.0, drop=False)
    )
    target = np.ones_like(params)
    times = Times(rounds=[], sums=[], copies=[], size_bytes=params.nbytes * (1 + job.processes))
    try:
        pool.start()
        for index in range(1, NUM_ROUNDS + 1):
            keys = RoundKeys(round_key=bytes(32), round_index=index)
            marks = [time.perf_counter()]
            pool.begin(keys, params, range(job.processes))
            results = pool.collect()
            marks.append(time.perf_counter())
            total = gather(results, layout, torch.device("cpu"), index).total
            del results  # as the orchestrator does
            marks.append(time.perf_counter())
            for _ in range(1 + job.processes):
                np.copyto(target, params)
            marks.append(time.perf_counter())
            for found, (begin, end) in zip((times.rounds, times.sums, times.copies), pairwise(marks), strict=True):
                found.append(end - begin)
            if not np.isclose(float(total[0]), 1e-3 * job.processes):
                raise SystemExit("the gathered updates are not those that the actors sent")
    finally:
        pool.close()
    return times


def main(workload_path: str, result_path: str) -> None:
    """Measure and write bytes a second of both."""
    job = workload.read(workload_path)
    torch.set_num_threads(job.threads)
    times = time_rounds(job)
    median_s = {name: statistics.median(getattr(times, name)[WARM_UP:]) for name in ("rounds", "sums", "copies")}
    result = {
        "size_bytes": times.size_bytes,
        "round_seconds": times.rounds,
        "sum_seconds": times.sums,
        "memcpy_seconds": times.copies,
        "sum_s": median_s["sums"],
        "bytes_per_s": times.size_bytes / median_s["rounds"],
        "memcpy_bytes_per_s": times.size_bytes / median_s["copies"],
    }
    Path(result_path).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
