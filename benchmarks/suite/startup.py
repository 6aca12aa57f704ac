"""From the shell's return key to the prompt: fedray's default job, the same in Flower, and Ray with torch alone."""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload

from suite import PEERS
from suite.cases import job
from suite.runs import Say
from suite.systems import FLOWER, time_command

COMMAND = ("-m", "fedray", "--gateways", "16", "--noise-level", "sample")


@dataclass(frozen=True, kw_only=True)
class StartToExit:
    """Seconds of each repeat; none where it was left out."""

    fedray: tuple[float, ...]
    flower: tuple[float, ...]
    ray_alone: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return medians and raw numbers as JSON values."""
        rows = {"fedray": self.fedray, "flower": self.flower, "ray_alone": self.ray_alone}
        return {
            name: {"median_s": statistics.median(seconds), "seconds": list(seconds)}
            for name, seconds in rows.items()
            if seconds
        }


def measure(repeats: int, folder: Path, say: Say) -> StartToExit:
    """Measure in turn, `repeats` times.

    Flower does the default job's training (10 rounds × 16 steps, B 64, 4096 records a gateway, MLP 16-32-4); fedray does
    its scoring, ledger, checkpoints and report besides.

    Raises:
        RunFailed: one of them failed.
    """
    path = workload.write(
        folder / "start",
        job(model="default_mlp", rounds=10, local_steps=16, batch_size=64, lr=0.02, optimizer="fused_adam"),
        num_records=4096,
    )
    found: dict[str, list[float]] = {"fedray": [], "flower": [], "ray_alone": []}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            found["fedray"].append(time_command([sys.executable, *COMMAND], cwd=Path(scratch)))
        found["ray_alone"].append(time_command([sys.executable, str(PEERS / "ray_start.py")]))
        python, output = str(FLOWER.environment.python), folder / f"start-flower-{repeat}.json"  # type: ignore[union-attr]
        found["flower"].append(time_command([python, str(PEERS / FLOWER.script), str(path), str(output)]))
        say("  start to exit: " + ", ".join(f"{name} {s[-1]:.1f} s" for name, s in found.items() if s))
    return StartToExit(**{name: tuple(seconds) for name, seconds in found.items()})
