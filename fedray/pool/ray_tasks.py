"""Runs many independent calls as Ray tasks, for sweeps; knows nothing of gateways."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedray.errors import FedrayError, RunFailedError
from fedray.pool import connection

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    address: str | None,
    done: Callable[[Result], None],
    num_gpus: int = 0,
) -> list[Result]:
    """Call a module's function once for each item, one core a call, and return the results in the items' order.

    Args:
        function: Importable where tasks run.
        items: What it is called with.
        address: --ray-address; None for RAY_ADDRESS if set, else a local Ray.
        done: Told each result as it becomes ready.
        num_gpus: GPUs that each call takes.

    Raises:
        InputError: Nothing answers at the address, or a call raised it.
        FedrayError: A call raised it.
        RunFailedError: A call failed in another way.
    """
    link = connection.connect(address)
    ray = link.ray
    try:
        remote = ray.remote(_call).options(num_cpus=1, num_gpus=num_gpus, max_retries=1)
        calls = [remote.remote(function, item, os.getcwd()) for item in items]
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, num_returns=1)
            try:
                done(ray.get(ready[0]))
            except ray.exceptions.RayError as error:
                for call in pending:
                    ray.cancel(call)
                cause = getattr(error, "cause", None)
                if isinstance(cause, FedrayError):
                    raise cause from None
                raise RunFailedError(f"a task of the sweep failed: {str(error).strip().splitlines()[-1]}") from error
        results: list[Result] = ray.get(calls)
        return results
    finally:
        link.close()


def _call(function: Callable[[Item], Result], item: Item, directory: str) -> Result:
    if os.path.isdir(directory) and directory not in sys.path:
        sys.path.insert(0, directory)  # where users keep the modules that --dataset and --model name
    return function(item)
