"""`fedray frontier`: the sweep, its points, its files, and what it refuses."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from fedray.commands import sweep
from fedray.commands.cli import main
from fedray.config.settings import RunConfig

SMALL = ["--gateways", "2", "--rounds", "1", "--local-steps", "2", "--batch-size", "8", "--samples-per-gateway", "64"]


def test_configs_cover_every_level_noise_and_seed() -> None:
    found = sweep.configs_of(RunConfig(), ["sample", "gateway", "none"], [0.5, 1.0], [], [0, 1])
    assert len(found) == 2 * 2 * 2 + 2
    assert {(c.privacy.noise_level, c.privacy.noise_multiplier, c.run.seed) for c in found} >= {
        ("sample", 0.5, 1),
        ("none", None, 0),
    }
    assert all(c.machine.pool == "inline" and c.run.quiet and c.run.out is None for c in found)


def test_points_are_means_with_the_spread_over_seeds() -> None:
    outcomes = [
        sweep.Outcome(
            level="sample", noise_multiplier=1.0, target_epsilon=None, seed=seed, epsilon=2.0, unit="record",
            adjacency="add-or-remove", delta=1e-5, accuracy=accuracy, loss=None, rounds=1, seconds=1.0,
        )
        for seed, accuracy in enumerate([0.8, 0.9, 0.85])
    ]  # fmt: skip
    (point,) = sweep.points_of(outcomes)
    assert point.accuracy == pytest.approx(0.85)
    assert point.spread == pytest.approx(statistics.stdev([0.8, 0.9, 0.85]))
    assert point.seeds == 3


def test_command_writes_curve_and_table(outdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--noise-multipliers", "0.5,2", "--seeds", "0,1", "--levels", "none,sample,gateway", "--pool", "inline"]
    assert main(["frontier", *SMALL, *flags, "--out", str(outdir)]) == 0
    said = capsys.readouterr().out
    assert "tuning on private data is not covered" in said
    assert "gateway (zero-out)" in said
    card = json.loads((outdir / "frontier.json").read_text())
    assert len(card["runs"]) == 2 + 2 * 2 * 2
    points = {(p["level"], p["noise_multiplier"]): p for p in card["points"]}
    assert set(points) == {("none", None), ("sample", 0.5), ("sample", 2.0), ("gateway", 0.5), ("gateway", 2.0)}
    assert points["sample", 0.5]["epsilon"] > points["sample", 2.0]["epsilon"] > 0
    assert points["none", None]["epsilon"] is None
    assert points["gateway", 2.0]["unit"] == "gateway"
    assert (outdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in outdir.iterdir()) == ["frontier.json", "frontier.png"]


def test_command_calibrates_for_target_epsilons(outdir: Path) -> None:
    flags = ["--target-epsilons", "4", "--seeds", "5", "--pool", "inline", "--quiet"]
    assert main(["frontier", *SMALL, *flags, "--out", str(outdir)]) == 0
    points = json.loads((outdir / "frontier.json").read_text())["points"]
    assert [3.9 < point["epsilon"] <= 4 for point in points] == [True]
    assert points[0]["spread"] is None


@pytest.mark.slow
def test_command_sweeps_as_ray_tasks(outdir: Path, local_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", *SMALL, "--noise-multipliers", "1", "--seeds", "0,1", "--out", str(outdir)]) == 0
    tasks = json.loads((outdir / "frontier.json").read_text())["runs"]
    inline = [sweep.run_one(c) for c in sweep.configs_of(_config(), ["sample"], [1.0], [], [0, 1])]
    assert [run["accuracy"] for run in tasks] == [run.accuracy for run in inline]


def _config() -> RunConfig:
    return RunConfig().resolve(gateways=2, rounds=1, local_steps=2, batch_size=8, samples_per_gateway=64)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --noise-multipliers or --target-epsilons"),
        (["--noise-multipliers", "1", "--target-epsilons", "2"], "either"),
        (["--noise-multipliers", "1,x"], "--noise-multipliers is '1,x'"),
        (["--noise-multipliers", "-1"], "--noise-multiplier is -1.0"),
        (["--noise-multipliers", "0"], "--noise-multiplier is 0"),
        (["--noise-multipliers", "1", "--levels", "sample,user"], "--levels is 'sample,user'"),
        (["--noise-multipliers", "1", "--seeds", "a"], "--seeds is 'a'"),
        (["--noise-multipliers", "1", "--seed", "3"], "give --seeds, a list"),
        (["--noise-multiplier", "1"], "give --noise-multipliers, a list"),
        (["--noise-multipliers", "1", "--batch-size", "99999"], "--batch-size is 99999"),
        (["--noise-multipliers", "1", "--dry-run"], "--dry-run"),
    ],
)
def test_command_refuses_bad_input(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["frontier", "--ray-address", "127.0.0.1:1", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_names_the_remedy_when_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    assert main(["frontier", "--noise-multipliers", "1", "--pool", "inline"]) == 2
    assert 'pip install "fedray[bench]"' in capsys.readouterr().err


def test_command_needs_test_data_with_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_score(self: object, params: object) -> object:
        from fedray.orchestrator.evaluation import Score

        return Score(loss=None, metrics={"accuracy": None})

    monkeypatch.setattr("fedray.orchestrator.evaluation.Evaluation.score", no_score)
    monkeypatch.chdir(tmp_path)
    assert main(["frontier", *SMALL, "--noise-multipliers", "1", "--seeds", "0", "--pool", "inline"]) == 2
    assert "held-out data" in capsys.readouterr().err


@pytest.mark.slow
def test_command_at_the_defaults_takes_less_than_six_minutes(outdir: Path) -> None:
    import time

    start = time.perf_counter()
    flags = ["--noise-multipliers", "0.5,1,2", "--seeds", "0,1", "--levels", "sample,gateway"]
    assert main(["frontier", *flags, "--out", str(outdir)]) == 0
    assert time.perf_counter() - start < 360
