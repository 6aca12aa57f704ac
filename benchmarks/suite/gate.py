"""The equality gate: what is timed must be the same job, so all systems must end at the same weights first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import workload
from measurement import weights_distance

from suite.cases import job
from suite.systems import CLIPPED_SUMS, FEDRAY, FEDRAY_TRAINER, FLOWER, PFL, PLAIN_LOOP, System

TOLERANCE = 1e-5


class NotEqual(RuntimeError):
    """Two systems did different work; their times may not be compared."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: what, and how far apart (relative L2)."""

    name: str
    distance: float

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"name": self.name, "distance": self.distance, "tolerance": TOLERANCE}


def run(folder: Path, models: Collection[str]) -> list[Check]:
    """Compare all systems and return the distances.

    Without privacy, full batches, three rounds: every system's final weights against the plain loop's. With per-sample
    privacy: the clipped sums of fedray's fast trainer against Opacus', on the same Poisson batches, for each model that
    is timed.

    Args:
        folder: For workloads and results.
        models: Whose per-sample gradients are timed.

    Raises:
        NotEqual: a distance passes the tolerance.
        RunFailed: a system failed.
    """
    checks = [*_final_weights(folder), *(_clipped_sums(folder, model) for model in models)]
    for check in checks:
        if not check.distance <= TOLERANCE:
            raise NotEqual(
                f"{check.name}: {check.distance:.2g} apart, at most {TOLERANCE:g} is allowed; nothing is timed"
            )
    return checks


def _final_weights(folder: Path) -> list[Check]:
    home = folder / "gate"
    path = workload.write(
        home, job(gateways=4, rounds=3, local_steps=5, privacy="none", sampling="full"), num_records=64
    )
    reference = PLAIN_LOOP.run(path, home / "plain.json")["final_weights"]
    others: tuple[System, ...] = (FEDRAY_TRAINER, FEDRAY, FLOWER, PFL)
    return [
        Check(
            name=f"final weights without privacy, {system.name} against the plain loop",
            distance=weights_distance(reference, system.run(path, home / f"{system.script}.json")["final_weights"]),
        )
        for system in others
    ]


def _clipped_sums(folder: Path, model: str) -> Check:
    home = folder / f"gate-{model}"
    path = workload.write(home, job(model=model, gateways=4), num_records=256)
    result = CLIPPED_SUMS.run(path, home / "sums.json")
    if not result["same_batches"]:
        raise NotEqual(f"{model}: fedray's two trainers drew different batches; nothing is timed")
    return Check(name=f"clipped sums, fedray trainer against Opacus, {model}", distance=result["distance"])
