"""How fast any model trains with privacy: fedray, Opacus and torch without privacy on the same families, on one core.

    python benchmarks/zoo.py [--families a,b] [--quick] [--repeats N] [--out FOLDER]

For each family fedray's clipped sums must first be those of torch.autograd on single records (1e-5); a family that is
apart is not timed and ends the command with exit code 1. Then the systems train in turn. A table, the issue's bars and a
dated JSON, Markdown and PNG come out, the files in benchmarks/results/ unless --out says otherwise. Needs the extras
`bench` and `hf`; families whose packages are missing are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import findings, gate, picture, timing
from families.catalogue import FAMILIES
from families.family import Family
from families.findings import Finding
from families.job import GATEWAYS, Job, Refused
from families.systems import FEDRAY, HOOKS, REPLACED, SYSTEMS, quieten
from families.timing import Timed
from suite import RESULTS, machine, report

QUICK_REPEATS, FULL_REPEATS = 1, 3
QUICK_GATEWAYS = 4
QUICK_S, FULL_S = 0.1, 1.0  # of one figure, at least
BEGUN = time.monotonic()


def say(text: str) -> None:
    """Tell how far the benchmark is, apart from its results."""
    print(f"{time.monotonic() - BEGUN:5.0f} s  {text}", file=sys.stderr, flush=True)


def measure(family: Family, gateways: int, repeats: int, least_s: float) -> Finding:
    """Check and time one family.

    Raises:
        NotEqual: fedray's sums are wrong.
    """
    absent = next((name for name in family.needs if importlib.util.find_spec(name) is None), None)
    if absent is not None:
        say(f"  {absent} is not installed")
        return Finding(distance=None, systems={}, absent=absent)
    try:
        distance = gate.check(family)
    except Refused as refused:
        say(f"  {FEDRAY}: refused: {refused}")
        distance = None
    systems = {name: system for name, system in SYSTEMS.items() if name != REPLACED}
    job = Job(family, gateways)
    found = timing.measure(job, systems, repeats, least_s, say)
    if found[HOOKS].refusal is not None:
        found |= _substitute(job, repeats, least_s)
    return Finding(distance=distance, systems={name: found[name] for name in SYSTEMS if name in found})


def _substitute(job: Job, repeats: int, least_s: float) -> dict[str, Timed]:
    """Time Opacus with layers of its own in place of those that it refuses; no bar is held against it."""
    return timing.measure(job, {REPLACED: SYSTEMS[REPLACED]}, repeats, least_s, say)


def write(found: Mapping[str, Finding], config: dict[str, Any], folder: Path) -> str:
    """Write the three files and return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = report.stem_of("zoo-quick" if config["quick"] else "zoo", config["date"], folder)
    text = findings.markdown(found, FAMILIES, config, stem)
    report.write_json(folder / f"{stem}.json", findings.as_json(found, FAMILIES, config))
    (folder / f"{stem}.md").write_text(text)
    caption = machine.one_line(config["machine"]).partition(", Python")[0]
    picture.draw(found, FAMILIES, folder / f"{stem}.png", caption)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit code 1 when fedray's sums of a family are wrong, 2 for a family that is unknown."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{summary} {rest.partition(chr(10) * 2)[2]}")
    parser.add_argument("--families", help=f"some of {','.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"one repeat of {QUICK_GATEWAYS} gateways")
    parser.add_argument("--repeats", type=int, help=f"interleaved repeats (default {FULL_REPEATS}; --quick 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    chosen = list(FAMILIES) if options.families is None else options.families.split(",")
    if unknown := [key for key in chosen if key not in FAMILIES]:
        parser.error(f"--families names {unknown[0]!r}; choose from {', '.join(FAMILIES)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    quieten()
    torch.set_num_threads(1)
    quick = options.quick
    repeats = options.repeats or (QUICK_REPEATS if quick else FULL_REPEATS)
    gateways = QUICK_GATEWAYS if quick else GATEWAYS
    config = {"date": report.now(), "quick": quick, "repeats": repeats, "gateways": gateways}
    config["machine"] = machine.describe()
    found: dict[str, Finding] = {}
    wrong: list[str] = []
    for key in chosen:
        say(FAMILIES[key].title)
        try:
            found[key] = measure(FAMILIES[key], gateways, repeats, QUICK_S if quick else FULL_S)
        except gate.NotEqual as error:
            print(error, file=sys.stderr)
            wrong.append(key)
    config |= {"seconds": round(time.monotonic() - BEGUN), "not_equal": wrong}
    print(write(found, config, options.out))
    missed = [line for line in findings.bars(found, FAMILIES) if line.met is False]
    say(f"{len(missed)} bars missed; took {config['seconds']} s; files in {options.out.name}/")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
