"""How fast fedray is, against Flower, pfl, bare loops and the arithmetic's own floor, in one run on one machine.

    python benchmarks/throughput.py [--quick] [--repeats N]

First all systems must end with the same weights; nothing is timed before. Then every case runs its systems in turn,
each in a process of its own, and a table, the issue's bars, and a dated JSON, Markdown and PNG come out, the files in
benchmarks/results/. The peers' environments are made when they are missing (some minutes, about 2 GB).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import RESULTS, accountant, findings, gate, machine, picture, report, runs, startup
from suite.cases import Case, cases, job
from suite.findings import Findings
from suite.systems import TRANSFER, Result, RunFailed

# Of the peers' folder, which `suite` has put on the path.
import environments  # isort: skip
import workload  # isort: skip

QUICK_REPEATS, FULL_REPEATS = 1, 3
BEGUN = time.monotonic()


def say(text: str) -> None:
    """Tell how far the benchmark is, apart from its results."""
    print(f"{time.monotonic() - BEGUN:5.0f} s  {text}", file=sys.stderr, flush=True)


def measure(chosen: Sequence[Case], repeats: int, quick: bool, folder: Path) -> Findings:
    """Run everything: the gate, then cases, start to exit, transfer and the accountant.

    Raises:
        NotEqual: the systems did different work.
        RunFailed: one of them failed.
    """
    say("equality gate")
    models = {case.job.model: None for case in chosen if case.job.privacy == "sample"}
    checks = gate.run(folder, list(models))
    measured = {}
    for case in chosen:
        say(case.title)
        measured[case.key] = runs.measure(case, repeats, folder, say)
    if not quick:
        say("start to exit")
    start = startup.measure(0 if quick else repeats, folder, say)
    transfer = _transfer(folder)
    say("accountant")
    return Findings(
        gate=tuple(checks), cases=measured, start=start, transfer=transfer, accountant=tuple(accountant.measure())
    )


def _transfer(folder: Path) -> Result:
    say("broadcast and gather")
    path = workload.write(folder / "transfer", job(model="big_mlp", local_steps=1, privacy="none"), num_records=32)
    return TRANSFER.run(path, folder / "transfer" / "result.json")


def write(found: Findings, chosen: Sequence[Case], config: dict[str, Any]) -> str:
    """Write the three files and return the Markdown."""
    stem = report.stem_of("throughput-quick" if config["quick"] else "throughput", config["date"])
    text = report.markdown(found, chosen, config, stem)
    report.write_json(RESULTS / f"{stem}.json", report.as_json(found, chosen, config))
    (RESULTS / f"{stem}.md").write_text(text)
    picture.draw(found, chosen, RESULTS / f"{stem}.png", machine.one_line(config["machine"]).partition(", Python")[0])
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit code 1 when a system failed or the systems did different work."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{summary} {rest.partition(chr(10) * 2)[2]}")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: one repeat, without the slowest rows")
    parser.add_argument("--repeats", type=int, help=f"interleaved repeats (default {FULL_REPEATS}; --quick 1)")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else FULL_REPEATS)
    config = {"date": report.now(), "quick": options.quick, "repeats": repeats, "machine": machine.describe()}
    chosen = cases(options.quick)
    try:
        for environment in environments.ALL.values():
            environments.make(environment)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(chosen, repeats, options.quick, Path(folder))
    except (environments.EnvironmentFailed, gate.NotEqual, RunFailed) as error:
        print(error, file=sys.stderr)
        return 1
    config["seconds"] = round(time.monotonic() - BEGUN)
    print(write(found, chosen, config))
    missed = [line for line in findings.bars(found) if line.met is False]
    say(f"{len(missed)} bars missed; took {config['seconds']} s; files in {RESULTS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
