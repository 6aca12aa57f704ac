"""Measure the bare loop with Opacus: per-sample differential privacy, one gateway after the other, no framework.

    PYTHON opacus_loop.py WORKLOAD.json RESULT.json

What a user gets who writes federated learning by hand and does it well; it sets aside all cost of a simulator.
"""

from __future__ import annotations

import sys

import bare_loop
import torch
import workload
from measurement import Measurement
from opacus_client import OpacusClient


def main(workload_path: str, result_path: str) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    if job.privacy != "sample":
        raise SystemExit(f"opacus_loop measures privacy 'sample', got {job.privacy!r}: run plain_loop.py without")
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    measurement = Measurement("Opacus loop", job, packages=("opacus",))
    weights = bare_loop.run(job, OpacusClient(job), measurement)
    measurement.write(result_path, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
