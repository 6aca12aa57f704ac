"""Measure Flower's simulation on Ray, with Opacus in its clients (or without privacy, for the equality of weights).

    PYTHON flower.py WORKLOAD.json RESULT.json

Written for speed within Flower's own ways: one CPU a client (its default of two would leave half the workers), data
and model cached in each worker, no federated evaluation, no telemetry. PYTHON is that of the `flower` environment.
"""

from __future__ import annotations

import os

# Read when flwr and Ray are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers run at niceness 15; the systems without workers do not, and the comparison is on one footing.
os.environ.setdefault("RAY_worker_niceness", "0")

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import flower_client
import torch
import workload
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from measurement import Measurement


class StrictFedAvg(FedAvg):
    """FedAvg that stops at a failed client, which Flower would leave out of the mean: a faster, different job."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies as FedAvg does, once all of them are known to be good."""
        replies = list(replies)
        failures = [message.error.reason for message in replies if message.has_error()]
        if failures or len(replies) < self.min_train_nodes:
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, {len(failures)} failed: {failures[:1]}")
        return super().aggregate_train(server_round, replies)


def build_server(job: workload.Workload, path: str, measurement: Measurement) -> tuple[ServerApp, list[ArrayRecord]]:
    """Build the server and the list that receives its final parameters."""
    server = ServerApp()
    final: list[ArrayRecord] = []

    def mark_round(server_round: int, arrays: ArrayRecord) -> None:
        # The strategy's hook after each round; it also calls it before the first.
        if server_round > 0:
            measurement.round_ended()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = StrictFedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=job.gateways,
            min_available_nodes=job.gateways,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(job.load_weights()),
            num_rounds=job.rounds,
            train_config=ConfigRecord({"workload": path}),
            evaluate_fn=mark_round,
        )
        final.append(result.arrays)

    return server, final


def main(workload_path: str, result_path: str) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    if job.privacy not in ("sample", "none"):
        raise SystemExit(f"flower measures privacy 'sample' and 'none', got {job.privacy!r}")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(job.threads)
    measurement = Measurement("Flower + Opacus", job, packages=("flwr", "ray", "opacus"), tree=True)
    server, final = build_server(job, str(Path(workload_path).resolve()), measurement)
    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=job.gateways,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            # An address of "local": never a cluster that happens to run on the machine.
            "init_args": {"address": "local", "num_cpus": job.processes},
        },
    )
    if not final:
        raise SystemExit("Flower ended without a result: see its messages above")
    measurement.write(result_path, final[0].to_torch_state_dict(), processes=job.processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
