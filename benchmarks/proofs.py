"""Repeats the statistical proofs (T1, T2, T3) with fresh seeds: how often is honest noise rejected?

    python benchmarks/proofs.py [--repetitions N]

At alpha = 1e-6 no statistic may be rejected; at alpha = .05 each statistic's rejections must lie within the 99.9 % bound
of a binomial. Finished repetitions are kept in benchmarks/results/proofs.jsonl, and a second call goes on behind them; the
result is benchmarks/results/proofs.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from scipy import stats  # noqa: E402
from suite import RESULTS, machine  # noqa: E402

from tests.privacy import checks, worlds  # noqa: E402
from tests.privacy.test_mutants import PROOFS, engines_of  # noqa: E402

ALPHA = 0.05
STATISTICAL = [
    name for name in PROOFS if name.startswith(("T1 ", "T2 sample", "T2 batch", "T2 streams", "T2 resume", "T3"))
]
KEPT = RESULTS / "proofs.jsonl"


def repeat(number: int, place: Path) -> dict[str, Any]:
    """Run every statistical proof once with the seeds of a repetition."""
    worlds.repetition(number)
    began = time.monotonic()
    rejected: dict[str, int] = {}
    failures = []
    for name in STATISTICAL:
        for engine in engines_of(name):
            with checks.also_at(ALPHA) as found:
                try:
                    PROOFS[name](engine, place / "run")
                except AssertionError as error:  # at 1e-6: counted and shown, and the other proofs go on
                    failures.append(f"{name}, {engine}: {error}")
                finally:
                    shutil.rmtree(place / "run", ignore_errors=True)
            for statistic, alarm in found:
                rejected[f"{name}, {engine}: {statistic}"] = int(alarm)
    return {
        "repetition": number,
        "seconds": round(time.monotonic() - began, 2),
        "failures": failures,
        "rejected": rejected,
    }


def main() -> int:
    """Go on to N repetitions; exit with 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    wanted = parser.parse_args().repetitions
    RESULTS.mkdir(exist_ok=True)
    done = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    place = Path(tempfile.mkdtemp(prefix="fp"))
    try:
        with KEPT.open("a") as kept:
            for number in range(len(done) + 1, wanted + 1):
                done.append(repeat(number, place))
                kept.write(json.dumps(done[-1]) + "\n")
                kept.flush()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return 0 if write(done) else 1


def write(done: list[dict[str, Any]]) -> bool:
    """Write the table; return whether every bound holds."""
    alarms: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    for one in done:
        trials.update(dict.fromkeys(one["rejected"], 1))
        alarms.update(one["rejected"])
    limits = {name: int(stats.binom.ppf(0.999, trials[name], ALPHA)) for name in trials}
    broken = [name for name, limit in limits.items() if alarms[name] > limit]
    failures = [failure for one in done for failure in one["failures"]]
    rows = "\n".join(f"| {name} | {alarms[name]} | {limits[name]} |" for name in sorted(trials))
    text = f"""# The statistical proofs with fresh seeds

{len(done)} repetitions, {len(trials)} statistics each. At alpha = 1e-6: {len(failures)} rejections. At alpha = {ALPHA}:
{len(broken)} of {len(trials)} statistics beyond the 99.9 % bound. Seconds a repetition: \
{max(one["seconds"] for one in done):.1f} at most.
Machine: {machine.one_line(machine.describe())}.

| statistic | rejected at {ALPHA} | at most |
| --- | --- | --- |
{rows}
"""
    (RESULTS / "proofs.md").write_text(text)
    print(text, *failures, sep="\n")
    return not broken and not failures


if __name__ == "__main__":
    sys.exit(main())
