"""Report T9: how well outlier detectors find an outlier in what an observer sees, before and after noise. Never a gate.

One upload of a group differs from the others by a planted record (`sample`), a planted shard (`batch`) or a poisoned
update in the sum (`gateway`). AUC is the chance that the detector ranks it above another one. By symmetry no attacker gets
beyond Phi(mu/sqrt(2)): telling which of two uploads holds the outlier means telling two of the claim's neighbours apart,
twice independently (mu·sqrt(2)), halfway between them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedray.audit.bounds import area_under_curve
from fedray.audit.lab import Lab
from fedray.audit.scenes import Scene, record_scene, upload_scenes
from fedray.errors import InputError
from fedray.reports import pictures

Float64Array = npt.NDArray[np.float64]
TITLE = "Outliers before and after noise: AUC of detectors against sigma"
NOTE = (
    "The outlier table is a report, never a gate. A detector at chance does not prove privacy: the best attacker, who knows "
    "everything but the noise, does far better than any clusterer. A detector above the ceiling would refute the claim; what "
    "the ceiling says of attackers nobody has built holds because of the accounting, not because of this table."
)
BEST = "best attacker"
_SIGMAS = (0.1, 0.25, 0.5, 1.0, 2.0)
_NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """How well one detector finds the outlier at one noise multiplier.

    Args:
        what: What was looked at.
        sigma: Noise multiplier; 0 without noise.
        detector: Its name.
        auc: Chance to rank the outlier above another.
        low: Of the 95 % interval over trials.
        high: Of the interval.
        ceiling: Phi(mu/sqrt(2)), which no attacker passes; 1 without noise.
    """

    what: str
    sigma: float
    detector: str
    auc: float
    low: float
    high: float
    ceiling: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def check_libraries() -> None:
    """Check that scikit-learn and matplotlib are there.

    Raises:
        InputError: One is not.
    """
    try:
        import sklearn  # noqa: F401 - an extra, seconds to import
    except ImportError as error:
        raise InputError('--outliers needs scikit-learn: pip install "fedray[data]".') from error
    pictures.new_figure(1, 1)


def detectors(rng: np.random.Generator) -> dict[str, Callable[[Float64Array], Float64Array]]:
    """Return functions from rows `[R, P]` to one score a row, higher for outliers."""
    from sklearn.cluster import DBSCAN  # an extra, seconds to import: only this report needs it
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

    def neighbour_distances(rows: Float64Array) -> Float64Array:
        number = min(_NEIGHBOURS, len(rows) - 1)
        distances: Float64Array = NearestNeighbors(n_neighbors=number).fit(rows).kneighbors()[0].mean(axis=1)
        return distances

    def local_outlier_factor(rows: Float64Array) -> Float64Array:
        model = LocalOutlierFactor(n_neighbors=min(2 * _NEIGHBOURS, len(rows) - 1)).fit(rows)
        return -np.asarray(model.negative_outlier_factor_, np.float64)

    def isolation_forest(rows: Float64Array) -> Float64Array:
        model = IsolationForest(n_estimators=50, random_state=int(rng.integers(2**31)))
        return -np.asarray(model.fit(rows).score_samples(rows), np.float64)

    def dbscan(rows: Float64Array) -> Float64Array:
        radius = max(1e-12, 1.2 * float(np.median(neighbour_distances(rows))))
        noise = np.asarray(DBSCAN(eps=radius, min_samples=3).fit(rows).labels_) == -1
        scores: Float64Array = noise.astype(np.float64)
        return scores

    return {
        "LOF": local_outlier_factor,
        "IsolationForest": isolation_forest,
        "kNN distance": neighbour_distances,
        "DBSCAN": dbscan,
    }


def report_rows(lab: Lab) -> list[Row]:
    """Return the table: detectors on un-noised per-record gradients, un-noised uploads, and uploads at several sigmas."""
    trials = lab.effort.trials
    rows = _table(lab, "gradients of single records", [record_scene(lab, trial) for trial in range(trials)], (0.0,))
    sigmas = sorted({0.0, *_SIGMAS, lab.sigma})
    return rows + _table(lab, UPLOADS[lab.spec.noise_level], upload_scenes(lab, trials), sigmas)


UPLOADS = {
    "sample": "uploads of one step; one gateway has a planted record more",
    "batch": "uploads of one step; one gateway has a planted shard",
    "gateway": "the orchestrator's sums; one holds a poisoned update",
}


def _table(lab: Lab, what: str, scenes: Sequence[Scene], sigmas: Sequence[float]) -> list[Row]:
    named = detectors(lab.rng(what))
    found = []
    for sigma in sigmas:
        areas: dict[str, list[float]] = {name: [] for name in [*named, BEST]}
        gap = scenes[0].gap
        for scene in scenes:
            rows = scene.observed(sigma)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks on duplicate rows: uploads without noise may be equal
                for name, detector in named.items():
                    areas[name].append(_area(detector(rows)))
            areas[BEST].append(_area(scene.likelihood_ratios(rows)))
        ceiling = 1.0 if sigma == 0 else float(stats.norm.cdf(gap / sigma / math.sqrt(2)))
        found += [_row(what, sigma, name, np.array(values), ceiling) for name, values in areas.items()]
    return found


def _area(scores: Float64Array) -> float:
    return area_under_curve(scores[:1], scores[1:])


def _row(what: str, sigma: float, detector: str, areas: Float64Array, ceiling: float) -> Row:
    mean = float(areas.mean())
    # Trials that are all alike still leave room: at least the width of one trial in all.
    half = max(1.96 * float(areas.std(ddof=1)) / math.sqrt(len(areas)), 1 / len(areas))
    return Row(
        what=what,
        sigma=sigma,
        detector=detector,
        auc=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        ceiling=ceiling,
    )


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table as text."""
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        chosen = [row for row in rows if row.what == what]
        names = list(dict.fromkeys(row.detector for row in chosen))
        lines += [what, "  sigma      " + "".join(f"{name:>22}" for name in names) + "       ceiling"]
        for sigma in dict.fromkeys(row.sigma for row in chosen):
            line = [row for row in chosen if row.sigma == sigma]
            cells = "".join(f"{f'{row.auc:.2f} ({row.low:.2f}–{row.high:.2f})':>22}" for row in line)
            lines.append(f"  {'none' if sigma == 0 else f'{sigma:g}':<11}{cells}{line[0].ceiling:>14.3f}")
    return lines


