"""Measure fedray's fast trainer alone: all gateways in one process, and the mean of their updates. No Ray, no files.

    PYTHON fedray_trainer.py WORKLOAD.json RESULT.json

What the bare loops and the floor are compared with, thread for thread. Batches are Poisson samples (or whole shards)
and the noise is the strong one that a run draws, a new key each time.
"""

from __future__ import annotations

import secrets
import sys

import fedray_job
import numpy as np
import torch
import workload
from measurement import Measurement

from fedray.algorithms.aggregation import weighted_sum
from fedray.algorithms.server_optimizer import ServerSGD
from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy import mechanism
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import new_trainer

CPU = torch.device("cpu")


def load_shards(job: workload.Workload) -> list[Shard]:
    """Return every gateway's records as an actor's cache holds them."""
    x, y = (torch.from_numpy(array) for array in job.load_data())
    return [Shard(x=own_x, y=own_y) for own_x, own_y in zip(x, y, strict=True)]


def run(job: workload.Workload, measurement: Measurement) -> dict[str, torch.Tensor]:
    """Run all rounds and return the final weights by state_dict name."""
    shards, model = load_shards(job), job.build_model()
    training = fedray_job.local_training(job, shards[0].num_records)
    trainer = new_trainer("stacked", model, training, CPU)
    layout, server, gateways = Layout.of(model), ServerSGD(), range(job.gateways)
    params, spec = layout.flatten(model), training.privacy
    for index in range(1, job.rounds + 1):
        keys = RoundKeys(round_key=secrets.token_bytes(32), round_index=index)
        updates = trainer.train(keys, params, gateways, shards)
        if level_of(spec).central_noise:
            updates = clip_rows(torch.from_numpy(updates), spec.clip_norm).numpy()
        total = weighted_sum(list(updates), np.ones(job.gateways).tolist(), CPU)
        arrived = ((0, job.gateways - 1),)
        mean = mechanism.aggregate(spec, keys, total, float(job.gateways), arrived)
        params, _ = server.step(params, mean, {})
        measurement.round_ended()
    layout.load(model, params)
    return dict(model.named_parameters())


def main(workload_path: str, result_path: str) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    fedray_job.check(job)
    torch.set_num_threads(job.threads)
    measurement = Measurement("fedray trainer", job, packages=("fedray",))
    measurement.write(result_path, run(job, measurement))


if __name__ == "__main__":
    main(*sys.argv[1:])
