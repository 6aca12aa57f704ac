"""Flower's client side: what each of its Ray workers does with a training message.

It is a module of its own, so that workers import it once: what it caches (data, model, optimizer) then lives as long
as the worker, where functions pickled out of the main script would lose it with every message.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import workload
from documented_client import DocumentedClient
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus_client import OpacusClient
from plain_client import PlainClient

app = ClientApp()


@dataclass(frozen=True, kw_only=True)
class Worker:
    """All that a worker keeps between gateways."""

    job: workload.Workload
    client: OpacusClient | DocumentedClient | PlainClient
    x: torch.Tensor
    y: torch.Tensor


@cache
def worker(path: str) -> Worker:
    """Build the worker's state, once a process."""
    job = workload.read(path)
    torch.set_num_threads(job.threads)
    x, y = (torch.from_numpy(array) for array in job.load_data())
    if job.privacy == "none":
        client: OpacusClient | DocumentedClient | PlainClient = PlainClient(job)
    else:
        client = DocumentedClient(job) if job.clients == "documented" else OpacusClient(job)
    return Worker(job=job, client=client, x=x, y=y)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one gateway for a round and answer with its parameters."""
    config = message.content["config"]
    state = worker(config["workload"])
    gateway = int(context.node_config["partition-id"])
    round_number = int(config["server-round"]) - 1  # Flower counts from 1, the batches' keys from 0.
    if state.job.privacy == "sample":
        # A stream of noise a gateway and round, whichever worker runs it.
        torch.manual_seed((state.job.seed * state.job.rounds + round_number) * state.job.gateways + gateway)
    received = message.content["arrays"].to_torch_state_dict()
    batches = state.job.batches(round_number, gateway, state.x.shape[1])
    state.client.train(list(received.values()), state.x[gateway], state.y[gateway], batches)
    content = RecordDict(
        {
            "arrays": ArrayRecord(state.client.model.state_dict()),
            "metrics": MetricRecord({"num-examples": state.x.shape[1]}),
        }
    )
    return Message(content=content, reply_to=message)
