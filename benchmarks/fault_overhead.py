"""What fault handling and checkpoints cost when nothing fails.

    python benchmarks/fault_overhead.py [--repeats N]

Runs with the default --max-failures and with --max-failures 0 take turns on one Ray; then the time spent in charges and
checkpoints is set against the rounds' own, which are shorter than the half second from which on the bar must hold.
The result is a dated JSON and Markdown in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suite import RESULTS, machine, report

from fedray.config.settings import RunConfig
from fedray.orchestrator.rounds import Orchestrator
from fedray.privacy import ledger
from fedray.rundir.directory import RunDirectory

JOB: dict[str, Any] = {"gateways": 16, "noise_level": "sample", "seed": 1, "rounds": 12, "local_steps": 64}
WRITES = [
    (ledger, "append_durably"),
    (RunDirectory, "note_ledger"),
    (RunDirectory, "append_metrics"),
    (RunDirectory, "save"),
]


def speed(out: Path, max_failures: int) -> tuple[float, float]:
    """Run the job; return its median samples/s and seconds a round, the first left out."""
    run = Orchestrator(config=RunConfig().resolve(**JOB, max_failures=max_failures, out=out)).run()
    shutil.rmtree(out)
    rounds = run.history[1:]
    return (
        statistics.median(record["samples_per_s"] for record in rounds),
        statistics.median(record["seconds"]["total"] for record in rounds),
    )


def timed(owner: Any, name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Replace a function by one that also adds up its seconds; return the original."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

    setattr(owner, name, call)
    return original


def write_share(out: Path) -> dict[str, float]:
    """Run the job; return the share of its rounds' time that each kind of write takes."""
    spent: dict[str, float] = {}
    originals = [(owner, name, timed(owner, name, spent)) for owner, name in WRITES]
    try:
        run = Orchestrator(config=RunConfig().resolve(**JOB, out=out)).run()
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    shutil.rmtree(out)
    total = sum(record["seconds"]["total"] for record in run.history)
    return {name: seconds / total for name, seconds in spent.items()}


def main() -> int:
    """Run the benchmark; exit with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    import ray

    about = machine.describe()
    place = Path(tempfile.mkdtemp(prefix="fo", dir="/tmp"))
    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=str(place / "ray"),
    )  # fmt: skip
    pairs: list[dict[str, Any]] = []
    try:
        for number in range(repeats):
            pair: dict[str, Any] = {}
            for failures in (10, 0) if number % 2 else (0, 10):
                pair[str(failures)], pair[f"seconds_{failures}"] = speed(place / "run", failures)
            pairs.append(pair)
            print(json.dumps(pair), file=sys.stderr, flush=True)
        shares = [write_share(place / "run") for _ in range(3)]
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    ratio = statistics.median(pair["10"] / pair["0"] for pair in pairs)
    share = statistics.median(sum(each.values()) for each in shares)
    seconds = statistics.median(pair["seconds_10"] for pair in pairs)
    found = {
        "date": report.now(),
        "machine": about,
        "job": JOB,
        "pairs": pairs,
        "write_shares": shares,
        "throughput_ratio": ratio,
        "write_share": share,
        "round_s": seconds,
    }
    parts = ", ".join(
        f"`{name.strip('_')}` {100 * statistics.median(each[name] for each in shares):.2f} %" for name in shares[0]
    )
    text = f"""# What fault handling costs when nothing fails ({found["date"][:10]})

| measured | result | bar |
| --- | --- | --- |
| samples/s with --max-failures 10 over --max-failures 0, median of {repeats} interleaved pairs | {ratio:.3f} | ≥ 0.97 |
| all durable writes over a round's seconds (rounds of {seconds:.2f} s) | {100 * share:.2f} % | < 5 % |

Shares: {parts}. Job: {json.dumps(JOB)}

Machine: {machine.one_line(about)}.

{machine.busy_warning(about) or ""}
"""
    stem = report.stem_of("fault-overhead", found["date"])
    report.write_json(RESULTS / f"{stem}.json", found)
    (RESULTS / f"{stem}.md").write_text(text.rstrip() + "\n")
    print(text)
    return 0 if ratio >= 0.97 and share < 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
