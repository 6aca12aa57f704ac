"""A Ray cluster of several nodes on this machine, in a process of its own: it lives until standard input closes.

The first argument is JSON: [{"num_cpus", "num_gpus", "env"}, …]; the first node is the head. The second one is what starts
Ray's workers, see tests/zygote.py. Prints one line of JSON. Each line of standard input is a list
[{"num_cpus", "num_gpus"}, …] of what actors hold from now on, in place of what they held; "held" is printed when they do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.zygote import forked_workers


class Holder:
    """Does nothing but hold resources."""

    def ready(self) -> None:
        """Return when it holds them."""


def main(nodes: list[dict[str, Any]], launcher: str) -> None:
    """Run the cluster."""
    # Socket paths must stay below 107 bytes: pytest's own temporary directories are too long.
    place = tempfile.mkdtemp(prefix="fc", dir="/tmp")
    cluster = Cluster()
    ids = []
    for number, node in enumerate(nodes):
        env = node.pop("env", {})
        os.environ.update(env)
        head: dict[str, Any] = {"_temp_dir": place} if number == 0 else {}
        options = {key.removeprefix("_"): value for key, value in {**head, **node}.items()}
        with forked_workers(launcher):
            ids.append(cluster.add_node(include_dashboard=False, **options).node_id)
        for name in env:
            del os.environ[name]
    print(json.dumps({"address": cluster.address, "nodes": ids}), flush=True)
    holders: list[Any] = []
    for line in sys.stdin:
        if not ray.is_initialized():
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        for holder in holders:
            ray.kill(holder)
        deadline = time.monotonic() + 60
        while ray.available_resources().get("GPU") != ray.cluster_resources()["GPU"]:
            assert time.monotonic() < deadline, "somebody else holds GPUs as well"
            time.sleep(0.05)
        holders = [ray.remote(Holder).options(**held).remote() for held in json.loads(line)]
        ray.get([holder.ready.remote() for holder in holders])
        print("held", flush=True)
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
