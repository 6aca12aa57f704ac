"""What an extension of a finished run adds: fresh keys, charges on top, and never more than the budget."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.errors import InputError
from fedray.orchestrator.session import Session
from tests.recovery.jobs import assert_true, entries, outcome, resume, round_keys, train


def test_extension_draws_a_fresh_root_and_records_it(finished: Path, disk: Path) -> None:
    results = []
    for name in ("one", "other"):
        run = disk / name
        shutil.copytree(finished, run)
        extended = resume(run, rounds=4)
        assert [record["round"] for record in extended.history] == [1, 2, 3, 4]
        events = [(entry["event"], entry["round"]) for entry in entries(run)]
        assert events == [("charge", 1), ("charge", 2), ("extension", 2), ("charge", 3), ("charge", 4)]
        assert extended.privacy["steps"] == 8
        assert any(
            "rounds: they were added after results had been seen" in line for line in extended.privacy["not_covered"]
        )
        assert not round_keys(run)
        assert_true(run)
        results.append((entries(run)[2]["inputs"], (run / "model.safetensors").read_bytes()))
    assert results[0][0] != results[1][0]  # the operating system's randomness, not the old root
    assert results[0][1] != results[1][1]
    again = resume(disk / "one", rounds=5)
    assert len(again.history) == 5
    assert_true(disk / "one")


def test_extension_never_changes_sigma_nor_passes_the_target(disk: Path) -> None:
    first = train(disk / "run", rounds=2, target_epsilon=9.0)
    sigma = first.privacy["noise_multiplier"]
    run = resume(disk / "run", rounds=6)
    assert run.stopped is not None
    assert "--target-epsilon 9" in run.stopped
    assert run.privacy["noise_multiplier"] == sigma
    assert run.privacy["guarantees"][0]["epsilon"] <= 9.0
    assert len(run.history) == 2
    assert_true(disk / "run")


def test_extension_never_passes_max_epsilon(disk: Path) -> None:
    probe = train(disk / "probe", rounds=4).history
    budget = probe[2]["epsilon"]["gateway"] * 1.001
    train(disk / "run", rounds=2, max_epsilon=budget)
    run = resume(disk / "run", rounds=6)
    assert run.stopped is not None
    assert len(run.history) == 3
    assert run.privacy["guarantees"][0]["epsilon"] <= budget
    assert_true(disk / "run")


@pytest.mark.parametrize("rounds", [1, 2])
def test_extension_refuses_fewer_rounds(finished: Path, disk: Path, rounds: int) -> None:
    shutil.copytree(finished, disk / "run")
    if rounds == 1:
        with pytest.raises(InputError, match=r"--rounds is 1 but .* has done 2 of 2 rounds"):
            resume(disk / "run", rounds=1)
    else:
        resume(disk / "run", rounds=2)
    assert outcome(disk / "run") == outcome(finished)


def test_interrupted_extension_goes_on(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(disk / "run", rounds=1)
    shutil.copytree(disk / "run", disk / "whole")
    resume(disk / "whole", rounds=4)
    advance = Session.advance

    def interrupt(self: Session, index: int, *rest: Any) -> None:
        if index == 3:
            raise KeyboardInterrupt
        advance(self, index, *rest)

    monkeypatch.setattr(Session, "advance", interrupt)
    with pytest.raises(fedray.errors.RunInterruptedError, match=r"python -m fedray --resume .*/run"):
        resume(disk / "run", rounds=4)
    monkeypatch.undo()
    assert not (disk / "run" / "model.safetensors").exists()
    resume(disk / "run")
    assert outcome(disk / "run") == outcome(disk / "whole")
