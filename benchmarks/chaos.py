"""Whether a run survives anything: 100 runs, random actors killed (SIGKILL) at random times, all must end alike.

    python benchmarks/chaos.py [--runs N] [--shots N]

Params bit for bit, ledger, metrics (but for the clock) and epsilon are compared with an undisturbed run. The result is a
dated JSON and Markdown in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from suite import RESULTS, machine, report  # noqa: E402

from tests.recovery import assassin  # noqa: E402
from tests.recovery.jobs import outcome  # noqa: E402

LEVEL: Any = "sample"


def undisturbed(place: Path) -> float:
    """Run the job in peace; return the seconds that its rounds took."""
    clock = assassin.Clock()
    assassin.train(place, clock, noise_level=LEVEL)
    return clock.seconds


def disturbed(run: Path, seed: int, shots: int, span_s: float, wanted: dict[str, Any]) -> dict[str, Any]:
    """Run the job once under fire and compare its outcome."""
    attack = assassin.attack(run, seed, span_s, random.Random(-seed).randint(1, shots), noise_level=LEVEL)
    found = outcome(run)
    shutil.rmtree(run)
    return {
        "seed": seed,
        "kills": attack.kills,
        "lost_in_rounds": attack.lost_in_rounds,
        "seconds": round(attack.seconds, 2),
        "equal": {name: found[name] == value for name, value in wanted.items()},
    }


def main() -> int:
    """Run the benchmark; exit with 1 when a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="runs that lose an actor; others are counted apart")
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
        quiet = [undisturbed(place / f"whole-{number}") for number in range(3)]
        wanted = outcome(place / "whole-0")
        runs: list[dict[str, Any]] = []
        while sum(map(bool, (run["lost_in_rounds"] for run in runs))) < arguments.runs:
            runs.append(disturbed(place / "run", len(runs), arguments.shots, min(quiet), wanted))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    found = {
        "date": report.now(),
        "machine": about,
        "job": {**assassin.JOB, "noise_level": LEVEL},
        "undisturbed_s": [round(seconds, 2) for seconds in quiet],
        "runs": runs,
    }
    return 0 if write(found) else 1


def write(found: dict[str, Any]) -> bool:
    """Write the report; return whether all runs ended alike."""
    runs = found["runs"]
    hit = [run for run in runs if run["lost_in_rounds"]]
    alike, all_alike = (sum(all(run["equal"].values()) for run in some) for some in (hit, runs))
    lost = [index for run in runs for index in run["lost_in_rounds"]]
    per_round = {index: lost.count(index) for index in sorted(set(lost))}
    text = f"""# Chaos: {alike} of {len(hit)} runs that lost actors ended as the undisturbed one ({found["date"][:10]})

A random actor is killed (SIGKILL) at random times while rounds run. Compared bit for bit: the final model, the ledger, the
metrics but for the clock, the privacy card, and the names of all files.

- {sum(run["kills"] for run in runs)} kills; {len(lost)} lost actors were replaced, at least one in each of {len(hit)} runs. \
{len(runs) - len(hit)} more runs ended before a shot fell or was noticed; {all_alike} of all {len(runs)} ended alike.
- Actors lost by round: {", ".join(f"{index}: {count}" for index, count in per_round.items())}.
- Seconds that the rounds of a run took: median {statistics.median(run["seconds"] for run in hit):.1f} with losses, \
{statistics.median(found["undisturbed_s"]):.1f} undisturbed.
- Job: {json.dumps(found["job"])}
- Machine: {machine.one_line(found["machine"])}.

Again: `python benchmarks/chaos.py --runs {len(hit)}`
"""
    stem = report.stem_of("chaos", found["date"])
    report.write_json(RESULTS / f"{stem}.json", found)
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)
    return all_alike == len(runs)


if __name__ == "__main__":
    sys.exit(main())
