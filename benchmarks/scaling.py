"""How fedray's cost grows with gateways, actors, parameters and nodes, the whole program measured.

    python benchmarks/scaling.py [--quick]

Per-sample DP, Adam, strong noise, lazy shards of 64 records, B 32; one thread an actor. Each point is a run in a process
of its own; its cost is the median steady round (above 1,000 gateways: the one round it has). Says for each stretch
whether the cost is linear, and writes a dated JSON, Markdown and PNG into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, or wanted
import matplotlib.pyplot as plt
from suite import RESULTS, machine, report
from suite.cases import job
from suite.growth import Point, Series
from suite.systems import FEDRAY, RunFailed

# Of the peers' folder, which `suite` has put on the path.
import workload  # isort: skip

RECORDS = 64
GATEWAYS = (16, 64, 256, 1_000, 10_000, 100_000)
ACTORS = (1, 2, 4, 8)
NODES = (1, 2, 3)
MODELS = ("mlp", "mlp_256", "mlp_1024", "big_mlp")


def run(what: workload.Workload, size: int, folder: Path) -> Point:
    """Run one workload and return its cost.

    Raises:
        RunFailed: fedray failed.
    """
    # Lazy shards are drawn in the actors: only the weights are read.
    path = workload.write(folder, dataclasses.replace(what, gateways=1), num_records=1)
    workload.write_description(path, what)
    result = FEDRAY.run(path, folder / "result.json", str(RECORDS))
    point = Point(
        size=size,
        round_s=statistics.median(result["round_seconds"]),
        cold_start_s=result["cold_start_s"],
        driver_peak_mb=result["own_peak_rss_mb"],
        tree_peak_mb=result["peak_rss_mb"],
        phases=result["round_phases"],
    )
    print(
        f"  {size:,}: {point.round_s:.3f} s a round, driver {point.driver_peak_mb:.0f} MB", file=sys.stderr, flush=True
    )
    return point


def measure(quick: bool, folder: Path) -> list[Series]:
    """Measure all series.

    Raises:
        RunFailed: fedray failed.
    """
    found = [_over_gateways(quick, folder), _over_actors(folder), _over_parameters(quick, folder)]
    return found if quick else [*found, _over_nodes(folder)]


def _over_gateways(quick: bool, folder: Path) -> Series:
    sizes = GATEWAYS[:-2] if quick else GATEWAYS
    points = [run(job(gateways=size, rounds=_rounds(size)), size, folder) for size in sizes]
    return Series(axis="gateways", fixed="MLP of 6,922 parameters, 20 steps, 2 actors", points=tuple(points))


def _rounds(gateways: int) -> int:
    return 1 if gateways > 1_000 else 4 if gateways == 1_000 else 12


def _over_actors(folder: Path) -> Series:
    points = [run(job(gateways=256, rounds=8, processes=actors), actors, folder) for actors in ACTORS]
    return Series(axis="actors", fixed="256 gateways, MLP of 6,922 parameters, 20 steps", points=tuple(points))


def _over_parameters(quick: bool, folder: Path) -> Series:
    points = []
    for model in MODELS[:-1] if quick else MODELS:
        what = job(model=model, gateways=16, rounds=4, local_steps=5)
        size = sum(parameter.numel() for parameter in workload.ARCHITECTURES[model]().parameters())
        points.append(run(what, size, folder))
    return Series(axis="parameters", fixed="16 gateways, 5 steps, 2 actors", points=tuple(points))


def _over_nodes(folder: Path) -> Series:
    """Measure clusters of a head without cores and some nodes of one, all on this machine, one actor a node."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.cluster.clusters import cluster

    points = []
    for nodes in NODES:
        with cluster(
            {"num_cpus": 0, "num_gpus": 0}, *({"num_cpus": 1, "num_gpus": 0} for _ in range(nodes))
        ) as started:
            os.environ["RAY_ADDRESS"] = started.address
            try:
                what = job(model="big_mlp", gateways=nodes, rounds=8, local_steps=1, privacy="none", processes=nodes)
                points.append(run(what, nodes, folder))
            finally:
                del os.environ["RAY_ADDRESS"]
    fixed = "25-MB MLP, 1 step, one gateway a node, all nodes on this machine"
    return Series(axis="nodes", fixed=fixed, points=tuple(points))


def markdown(series: Sequence[Series], config: dict[str, Any], stem: str) -> str:
    """Return the report."""
    parts = [
        f"# Scaling, {config['date']}",
        machine.one_line(config["machine"]) + ".",
        *([warning] if (warning := machine.busy_warning(config["machine"])) else []),
        (__doc__ or "").split("\n\n")[2].strip(),
        f"![seconds a round]({stem}.png)",
    ]
    header = ("size", "round s", "ms per unit", "cold start s", "driver MB", "all MB", "train s", "rest s")
    for one in series:
        rows = [_row(point) for point in one.points]
        lines = "\n".join(f"- {sentence}" for sentence in one.sentences())
        parts += [f"## {one.axis} ({one.fixed})", report.markdown_table(header, rows), lines]
    return "\n\n".join(parts) + "\n"


def _row(point: Point) -> tuple[str, ...]:
    train = point.phases["train"]
    return (
        f"{point.size:,}",
        f"{point.round_s:.3f}",
        f"{1000 * point.round_s / point.size:.3g}",
        f"{point.cold_start_s:.1f}",
        f"{point.driver_peak_mb:.0f}",
        f"{point.tree_peak_mb:.0f}",
        f"{train:.3f}",
        f"{point.phases['total'] - train:.3f}",
    )


def draw(series: Sequence[Series], path: Path) -> None:
    """Draw seconds a round over each axis, beside a line of slope one through the last point."""
    figure, axes = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.6), squeeze=False)
    for one, axis in zip(series, axes[0], strict=True):
        sizes, seconds = [p.size for p in one.points], [p.round_s for p in one.points]
        axis.loglog(sizes, seconds, "o-", color="#1f6f8b", label="measured")
        if one.axis not in ("actors", "nodes"):
            slope = [seconds[-1] * size / sizes[-1] for size in sizes]
            axis.loglog(sizes, slope, "--", color="#999999", linewidth=1, label="linear")
        axis.set_xlabel(f"{one.axis}\n({one.fixed})", fontsize=8)
        axis.set_title(f"seconds a round over {one.axis}", fontsize=9, fontweight="bold")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit code 1 when fedray failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="some 2 minutes: up to 1,000 gateways and 1.1 M parameters"
    )
    options = parser.parse_args(arguments)
    config = {"date": report.now(), "quick": options.quick, "machine": machine.describe()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            series = measure(options.quick, Path(folder))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    stem = report.stem_of("scaling-quick" if options.quick else "scaling", config["date"])
    content = {"series": [{**one.__dict__, "points": [p.as_dict() for p in one.points]} for one in series]}
    growth = {one.axis: {"exponents": one.exponents(), "says": one.sentences()} for one in series}
    report.write_json(RESULTS / f"{stem}.json", {**config, "job": job().__dict__, **content, "growth": growth})
    text = markdown(series, config, stem)
    (RESULTS / f"{stem}.md").write_text(text)
    draw(series, RESULTS / f"{stem}.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
