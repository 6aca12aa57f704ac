"""The systems that are measured, and how one run of one of them is made in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environments

from suite import PEERS

TIMEOUT_S = 3600.0
# Ray's workers run at niceness 15 unless told otherwise; the systems without workers run at 0, and so shall all.
SETTINGS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
Result = dict[str, Any]


class RunFailed(RuntimeError):
    """A measured program ended with an error; the message ends with what it said last."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One measured system: its name in tables, its script, and the environment that it needs (None: ours)."""

    name: str
    script: str
    environment: environments.Environment | None = None

    def run(self, workload: Path, result: Path, *arguments: str) -> Result:
        """Run the script on a workload.json and return what it wrote.

        Raises:
            RunFailed: it did not succeed.
        """
        python = sys.executable if self.environment is None else str(self.environment.python)
        time_command([python, str(PEERS / self.script), str(workload), str(result), *arguments])
        content: Result = json.loads(result.read_text())
        return content


FEDRAY_TRAINER = System(name="fedray trainer", script="fedray_trainer.py")
FEDRAY = System(name="fedray", script="fedray_run.py")
OPACUS_LOOP = System(name="Opacus loop", script="opacus_loop.py")
PLAIN_LOOP = System(name="plain loop", script="plain_loop.py")
FLOOR = System(name="floor", script="floor.py")
FLOWER = System(name="Flower + Opacus", script="flower.py", environment=environments.FLOWER)
PFL = System(name="pfl", script="pfl_research.py", environment=environments.PFL)
CLIPPED_SUMS = System(name="clipped sums", script="clipped_sums.py")
TRANSFER = System(name="transfer", script="transfer.py")


def time_command(command: list[str], cwd: Path | None = None) -> float:
    """Run a command and return its seconds from start to exit.

    Raises:
        RunFailed: it took too long, or its exit code is not 0.
    """
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=os.environ | SETTINGS, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{' '.join(command)} did not end within {TIMEOUT_S:g} s") from error
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RunFailed(f"{' '.join(command)} ended with exit code {done.returncode}:\n{tail}")
    return seconds
