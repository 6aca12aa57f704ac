"""How fast fedray trains on a GPU, on a machine that has torch, numpy and cryptography and no Ray.

    python benchmarks/gpu.py [--wheels FOLDER] [--seconds 480] [--out FOLDER]
    python benchmarks/gpu.py --device cpu --quick      (a dry run: small models, few gateways)

First the clipped sums of four models on the device are held against the CPU's (1e-4); then samples/s: all gateways at
once (16, 256, 4096), one gateway at a time, Opacus where it can be imported, and torch without privacy. The JSON is
written after each measurement and the Markdown at the end, so that a run that is cut off leaves what it has found. Packages
that the machine lacks can be carried as wheels, made where there is a network with

    pip download --only-binary :all: --no-deps -d FOLDER cryptography cffi pycparser opacus opt_einsum scipy
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGUN = time.monotonic()
HERE = Path(__file__).resolve().parent
GRACE_S = 10.0  # left at the end for the report
NEEDED = ("torch", "numpy", "cryptography")
QUICK_SIZES, QUICK_S = (2, 4), 0.05


def say(text: str) -> None:
    """Tell how far the benchmark is, apart from its results."""
    print(f"{time.monotonic() - BEGUN:5.0f} s  {text}", file=sys.stderr, flush=True)


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack every wheel of a folder into another one and put that on the path, behind what is installed."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)
    sys.path.append(str(folder))


def measure(options: argparse.Namespace) -> int:
    """Run all measurements; return 1 where the device is not equal to the CPU or something of fedray's failed or was cut off."""
    # Not before the wheels are on the path.
    import torch
    from device import report, rows
    from device.models import models
    from families.systems import quieten
    from suite import RESULTS, machine
    from suite.report import now, stem_of, write_json

    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device is cuda but torch sees no GPU here; use --device cpu --quick for a dry run.", file=sys.stderr)
        return 2
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    folder = RESULTS if options.out is None else options.out
    config: dict[str, Any] = {
        "date": now(), "quick": options.quick, "machine": machine.describe(), "hardware": report.hardware(device),
        "complete": False,
    }  # fmt: skip
    stem = stem_of("gpu-quick" if options.quick else "gpu", config["date"], folder)
    quieten()
    families = models(options.quick)
    deadline = BEGUN + options.seconds - GRACE_S
    quick = {"least_s": QUICK_S, "sizes": QUICK_SIZES} if options.quick else {}
    benchmark = rows.Benchmark(families, device, deadline, **quick)
    equalities: list[rows.Equality] = []
    found: list[rows.Row] = []

    def keep() -> None:
        config["seconds"] = round(time.monotonic() - BEGUN)
        write_json(folder / f"{stem}.json", report.as_json(equalities, found, families, config))

    def stop(*_: object) -> None:
        raise rows.TimeUp

    signal.signal(signal.SIGALRM, stop)  # a measurement that takes longer than thought
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.1))
    try:
        for equality in benchmark.equalities():
            equalities.append(equality)
            say(f"{equality.model}: distance {equality.distance} {equality.failure or ''}")
            keep()
        for row in benchmark.rows():
            found.append(row)
            rate = row.failure if row.samples_per_s is None else f"{row.samples_per_s:,.0f} samples/s"
            say(f"{row.model}, {row.system}, {row.gateways} gateways: {rate}")
            keep()
        config["complete"] = True
    except rows.TimeUp:
        say("the time is up")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    keep()
    text = report.markdown(equalities, found, families, config)
    (folder / f"{stem}.md").write_text(text)
    print(text)
    ours = [row for row in found if row.system in (rows.ALL, rows.ONE)]
    fine = all(one.met for one in equalities) and all(row.samples_per_s is not None for row in ours)
    return 0 if fine and config["complete"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit code 1: something of fedray's failed or was left out, 2: nothing could be run."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{summary} {rest.partition(chr(10) * 2)[2]}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models and few gateways: a dry run")
    parser.add_argument("--seconds", type=float, default=480.0, help="time budget of the whole command (default 480)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that the machine lacks")
    parser.add_argument("--out", type=Path, help="folder of the report (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.seconds <= GRACE_S:
        parser.error(f"--seconds is {options.seconds:g}; it must be more than {GRACE_S:g}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels is {options.wheels}; it must be a folder that holds wheels")
    sys.path[:0] = [str(HERE), str(HERE.parent)]  # a checkout need not be installed
    with tempfile.TemporaryDirectory() as folder:
        if options.wheels is not None:
            unpack(options.wheels, Path(folder))
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            print(f"{', '.join(missing)} cannot be imported; carry the wheels with --wheels FOLDER.", file=sys.stderr)
            return 2
        return measure(options)


if __name__ == "__main__":
    sys.exit(main())
