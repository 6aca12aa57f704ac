"""The picture of the zoo: what share of the rate without privacy each system reaches, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, or wanted
import matplotlib.pyplot as plt

from families.family import Family
from families.findings import WANTED_OF_PLAIN, Finding
from families.systems import FEDRAY, GHOST, HOOKS, PLAIN

COLOURS = {FEDRAY: "#1f6f8b", HOOKS: "#b8b8b8", GHOST: "#dcdcdc"}
_HEIGHT = 0.27


def draw(found: Mapping[str, Finding], families: Mapping[str, Family], path: Path, caption: str) -> None:
    """Draw a group of bars a family, of the systems that train it, and save the PNG."""
    shown = [key for key, finding in found.items() if _share(finding, PLAIN) is not None]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.4))
    for number, (system, colour) in enumerate(COLOURS.items()):
        shares = [_share(found[key], system) for key in shown]
        places = [row + (number - 1) * _HEIGHT for row in range(len(shown))]
        held = axis.barh(places, [share or 0.0 for share in shares], _HEIGHT, color=colour, label=system)
        labels = ["refused" if share is None else f"{share:.2f}" for share in shares]
        axis.bar_label(held, labels=labels, padding=3, fontsize=6, color="#555555")
    axis.axvline(WANTED_OF_PLAIN, color="#e0c48c", linewidth=1, zorder=0)
    axis.set_yticks(range(len(shown)), [families[key].title for key in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_title("share of samples/s without privacy, one large batch", loc="left", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(COLOURS))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.supxlabel(caption, fontsize=6, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _share(finding: Finding, system: str) -> float | None:
    timed, plain = finding.systems.get(system), finding.systems.get(PLAIN)
    if timed is None or plain is None or timed.samples_per_s is None or plain.samples_per_s is None:
        return None
    return timed.samples_per_s / plain.samples_per_s
