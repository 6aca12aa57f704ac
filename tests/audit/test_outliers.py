"""The outlier report and the inversion picture: telling without noise, blind with it, and never a gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import fedray.audit.lab
from fedray.audit import inversion, outliers
from fedray.audit.lab import Lab
from fedray.commands.cli import main
from tests.audit.mutants import scaled_noise
from tests.audit.worlds import LEVELS, QUICK, plan_of


@pytest.fixture(scope="module", params=["sample", *(pytest.param(name, marks=pytest.mark.slow) for name in LEVELS[1:])])
def report(request: pytest.FixtureRequest) -> tuple[Lab, list[outliers.Row]]:
    """Return the report of a small run at each level."""
    # Toy at its own batch size: shards need records enough for an outlying one to stand out.
    lab = Lab(plan_of(request.param, batch_size=64, samples_per_gateway=512, gateways=8, local_steps=8), QUICK)
    return lab, outliers.report_rows(lab)


def _uploads(lab: Lab, rows: list[outliers.Row], sigma: float) -> dict[str, outliers.Row]:
    what = outliers.UPLOADS[lab.spec.noise_level]
    return {row.detector: row for row in rows if row.what == what and row.sigma == sigma}


def test_outliers_are_plain_without_noise(report: tuple[Lab, list[outliers.Row]]) -> None:
    lab, rows = report
    found = _uploads(lab, rows, 0.0)
    assert found["LOF"].auc > 0.85
    assert found["kNN distance"].auc > 0.85
    assert found[outliers.BEST].auc == 1.0
    single = {row.detector: row for row in rows if row.what == "gradients of single records"}
    assert single["kNN distance"].auc > 0.85


def test_outlier_detectors_stay_below_the_ceiling_at_sigma_1(report: tuple[Lab, list[outliers.Row]]) -> None:
    lab, rows = report
    for name in ("LOF", "IsolationForest", "kNN distance", "DBSCAN"):
        row = _uploads(lab, rows, 1.0)[name]
        assert row.low <= row.ceiling < 1.0  # no detector beats differential privacy, beyond chance
        assert row.high > 0.5 or row.auc > 0.2


def test_best_attacker_beats_the_detectors_and_stays_below_the_ceiling(report: tuple[Lab, list[outliers.Row]]) -> None:
    lab, rows = report
    at_half = _uploads(lab, rows, 0.5)
    assert at_half[outliers.BEST].auc > max(at_half["LOF"].auc, at_half["kNN distance"].auc, at_half["DBSCAN"].auc)
    for sigma in (0.5, 1.0, 2.0):
        best = _uploads(lab, rows, sigma)[outliers.BEST]
        assert best.low - (best.auc - best.low) < best.ceiling, f"at sigma {sigma}"


def test_ceiling_is_that_of_the_claim(report: tuple[Lab, list[outliers.Row]]) -> None:
    lab, rows = report
    gap = 1 if lab.spec.noise_level == "sample" else 2
    assert _uploads(lab, rows, 2.0)["LOF"].ceiling == pytest.approx(stats.norm.cdf(gap / 2 / np.sqrt(2)))
    assert _uploads(lab, rows, 0.0)["LOF"].ceiling == 1.0


@pytest.mark.slow
def test_best_attacker_passes_the_ceiling_when_noise_is_missing() -> None:
    lab = Lab(plan_of("sample", batch_size=64, samples_per_gateway=512), QUICK)
    with scaled_noise(0.1):
        rows = outliers.report_rows(lab)
    best = _uploads(lab, rows, 2.0)[outliers.BEST]
    assert best.low > best.ceiling


def test_command_with_outliers_prints_the_table_and_says_what_it_proves(
    outdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fedray.audit.lab, "DEFAULT", replace(QUICK, trials=2))
    flags = ["--gateways", "4", "--rounds", "1", "--local-steps", "2", "--pool", "inline", "--seed", "1"]
    assert main(["audit", "--outliers", "--noise-level", "gateway", *flags, "--out", str(outdir)]) == 0
    said = capsys.readouterr().out
    assert "never a gate" in said
    assert "does not prove privacy" in said
    card = json.loads((outdir / "audit.json").read_text())
    assert [picture["title"] for picture in card["pictures"]] == [inversion.TITLE, outliers.TITLE]
    assert {"what", "sigma", "detector", "auc", "low", "high", "ceiling"} <= set(card["outliers"][0])


def test_inversion_reads_the_record_without_noise_and_little_with_it() -> None:
    records, found = inversion.reconstructions(np.random.default_rng(4))

    def likeness(sigma: float) -> float:
        pairs = zip(records, found[sigma], strict=True)
        return float(np.mean([abs(np.corrcoef(record, read)[0, 1]) for record, read in pairs]))

    assert np.allclose(found[0.0], records, atol=1e-3)
    assert likeness(0.0) > 0.999
    assert likeness(0.1) < 0.8
    assert likeness(1.0) < 0.35


def test_inversion_formula_undoes_any_scale() -> None:
    rng = np.random.default_rng(0)
    record, errors = rng.random(12), rng.normal(size=5)
    update = 0.37 * np.concatenate([np.outer(errors, record).ravel(), errors, rng.normal(size=9)])
    assert np.allclose(inversion.invert(update.astype(np.float32), 12, hidden=5), record, atol=1e-5)
    assert not inversion.invert(np.zeros(74, np.float32), 12, hidden=5).any()
