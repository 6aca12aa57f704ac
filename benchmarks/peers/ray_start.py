"""Start Ray and two actors that have imported torch, then leave: what any program on Ray and torch pays at least.

    PYTHON ray_start.py

Measured from outside, start to exit. Driver and actors import torch at the same time, as a program in a hurry would.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import logging
import sys

import ray

NUM_ACTORS = 2


@ray.remote(num_cpus=1)
class Actor:
    """Ready once torch is imported."""

    def ready(self) -> int:
        import torch  # here, as what an actor imports is what is measured

        return int(torch.ones(1).item())


def main() -> int:
    """Start, wait until all actors are ready, stop."""
    ray.init(
        address="local", num_cpus=NUM_ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    ready = [actor.ready.remote() for actor in [Actor.remote() for _ in range(NUM_ACTORS)]]
    import torch  # noqa: F401 - while the actors do the same

    done = ray.get(ready)
    ray.shutdown()
    return 0 if done == [1] * NUM_ACTORS else 1


if __name__ == "__main__":
    sys.exit(main())
