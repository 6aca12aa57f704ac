"""The audit: honest mechanisms are consistent, broken ones are VIOLATED, on a user's own model and data too."""

from __future__ import annotations

import base64
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import fedray.audit.lab
from fedray.audit.audit import Audit
from fedray.audit.bounds import ALPHA
from fedray.audit.lab import Lab
from fedray.commands.cli import main
from fedray.errors import InputError
from fedray.orchestrator.preparing import UserParts
from fedray.reports import audit_page
from fedray.tasks.own_loss import OwnLoss
from tests.audit.coupled import Gated
from tests.audit.mutants import scaled_noise
from tests.audit.worlds import LEVELS, QUICK, Tokens, audit_of, flagged, plan_of, token_shards

SMALL = ["--gateways", "4", "--rounds", "2", "--local-steps", "4", "--batch-size", "16", "--samples-per-gateway", "256"]
SAMPLE_AND_SLOW = ["sample", *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[1:])]
INLINE = ["--pool", "inline", "--device", "cpu", "--seed", "3"]


@pytest.mark.parametrize("level", SAMPLE_AND_SLOW)
def test_audit_of_an_honest_run_is_consistent(level: str) -> None:
    audit = audit_of(level)
    assert audit.verdict == "consistent", flagged(audit)
    (scale,) = [finding for finding in audit.findings if finding.name == "T1 noise scale"]
    assert 0.9 * scale.claim < scale.lower_bound <= scale.claim


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sigma", [0.1, 8.0])
def test_audit_flags_four_fifths_of_the_noise_at_small_and_large_sigma(level: str, sigma: float) -> None:
    assert audit_of(level, noise_multiplier=sigma).verdict == "consistent"
    with scaled_noise(0.8):
        assert "T1 noise scale" in flagged(audit_of(level, noise_multiplier=sigma))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["sample", "batch"])
def test_audit_flags_half_the_noise_of_the_reference_trainer(level: str) -> None:
    assert audit_of(level, engine="opacus").verdict == "consistent"
    with scaled_noise(0.5):
        assert audit_of(level, engine="opacus").verdict == "VIOLATED"


def test_attacks_that_cannot_fail_are_powerless_and_do_not_count() -> None:
    """Full batches leave nothing to a sampler; the verdict rests on the other attacks."""
    audit = audit_of("sample", batch_size=32, samples_per_gateway=32)
    powerless = {finding.name for finding in audit.findings if finding.verdict == "powerless"}
    assert powerless == {"T3 batch rate", "T3 batch independence", "T3 batch spread", "T6 one run"}
    assert audit.num_counting == len(audit.findings) - len(powerless)
    assert all(finding.smallest_leak_caught is None for finding in audit.findings if finding.name in powerless)
    assert audit.verdict == "consistent", flagged(audit)


def test_report_counts_no_powerless_attack() -> None:
    audit = audit_of("sample", batch_size=32, samples_per_gateway=32)
    assert f"None of {audit.num_counting} attacks" in audit_page.content(audit.as_dict(), {})


def test_attacks_see_trained_parameters() -> None:
    """A gate that is zero at the start is not zero where it is attacked."""
    lab = Lab(plan_of("sample", UserParts(model=Gated)), QUICK)
    assert not lab.plan.model.gate.weight.any()  # type: ignore[union-attr,operator]  # a module's attribute
    assert lab.model.gate.weight.abs().min() > 0  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("level", SAMPLE_AND_SLOW)
def test_audit_attacks_a_users_own_model_and_data(level: str) -> None:
    parts = UserParts(shards=token_shards(), model=Tokens)
    changes = {"gateways": 3, "samples_per_gateway": None}
    audit = audit_of(level, parts, **changes)
    assert audit.plan.model.__class__ is Tokens
    assert audit.verdict == "consistent", flagged(audit)
    with scaled_noise(0.5):
        assert audit_of(level, parts, **changes).verdict == "VIOLATED"


def test_audit_attacks_a_users_own_loss() -> None:
    rng = np.random.default_rng(0)
    shards = [(rng.normal(size=(64, 5)).astype(np.float32), rng.normal(size=(64, 2)).astype(np.float32))] * 2
    task = OwnLoss(lambda output, target: ((output - target) ** 2).sum(dim=1))
    parts = UserParts(shards=shards, model=lambda: nn.Linear(5, 2), task=task)
    audit = audit_of("sample", parts, gateways=2, samples_per_gateway=None)
    assert audit.verdict == "consistent", flagged(audit)


@pytest.mark.parametrize("level", SAMPLE_AND_SLOW)
def test_audit_copes_with_the_smallest_run(level: str) -> None:
    audit = audit_of(level, gateways=1, rounds=1, local_steps=1, batch_size=1, samples_per_gateway=2)
    assert audit.verdict == "consistent", flagged(audit)


def test_audit_of_level_none_is_refused() -> None:
    with pytest.raises(InputError, match="promises nothing"):
        audit_of("none")


