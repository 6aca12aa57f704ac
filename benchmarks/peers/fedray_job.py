"""A workload in fedray's own words: its privacy constants, local training and settings.

It must not know whether gateways run in actors or in this process.
"""

from __future__ import annotations

from pathlib import Path

import workload

from fedray.config.settings import RunConfig
from fedray.privacy.spec import PrivacySpec
from fedray.tasks.classification import cross_entropy
from fedray.training.trainer import LocalTraining

DELTA = 1e-5


def check(job: workload.Workload) -> None:
    """Refuse what fedray does not do.

    Raises:
        SystemExit: the workload asks for records in a fixed order.
    """
    if job.sampling == "sequential":
        raise SystemExit("fedray samples every batch at random, got 'sequential': run it with 'poisson' or 'full'")


def batch_size(job: workload.Workload, num_records: int) -> int:
    """Return B; a B of the whole shard makes the sample rate 1."""
    return num_records if job.sampling == "full" else job.batch_size


def local_training(job: workload.Workload, num_records: int) -> LocalTraining:
    """Return how gateways of `num_records` each train."""
    size = batch_size(job, num_records)
    spec = PrivacySpec(
        noise_level=job.privacy,
        noise_multiplier=job.noise_multiplier,
        clip_norm=job.clip_norm,
        delta=DELTA,
        batch_size=size,
        sample_rate=size / num_records,
        local_steps=job.local_steps,
        expected_cohort=float(job.gateways),
    )
    return LocalTraining(privacy=spec, optimizer="adam", lr=job.lr, loss=cross_entropy)


def run_config(job: workload.Workload, num_records: int, out: Path) -> RunConfig:
    """Return the settings of the whole program: one actor a process of the workload, on CPU."""
    return RunConfig().resolve(
        gateways=job.gateways,
        rounds=job.rounds,
        noise_level=job.privacy,
        local_steps=job.local_steps,
        batch_size=batch_size(job, num_records),
        lr=job.lr,
        noise_multiplier=None if job.privacy == "none" else job.noise_multiplier,
        clip_norm=job.clip_norm,
        delta=DELTA,
        samples_per_gateway=num_records,
        gateways_per_actor=-(-job.gateways // job.processes),
        device="cpu",
        out=out,
        quiet=True,
    )
