"""Attack T1: tests whether the noise is normal and, everywhere, as large as the accountant assumes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedray.audit import power
from fedray.audit.bounds import ALPHA, distance_limit, noise_bound
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab
from fedray.privacy.levels import Adjacency, Unit, level_of

_SHAPE_VALUES = 120_000


def attack_scale(
    lab: Lab, noise: npt.NDArray[np.float32], tensors: Mapping[str, slice], unit: Unit, adjacency: Adjacency
) -> list[Finding]:
    """Measure the noise as it was released.

    Args:
        lab: The run under attack.
        noise: `[n, d]` in units of C, n independent releases.
        tensors: Which coordinates belong to which parameter.
        unit: Whom the claim protects.
        adjacency: Under which relation a release moves by at most C.
    """
    claim = 1.0 / lab.sigma
    bound, where = smallest_noise(noise, tensors)
    values = noise.size
    per = "round" if unit == "gateway" and not lab.by_record and level_of(lab.spec).central_noise else "local step"
    scale = Finding(
        name="T1 noise scale",
        level=lab.spec.noise_level,
        unit=unit,
        adjacency=adjacency,
        claim=claim,
        lower_bound=bound,
        smallest_leak_caught=power.noise_leak(values, ALPHA / 3),
        text=f"the size of {values} values of noise in {len(noise)} releases, of all together, of each parameter and of each "
        f"coordinate alone, taken to be normal. Claim: mu = 1/sigma a {per}. Smallest: {where}.",
    )
    some = min(values, _SHAPE_VALUES)
    shape = Finding(
        name="T1 noise shape",
        level=lab.spec.noise_level,
        unit=unit,
        adjacency=adjacency,
        measure="distance",
        claim=0.0,
        lower_bound=distance_from_normal(noise.reshape(-1)[:some]),
        smallest_leak_caught=power.shape_leak(some),
        text=f"the largest distance (Kolmogorov) of the distribution of {some} values of noise, over their own standard "
        "deviation, from a normal one. Claim: none, which the size of the noise takes for granted.",
    )
    return [scale, shape]


def smallest_noise(
    noise: npt.NDArray[np.float32], tensors: Mapping[str, slice], alpha: float = ALPHA
) -> tuple[float, str]:
    """Return a lower bound of mu, and where the noise is that small; a third of alpha each for all, tensors and coordinates."""
    squares = (noise.astype(np.float64) ** 2).sum(axis=0)
    releases, size = noise.shape
    found = {"all together": noise_bound(float(squares.sum()), noise.size, alpha / 3)}
    for name, where in tensors.items():
        part = squares[where]
        found[name] = noise_bound(float(part.sum()), releases * part.size, alpha / 3 / len(tensors))
    least = int(squares.argmin())
    found[f"coordinate {least}"] = noise_bound(float(squares[least]), releases, alpha / 3 / size)
    smallest = max(found, key=lambda name: found[name])
    return found[smallest], smallest


def distance_from_normal(values: npt.NDArray[np.float32], alpha: float = ALPHA) -> float:
    """Return a lower bound of the distance of a distribution from the normal one of its own scale.

    Guarantee:
        Above 0 with probability at most alpha when the values are independent and normal (to fit the scale only brings the
        distributions closer).
    """
    scale = float(np.sqrt((values.astype(np.float64) ** 2).mean()))
    if scale == 0:
        return 0.0  # no noise: its scale says so
    distance = float(stats.kstest(values.astype(np.float64) / scale, "norm", method="asymp").statistic)
    return max(0.0, distance - distance_limit(len(values), alpha))
