"""The picture of the throughput benchmark: samples a second of every system, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, or wanted
import matplotlib.pyplot as plt

from suite.cases import Case
from suite.findings import Findings
from suite.runs import Measured

OURS, THEIRS, LIMIT = "#1f6f8b", "#b8b8b8", "#e0c48c"


def draw(found: Findings, cases: Sequence[Case], path: Path, caption: str) -> None:
    """Draw the cases that compare systems, each with its own axis, and save the PNG."""
    shown = [case for case in cases if len(found.cases[case.key]) > 1]
    heights = [len(found.cases[case.key]) + 1.3 for case in shown]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 0.36 * sum(heights) + 0.6), height_ratios=heights, squeeze=False
    )
    for case, axis in zip(shown, axes[:, 0], strict=True):
        _draw_case(axis, case, list(found.cases[case.key].values()))
    figure.supxlabel(caption, fontsize=7, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_case(axis: plt.Axes, case: Case, systems: Sequence[Measured]) -> None:
    ordered = sorted(systems, key=lambda measured: measured.samples_per_s)
    rates = [measured.samples_per_s for measured in ordered]
    colours = [
        OURS if measured.name.startswith("fedray") else LIMIT if measured.name == "floor" else THEIRS
        for measured in ordered
    ]
    held = axis.barh([_label(measured) for measured in ordered], rates, color=colours)
    axis.bar_label(held, labels=[f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
    axis.set_title(f"{case.title}: samples/s", loc="left", fontsize=9, fontweight="bold")
    axis.set_xlim(0, 1.15 * max(rates))
    axis.tick_params(axis="y", labelsize=8)
    axis.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _label(measured: Measured) -> str:
    processes = measured.results[0].get("processes")
    if measured.name == "floor":
        return "floor (arithmetic alone), 1 core"
    return f"{measured.name}, 1 core" if processes is None else f"{measured.name}, {processes} workers"
