"""Measure the bare loop without privacy: plain PyTorch, one gateway after the other, no framework.

    PYTHON plain_loop.py WORKLOAD.json RESULT.json

Its sequential or full batches are what the equality of all systems' final weights is checked against.
"""

from __future__ import annotations

import sys

import bare_loop
import torch
import workload
from measurement import Measurement
from plain_client import PlainClient


def main(workload_path: str, result_path: str) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    if job.privacy != "none":
        raise SystemExit(f"plain_loop measures privacy 'none', got {job.privacy!r}: run opacus_loop.py with it")
    torch.set_num_threads(job.threads)
    measurement = Measurement("plain loop", job)
    weights = bare_loop.run(job, PlainClient(job), measurement)
    measurement.write(result_path, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
