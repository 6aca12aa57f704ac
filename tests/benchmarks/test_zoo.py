"""The zoo: its families, its equality gate, its arithmetic and its command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import zoo
from families import findings, gate
from families.catalogue import FAMILIES
from families.family import IGNORED, call, token_losses
from families.findings import Finding
from families.job import Job, Refused, batches, new_keys
from families.systems import FEDRAY, GHOST, HOOKS, PLAIN, SYSTEMS
from families.timing import Timed


def timed(samples_per_s: float) -> Timed:
    return Timed(samples=100, wall_s=[100 / samples_per_s], cpu_s=[100 / samples_per_s])


REFUSED = Timed(refusal="it cannot")
CONFIG = {
    "date": "2026-01-01 00:00 UTC", "quick": False, "repeats": 1, "gateways": 4,
    "machine": zoo.machine.describe(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("key", FAMILIES)
def test_family_gives_one_loss_a_record(key: str) -> None:
    family = FAMILIES[key]
    if any(importlib.util.find_spec(name) is None for name in family.needs):
        pytest.skip(f"needs {', '.join(family.needs)}")
    x, y = family.records(3, torch.Generator().manual_seed(0))
    losses = family.loss(call(family.build().train(), x), y)
    assert losses.shape == (3,)
    assert torch.isfinite(losses).all()


def test_token_losses_leave_out_what_is_not_hidden() -> None:
    output, target = torch.randn(2, 4, 7), torch.full((2, 4), IGNORED)
    target[0, 1] = 3
    losses = token_losses(output, target)
    assert losses[0] == pytest.approx(float(torch.nn.functional.cross_entropy(output[0, 1], target[0, 1])))
    assert losses[1] == 0.0


@pytest.mark.parametrize("key", ["mlp", "dropout", "tied", "two-inputs-dict", "resnet"])
def test_gate_finds_the_sums_of_single_records(key: str) -> None:
    assert gate.check(FAMILIES[key]) <= 1e-5


def test_gate_stops_what_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TOLERANCE", 0.0)
    with pytest.raises(gate.NotEqual, match=r"MLP 32-64-64-10.*nothing is timed"):
        gate.check(FAMILIES["mlp"])


def test_gate_takes_another_draw_where_one_lies_on_a_kink() -> None:
    found = iter([3e-4, float("nan"), 1e-6, 0.0])
    assert gate.least_distance(lambda _: next(found), 1e-5) == 1e-6


@pytest.mark.parametrize("wrong", [3e-4, float("nan")])
def test_gate_does_not_take_what_is_wrong_in_every_draw(wrong: float) -> None:
    assert not gate.least_distance(lambda _: wrong, 1e-5) <= 1e-5


def test_gate_sees_one_record_less() -> None:
    job = Job(FAMILIES["mlp"], gateways=1, local_steps=1)
    plan = job.plan()
    seen = gate.first_sums(plan, job, new_keys())
    assert gate.distance(seen.sums, gate.record_sums(plan, job, seen.batches)) <= 1e-5
    assert gate.distance(seen.sums, gate.record_sums(plan, job, [seen.batches[0][1:]])) > 1e-3


def test_batches_are_those_that_fedray_draws() -> None:
    job, keys = Job(FAMILIES["mlp"], gateways=1, local_steps=1), new_keys()
    seen = gate.first_sums(job.plan(), job, keys)
    assert next(batches(job.privacy, keys, 0)).tolist() == seen.batches[0].tolist()


def test_job_repeats_its_shards_past_those_that_differ() -> None:
    shards = Job(FAMILIES["mlp"], gateways=5, num_shards=2).shards
    assert shards[0] is shards[2] is shards[4]
    assert shards[1] is shards[3] is not shards[0]


def test_opacus_refusal_is_one_line_with_a_reason() -> None:
    with pytest.raises(Refused, match="has nothing to replace"):
        SYSTEMS["Opacus, its own layers"](Job(FAMILIES["mlp"], gateways=1))
    with pytest.raises(Refused) as refused:
        SYSTEMS[HOOKS](Job(FAMILIES["attention"], gateways=1, local_steps=1)).round()
    assert "\n" not in str(refused.value)


def test_rates_are_medians_over_repeats() -> None:
    found = Timed(samples=6, wall_s=[1.0, 2.0, 30.0], cpu_s=[1.0, 3.0, 9.0])
    assert (found.samples_per_s, found.samples_per_cpu_s) == (3.0, 2.0)
    assert REFUSED.samples_per_s is None


def test_bars_hold_fedray_against_what_trains() -> None:
    found = {
        "mlp": Finding(distance=1e-6, systems={FEDRAY: timed(50), HOOKS: timed(25.1), PLAIN: timed(100)}),
        "resnet": Finding(distance=1e-6, systems={FEDRAY: timed(80), HOOKS: timed(50), PLAIN: timed(100)}),
    }
    lines = {(line.text.partition(":")[0], line.bar): line.met for line in findings.bars(found, FAMILIES)}
    assert lines == {("mlp", 2.0): False, ("resnet", 1.4): True, ("resnet", 0.8): True}


def test_bars_leave_out_opacus_where_it_refuses() -> None:
    found = {"lstm": Finding(distance=1e-6, systems={FEDRAY: timed(14), HOOKS: REFUSED, PLAIN: timed(100)})}
    (line,) = findings.bars(found, FAMILIES)
    assert (line.bar, line.met) == (0.15, False)


def test_bars_are_missed_where_fedray_refuses() -> None:
    found = {"lstm": Finding(distance=None, systems={FEDRAY: REFUSED, HOOKS: timed(1), PLAIN: timed(100)})}
    assert [line.met for line in findings.bars(found, FAMILIES)] == [False, False]


def test_report_names_refusals_and_what_is_missing() -> None:
    found = {
        "lstm": Finding(distance=None, systems={FEDRAY: REFUSED, HOOKS: timed(2), GHOST: REFUSED, PLAIN: timed(100)}),
        "gpt2": Finding(distance=None, systems={}, absent="transformers"),
    }
    text = findings.markdown(found, FAMILIES, CONFIG, "stem")
    assert "- lstm, fedray: it cannot" in text
    assert "- gpt2: not measured, transformers is not installed" in text
    assert json.loads(json.dumps(findings.as_json(found, FAMILIES, CONFIG), allow_nan=False))["families"]["gpt2"]


def test_command_writes_its_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--quick", "--families", "mlp,lstm", "--out", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png"]
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert content["families"]["mlp"]["systems"][FEDRAY]["engine"] == "sequence"
    assert content["families"]["lstm"]["systems"][HOOKS]["refusal"]
    assert "## Acceptance" in capsys.readouterr().out


def test_command_refuses_a_family_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["--families", "mlp,nonsense"])
    assert "'nonsense'; choose from mlp" in capsys.readouterr().err
