"""The audit of a run: every attack of its level on the very code that the run would use, and one verdict."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedray.audit import (
    central,
    inversion,
    isolation,
    membership,
    outliers,
    power,
    records,
    reuse,
    sampler,
    scale,
    updates,
)
from fedray.audit.bounds import ALPHA
from fedray.audit.finding import Finding
from fedray.audit.lab import DEFAULT, Effort, Lab
from fedray.audit.releases import collect, coordinates
from fedray.errors import InputError
from fedray.orchestrator.plan import Plan
from fedray.pool.inline_pool import one_thread
from fedray.privacy.levels import Unit, level_of
from fedray.rundir import cards

NOTES = (
    "An attack can refute a claim, never prove it: consistent means that these attacks found nothing.",
    "A powerless attack could not have failed at this setting (too few runs, records or parameters); it says nothing and does "
    "not count.",
    f"Each bound exceeds the truth with probability at most {ALPHA:g}; thresholds and numbers of guesses were fixed before "
    "the attacks were played, and no bound uses the claimed sigma. Would catch: the smallest leak that the attack, as it was "
    f"played, catches with probability {power.POWER:g}.",
    "Attacked are isolation, clipping, sampling, noise and aggregation as this machine runs them, at trained parameters; not "
    "attacked are timings, the random "
    "number generator's key, floating-point rounding (Mironov 2012) and whatever the report lists as not covered.",
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture for audit.json."""

    title: str
    png: bytes

    def as_dict(self) -> dict[str, str]:
        """Return title and base64 PNG."""
        return {"title": self.title, "png_base64": base64.b64encode(self.png).decode()}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A finished audit.

    Args:
        plan: Of the run that was attacked.
        findings: One an attack.
        pictures: Images of what an attack sees.
        outliers: The outlier report's rows; empty when it was not asked for.
        seconds: Wall-clock time.
        notes: What the audit does and does not prove.
    """

    plan: Plan
    findings: Sequence[Finding]
    pictures: Sequence[Picture]
    outliers: Sequence[outliers.Row]
    seconds: float
    notes: Sequence[str] = field(default=NOTES)

    @property
    def violated(self) -> bool:
        """Whether an attack refuted a claim."""
        return any(finding.violated for finding in self.findings)

    @property
    def num_counting(self) -> int:
        """How many attacks the verdict rests on: all but reports and powerless ones."""
        return sum(finding.verdict in ("VIOLATED", "consistent") for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Return "consistent" or "VIOLATED"."""
        return "VIOLATED" if self.violated else "consistent"

    def as_dict(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        spec = self.plan.spec
        return {
            "verdict": self.verdict,
            "level": spec.noise_level,
            "noise_multiplier": spec.noise_multiplier,
            "clip_norm": spec.clip_norm,
            "sample_rate": spec.sample_rate,
            "batch_size": spec.batch_size,
            "local_steps": spec.local_steps,
            "rounds": self.plan.config.federation.rounds,
            "engine": self.plan.setup.engine,
            "num_params": self.plan.layout.num_params,
            "alpha": ALPHA,
            "attacks": [finding.as_dict() for finding in self.findings],
            "outliers": [row.as_dict() for row in self.outliers],
            "pictures": [picture.as_dict() for picture in self.pictures],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "config": {key: value for key, value in self.plan.config.as_dict().items() if key != "seed"},
            "seeded": self.plan.config.run.seed is not None,
            "versions": cards.versions(),
        }


def attacks(lab: Lab) -> Iterator[Finding]:
    """Play the attacks of the run's level, the quick ones first, and yield what each found."""
    if level_of(lab.spec).central_noise:
        yield from sampler.attack_participation(lab)
        kept, tensors = coordinates(lab)
        sums = central.aggregate_noise(lab, kept)
        yield reuse.attack_reuse(lab, {"sums": sums}, "gateway")
        yield from scale.attack_scale(lab, np.stack(list(sums.values())), tensors, "gateway", "zero-out")
        yield from updates.attack_updates(lab)
        yield from central.attack_aggregation(lab)
        return
    unit: Unit = "record" if lab.by_record else "gateway"
    releases = collect(lab)
    yield from sampler.attack_sampler(lab, releases)
    yield reuse.attack_reuse(lab, {"inside the trainer": releases.observed, "off updates": releases.read_off}, unit)
    noise = np.stack(list(releases.read_off.values()))
    yield from scale.attack_scale(lab, noise, releases.tensors, unit, lab.adjacency if lab.by_record else "zero-out")
    yield from isolation.attack_isolation(lab)
    yield from records.attack_records(lab)
    if lab.by_record:
        yield from membership.attack_one_run(lab)


def run_audit(plan: Plan, *, effort: Effort = DEFAULT, with_outliers: bool = False) -> Audit:
    """Attack a planned run; nothing is charged and no run directory is touched.

    Args:
        plan: From `fedray.orchestrator.plan.prepare`: any data, model and loss that a run takes.
        effort: How much to try.
        with_outliers: Add the outlier report (needs scikit-learn and matplotlib).

    Raises:
        InputError: Level `none`, which promises nothing; or a library for the outlier report is missing.
        GatewayError: The user's code failed in a gateway.
    """
    if not level_of(plan.spec).is_private:
        raise InputError(
            "--noise-level is none, which promises nothing, so there is nothing to audit; choose sample, batch or gateway."
        )
    start = time.perf_counter()
    if with_outliers:
        outliers.check_libraries()
    with one_thread():
        lab = Lab(plan, effort)
        findings = list(attacks(lab))
        pictures, notes = [], list(NOTES)
        try:
            pictures.append(Picture(title=inversion.TITLE, png=inversion.picture(lab.rng("inversion"))))
        except InputError as missing:
            notes.append(f"no picture of the inversion attack: {missing}")
        rows: Sequence[outliers.Row] = ()
        if with_outliers:
            rows = outliers.report_rows(lab)
            pictures.append(Picture(title=outliers.TITLE, png=outliers.picture(lab, rows)))
            notes.append(outliers.NOTE)
    return Audit(
        plan=plan,
        findings=findings,
        pictures=pictures,
        outliers=rows,
        seconds=time.perf_counter() - start,
        notes=notes,
    )