def test_claims_are_those_of_the_attacked_steps() -> None:
    """privacy.md T5: sqrt(L)/sigma at `sample` and (zero-out) `batch`, sqrt(rounds)/sigma at `gateway`."""
    claims = {level: _claims(audit_of(level, noise_multiplier=1.5)) for level in LEVELS}
    assert claims["sample"]["T5 canary record"] == pytest.approx(math.sqrt(2) / 1.5)
    assert claims["batch"]["T5 canary shard"] == pytest.approx(math.sqrt(2) / 1.5)
    assert claims["gateway"]["T5 canary gateway"] == pytest.approx(math.sqrt(2) / 1.5)
    assert claims["gateway"]["T7 one-run Gaussian"] == pytest.approx(1 / 1.5)
    assert all(found["T1 noise scale"] == pytest.approx(1 / 1.5) for found in claims.values())


def _claims(audit: Audit) -> dict[str, float]:
    return {finding.name: finding.claim for finding in audit.findings}


def test_canary_gateways_are_a_report_and_no_gate() -> None:
    (finding,) = [f for f in audit_of("gateway").findings if f.name.startswith("T8")]
    assert not finding.gate
    assert finding.as_dict()["verdict"] == "report"


def _run(level: str, out: Path, *more: str) -> int:
    return main(["audit", "--noise-level", level, *SMALL, *INLINE, "--out", str(out), *more])


def test_command_writes_audit_json_and_exits_0(
    outdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fedray.audit.lab, "DEFAULT", QUICK)
    assert _run("sample", outdir) == 0
    said = capsys.readouterr().out
    assert "verdict: consistent (9 attacks, 1 more could not have failed" in said
    assert "powerless" in said
    assert str(outdir) in said
    card = json.loads((outdir / "audit.json").read_text())
    assert card["verdict"] == "consistent"
    assert (card["level"], card["noise_multiplier"], card["engine"]) == ("sample", 1.0, "sequence")
    names = [attack["name"] for attack in card["attacks"]]
    for expected in ("T1 noise scale", "T2 noise reuse", "T3 batch rate", "T3 batch independence", "T4 own sum",
                     "T5 canary record", "T6 one run", "T13 isolation"):  # fmt: skip
        assert expected in names
        assert expected in said
    for attack in card["attacks"]:
        assert {"name", "level", "unit", "claim", "lower_bound", "confidence", "smallest_leak_caught", "text"} <= set(
            attack
        )
        assert attack["confidence"] in (1 - ALPHA, 1.0)
        assert attack["lower_bound"] <= attack["claim"]
        powerless = attack["smallest_leak_caught"] is None
        assert attack["verdict"] == ("powerless" if powerless else "consistent")
        assert powerless or attack["claim"] == 0 or attack["smallest_leak_caught"] >= 1
    (picture,) = card["pictures"]
    assert base64.b64decode(picture["png_base64"]).startswith(b"\x89PNG")
    assert "seed" not in card["config"], "a seed predicts the noise"
    assert any("never prove" in note for note in card["notes"])


def test_command_exits_3_when_a_claim_is_refuted(
    outdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fedray.audit.lab, "DEFAULT", QUICK)
    with scaled_noise(0.5):
        assert _run("gateway", outdir) == 3
    assert "verdict: VIOLATED" in capsys.readouterr().out
    assert json.loads((outdir / "audit.json").read_text())["verdict"] == "VIOLATED"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--noise-level", "none"], "promises nothing"),
        (["--dry-run"], "leave them out"),
        (["--outlier"], "--outlier is no flag"),
        (["--thorough=3"], "ignored explicit argument"),
        (["--gateways", "0"], "--gateways is 0"),
    ],
)
def test_command_refuses_bad_input(
    more: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *more]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_takes_a_users_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fedray.audit.lab, "DEFAULT", QUICK)
    (tmp_path / "clinic_audit.py").write_text(
        "import numpy as np\nfrom torch import nn\n"
        "def model():\n    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))\n"
        "def data(gateways):\n    rng = np.random.default_rng(0)\n"
        "    x = rng.normal(size=(400, 5)).astype(np.float32)\n    y = rng.integers(0, 3, 400)\n"
        "    return (x[:300], y[:300]), (x[300:], y[300:])\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--gateways", "3", "--rounds", "2", "--local-steps", "2", "--batch-size", "10", *INLINE]
    argv = ["audit", "--dataset", "clinic_audit:data", "--model", "clinic_audit:model", *flags]
    assert main(argv) == 0
    assert "engine sequence, 75 trainable parameters" in capsys.readouterr().out
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.endswith("-audit")
    assert (made / "audit.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_command_at_the_defaults_is_consistent_in_a_minute(level: str, outdir: Path) -> None:
    start = time.perf_counter()
    assert main(["audit", "--noise-level", level, "--out", str(outdir)]) == 0
    assert time.perf_counter() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_command_at_the_defaults_flags_half_the_noise(level: str, outdir: Path) -> None:
    with scaled_noise(0.5):
        assert main(["audit", "--noise-level", level, "--out", str(outdir)]) == 3