def picture(lab: Lab, rows: Sequence[Row]) -> bytes:
    """Return AUC against sigma, a line a detector, with the best attacker and the ceiling, as a PNG."""
    figure = pictures.new_figure(8.0, 4.8)
    axes = figure.subplots()
    chosen = [row for row in rows if row.what == UPLOADS[lab.spec.noise_level]]
    sigmas = list(dict.fromkeys(row.sigma for row in chosen))
    places = np.arange(len(sigmas))
    for name in dict.fromkeys(row.detector for row in chosen):
        line = [row for row in chosen if row.detector == name]
        values = np.array([row.auc for row in line])
        errors = np.array([[row.auc - row.low for row in line], [row.high - row.auc for row in line]])
        axes.errorbar(places, values, yerr=errors, marker="o", capsize=3, lw=2.5 if name == BEST else 1.2, label=name)
    ceilings = [next(row.ceiling for row in chosen if row.sigma == sigma) for sigma in sigmas]
    axes.plot(places, ceilings, "k--", label="ceiling Phi(mu/√2)")
    axes.axhline(0.5, color="grey", lw=0.8)
    axes.set_xticks(places, ["no noise" if sigma == 0 else f"{sigma:g}" for sigma in sigmas])
    axes.set_xlabel("sigma (noise multiplier)")
    axes.set_ylabel("AUC of the outlier")
    axes.set_ylim(0.2, 1.05)
    axes.set_title(f"{lab.spec.noise_level}: {UPLOADS[lab.spec.noise_level]}", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")
    return pictures.png_bytes(figure)
