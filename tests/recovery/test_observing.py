"""What others can follow of a run: TensorBoard scalars and log lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedray.errors import InputError
from fedray.pool.inline_pool import InlinePool
from fedray.reports.callback import trackers
from fedray.reports.tensorboard import TensorBoard
from tests.recovery.jobs import lines, resume, train


def test_tensorboard_holds_the_metrics(disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(disk / "run", track="tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    records = lines(run.path / "metrics.jsonl")
    tags = set(events.Tags()["scalars"])
    assert {"accuracy", "loss", "samples_per_s", "epsilon/gateway", "epsilon/record", "seconds/total"} <= tags
    for tag, values in {
        "accuracy": [record["accuracy"] for record in records],
        "epsilon/gateway": [record["epsilon"]["gateway"] for record in records],
        "seconds/train": [record["seconds"]["train"] for record in records],
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)


def test_tensorboard_goes_on_with_an_extended_run(disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(disk / "run", track="tensorboard", rounds=2)
    resume(disk / "run", rounds=3)
    events = EventAccumulator(str(disk / "run" / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("accuracy")] == [1, 2, 3]


def test_tensorboard_that_is_not_installed_is_refused_before_the_start(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r'pip install "fedray\[track\]"'):
        train(disk / "run", track="tensorboard")
    assert not (disk / "run").exists()


def test_trackers_are_those_that_were_asked_for() -> None:
    assert trackers("none") == []
    assert [type(one) for one in trackers("tensorboard")] == [TensorBoard]
    with pytest.raises(InputError, match="none stands alone"):
        trackers("tensorboard,none")
    with pytest.raises(InputError, match="--track is 'wandb2'; it must be none, tensorboard or module:name"):
        trackers("wandb2")


def test_an_undisturbed_run_logs_nothing(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(disk / "run")
    assert not [record for record in caplog.records if record.name == "fedray"]
    assert InlinePool  # what ran
