"""Directories that are copied or rolled back: the same noise never meets other inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedray.errors import RunInterruptedError
from fedray.orchestrator.session import Session
from fedray.reports.callback import Callback, RoundDone
from tests.privacy.checks import ALPHA
from tests.privacy.worlds import data_free_run

NUM_PARAMS, ROUNDS = 3000, 4
Params = dict[int, Any]


class _Stops(Callback):
    """Interrupts the run when its first round is shown, while the second one trains."""

    def on_round(self, done: RoundDone) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Params:
    """Parameters after each round of the run that was last at work."""
    found: Params = {}
    advance = Session.advance

    def noted(self: Session, index: int, params: Any, server_state: Any) -> None:
        found[index] = np.array(params, np.float64)
        advance(self, index, params, server_state)

    monkeypatch.setattr(Session, "advance", noted)
    return found


def _cut_off(path: Path, seen: Params, **settings: Any) -> None:
    """Leave a run with one finished round and a second one that is charged."""
    with pytest.raises(RunInterruptedError):
        data_free_run(NUM_PARAMS, [_Stops()], noise_level="sample", rounds=ROUNDS, out=path, **settings).run()
    assert _charged(path) == [(1, 0), (2, 0)]


def _resumed(path: Path, seen: Params) -> Params:
    """Resume a directory; return what each round added to the parameters."""
    first = seen[1]
    seen.clear()
    data_free_run(NUM_PARAMS, resume=path).run()
    steps = {1: first, **seen}
    seen[1] = first
    return {index: steps[index] - steps[index - 1] for index in range(2, ROUNDS + 1)}


def _charged(path: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    return [(line["round"], line["attempt"]) for line in lines if line["event"] == "charge"]


def _openings(path: Path) -> list[str]:
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    return [line["inputs"] for line in lines if line["event"] == "incarnation"]


def _most_correlated(one: Params, other: Params, rounds: range) -> tuple[float, float]:
    """Return the largest correlation of two runs' releases, over all pairs of rounds, and T2's bound for it."""
    pairs = [abs(float(np.corrcoef(one[i], other[j])[0, 1])) for i in rounds for j in rounds]
    return max(pairs), float(stats.norm.isf(ALPHA / (2 * len(pairs)))) / NUM_PARAMS**0.5


def test_two_copies_of_an_unseeded_directory_share_no_noise(tmp_path: Path, seen: Params) -> None:
    _cut_off(tmp_path / "one", seen)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = _resumed(tmp_path / "one", seen), _resumed(tmp_path / "other", seen)
    # The second round was charged before the copy: with the same inputs it is the same release, and charged once.
    np.testing.assert_array_equal(one[2], other[2])
    assert _charged(tmp_path / "one") == _charged(tmp_path / "other") == [(index, 0) for index in range(1, ROUNDS + 1)]
    largest, bound = _most_correlated(one, other, range(3, ROUNDS + 1))
    assert largest < bound


def test_a_directory_that_is_rolled_back_shares_no_noise_with_what_it_was(tmp_path: Path, seen: Params) -> None:
    _cut_off(tmp_path / "run", seen)
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    before = _resumed(tmp_path / "run", seen)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "backup", tmp_path / "run")
    after = _resumed(tmp_path / "run", seen)
    largest, bound = _most_correlated(before, after, range(3, ROUNDS + 1))
    assert largest < bound


def test_a_round_that_is_repeated_with_other_inputs_has_the_keys_of_the_new_opening(
    tmp_path: Path, seen: Params
) -> None:
    """The copies resume in other groups, which may round differently: another attempt, and another release."""
    _cut_off(tmp_path / "one", seen)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    found = []
    for path in (tmp_path / "one", tmp_path / "other"):
        first = seen[1]
        data_free_run(NUM_PARAMS, resume=path, gateways_per_actor=1).run()
        found.append(seen[2] - first)
        assert _charged(path)[:3] == [(1, 0), (2, 0), (2, 1)]
    correlation = abs(float(np.corrcoef(*found)[0, 1]))
    assert correlation < float(stats.norm.isf(ALPHA / 2)) / NUM_PARAMS**0.5


def test_each_opening_is_in_the_ledger_before_what_it_charges(tmp_path: Path, seen: Params) -> None:
    _cut_off(tmp_path / "run", seen)
    assert len(_openings(tmp_path / "run")) == 1
    _resumed(tmp_path / "run", seen)
    openings = _openings(tmp_path / "run")
    assert len(openings) == len({*openings}) == 2
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert events == ["incarnation", "charge", "charge", "incarnation", "charge", "charge"]


def test_copies_of_a_seeded_directory_end_alike(tmp_path: Path, seen: Params) -> None:
    _cut_off(tmp_path / "one", seen, seed=3)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = _resumed(tmp_path / "one", seen), _resumed(tmp_path / "other", seen)
    for index in one:
        np.testing.assert_array_equal(one[index], other[index])
    assert _openings(tmp_path / "one") == []
