"""Whether a run survives anything: 100 runs, random actors killed (SIGKILL) at random times, all must end alike.

    python benchmarks/chaos.py [--runs N] [--shots N]

Params bit for bit, ledger, metrics (but for the clock) and epsilon are compared with an undisturbed run. The result is a
dated JSON and Markdown in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from suite import RESULTS, machine  # noqa: E402

from fedray.config import RunConfig  # noqa: E402
from fedray.orchestrator import Orchestrator  # noqa: E402
from tests.recovery.assassin import Assassin  # noqa: E402
from tests.recovery.jobs import outcome  # noqa: E402

JOB: dict[str, Any] = {
    "gateways": 4,
    "gateways_per_actor": 2,
    "rounds": 10,
    "local_steps": 16,
    "batch_size": 32,
    "samples_per_gateway": 256,
    "noise_level": "sample",
    "seed": 5,
    "max_failures": 50,
}


class Losses(logging.Handler):
    """Counts the lost actors that fedray saw, by round."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a log line."""
        words = dict(word.partition("=")[::2] for word in record.getMessage().split() if "=" in word)
        if words.get("event") == "actor_lost":
            self.rounds.append(int(words["round"]))


def train(out: Path) -> float:
    """Run the job; return its seconds."""
    began = time.monotonic()
    Orchestrator(config=RunConfig(**JOB, out=out)).run()
    return time.monotonic() - began


def disturbed(place: Path, seed: int, shots: int, span_s: float, wanted: dict[str, Any]) -> dict[str, Any]:
    """Run the job once under fire and compare its outcome."""
    losses, log = Losses(), logging.getLogger("fedray")
    log.addHandler(losses)
    rng = random.Random(seed)
    assassin = Assassin(rng, rng.randint(1, shots), span_s)
    assassin.start()
    try:
        seconds = train(place / "run")
    finally:
        assassin.stop()
        log.removeHandler(losses)
    found = outcome(place / "run")
    shutil.rmtree(place / "run")
    return {
        "seed": seed,
        "kills": assassin.kills,
        "lost_in_rounds": losses.rounds,
        "seconds": round(seconds, 2),
        "equal": {name: found[name] == value for name, value in wanted.items()},
    }


def main() -> int:
    """Run the benchmark; exit with 1 when a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--shots", type=int, default=3, help="actors killed in a run, at most")
    arguments = parser.parse_args()
    import ray

    about = machine.describe()
    place = Path(tempfile.mkdtemp(prefix="fc", dir="/tmp"))
    ray.init(
        address="local", num_cpus=2, num_gpus=0, object_store_memory=150 * 10**6, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", _temp_dir=str(place / "ray"),
    )  # fmt: skip
    try:
        undisturbed = [train(place / f"whole-{number}") for number in range(3)]
        wanted = outcome(place / "whole-0")
        runs = []
        for seed in range(arguments.runs):
            runs.append(disturbed(place, seed, arguments.shots, 1.5 * min(undisturbed), wanted))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "job": JOB,
        "undisturbed_s": [round(seconds, 2) for seconds in undisturbed],
        "runs": runs,
    }
    return 0 if write(report) else 1


def write(report: dict[str, Any]) -> bool:
    """Write the report; return whether all runs ended alike."""
    runs = report["runs"]
    alike = [run for run in runs if all(run["equal"].values())]
    hit = [run for run in runs if run["lost_in_rounds"]]
    lost = [index for run in runs for index in run["lost_in_rounds"]]
    per_round = {index: lost.count(index) for index in sorted(set(lost))}
    text = f"""# Chaos: {len(alike)} of {len(runs)} runs ended as the undisturbed one ({report["date"][:10]})

A random actor is killed (SIGKILL) at random times. Compared bit for bit: the final model, the ledger, the metrics but
for the clock, the privacy card, and the names of all files.

- {sum(run["kills"] for run in runs)} kills in {len(runs)} runs; {len(hit)} runs lost an actor that they had to replace.
- Actors lost by round (0: before the first): {", ".join(f"{index}: {count}" for index, count in per_round.items())}.
- Seconds a run: median {statistics.median(run["seconds"] for run in runs):.1f} under fire, \
{statistics.median(report["undisturbed_s"]):.1f} undisturbed (the start of actors included).
- Job: {json.dumps(report["job"])}
- Machine: {machine.one_line(report["machine"])}.

Again: `python benchmarks/chaos.py --runs {len(runs)}`
"""
    stem = f"chaos-{report['date'][:10]}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)
    return len(alike) == len(runs)


if __name__ == "__main__":
    sys.exit(main())
