"""A Ray cluster of several nodes on this machine, in a process of its own: it lives until standard input closes.

The argument is JSON: {"nodes": [{"num_cpus", "num_gpus", "env"}, …], "hold": [{"num_cpus", "num_gpus"}, …]}; the first
node is the head, and each "hold" is an actor that takes its share before anybody else can. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from typing import Any

import ray
from ray.cluster_utils import Cluster


class Holder:
    """Does nothing but hold resources."""

    def ready(self) -> None:
        """Return when it holds them."""


def main(spec: dict[str, Any]) -> None:
    """Run the cluster."""
    # Socket paths must stay below 107 bytes: pytest's own temporary directories are too long.
    place = tempfile.mkdtemp(prefix="fc", dir="/tmp")
    cluster = Cluster()
    ids = []
    for number, node in enumerate(spec["nodes"]):
        env = node.pop("env", {})
        os.environ.update(env)
        head: dict[str, Any] = {"_temp_dir": place} if number == 0 else {}
        options = {key.removeprefix("_"): value for key, value in {**head, **node}.items()}
        ids.append(cluster.add_node(include_dashboard=False, **options).node_id)
        for name in env:
            del os.environ[name]
    holders = []
    if spec.get("hold"):
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        for held in spec["hold"]:
            holders.append(ray.remote(Holder).options(**held).remote())
        ray.get([holder.ready.remote() for holder in holders])
    print(json.dumps({"address": cluster.address, "nodes": ids}), flush=True)
    sys.stdin.read()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
