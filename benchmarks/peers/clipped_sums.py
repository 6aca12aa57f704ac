"""Check fedray's clipped gradient sums against Opacus': the same private step, one release at a time.

    PYTHON clipped_sums.py WORKLOAD.json RESULT.json

Both trainers take one local step from the workload's weights on the same keyed batches; an observer catches what each
would add its noise to. The reference trainer is Opacus (GradSampleModule and DPOptimizer). One step, as from the second
on noise would carry float32's rounding into everything.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import fedray_job
import numpy as np
import torch
import workload
from fedray_trainer import CPU, load_shards

from fedray.models.layout import Layout
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import Engine, new_trainer
from fedray.training.trainer import Release


class Recorder:
    """Keeps each gateway's clipped sum and batch, and changes nothing."""

    def __init__(self) -> None:
        self.clipped: list[np.ndarray] = []
        self.batches: list[np.ndarray] = []

    def before_noise(self, gateway: int, step: int, batch: np.ndarray, clipped: torch.Tensor) -> torch.Tensor:
        self.clipped.append(clipped.double().numpy().copy())
        self.batches.append(batch)
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def record(engine: Engine, job: workload.Workload) -> Recorder:
    """Train one step of all gateways with an engine and return what was seen."""
    shards, model, recorder = load_shards(job), job.build_model(), Recorder()
    trainer = new_trainer(engine, model, fedray_job.local_training(job, shards[0].num_records), CPU)
    trainer.observer = recorder
    keys = RoundKeys(round_key=bytes(32), round_index=1)
    trainer.train(keys, Layout.of(model).flatten(model), range(job.gateways), shards)
    return recorder


def main(workload_path: str, result_path: str) -> None:
    """Compare the two and write the relative L2 distance of all sums as one vector."""
    job = dataclasses.replace(workload.read(workload_path), local_steps=1)
    torch.set_num_threads(job.threads)
    stacked, opacus = record("stacked", job), record("opacus", job)
    ours, theirs = (np.stack(recorder.clipped) for recorder in (stacked, opacus))
    result = {
        "distance": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        "same_batches": all(map(np.array_equal, stacked.batches, opacus.batches)),
        "sums": len(ours),
    }
    Path(result_path).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
