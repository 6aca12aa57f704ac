"""A round that is repeated with other inputs has other noise and a second charge; with the same inputs it has neither."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedray.algorithms.aggregation import GroupResult
from fedray.config.settings import RunConfig
from fedray.orchestrator.budget import EpsilonCurve
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.pool.inline_pool import InlinePool
from fedray.privacy import mechanism
from fedray.privacy.ledger import Ledger, read
from fedray.privacy.noise import LocalNoise
from fedray.privacy.streams import RoundKeys
from fedray.privacy.tally import ranges_of
from tests.recovery.jobs import SMALL, DiskWatch, assert_true, in_child, lines, outcome, resume, train

KEY = bytes(32)
LEVEL: Any = "gateway"


def cut_off_after_charge(run: Path, round_index: int, changes: dict[str, Any]) -> None:
    """Train until a round has been charged, and be killed before the checkpoint of the round before it."""

    class Watch(DiskWatch):
        def _count(self, what: str, path: str, descriptor: int | None = None) -> None:
            if f".{round_index - 1:08d}" in what and what.startswith("open"):
                self._fatal = len(self.log)
            super()._count(what, path, descriptor)

    Watch(run, None).start()
    train(run, **changes)


def ledger_of_round(path: Path | None, inputs: str = "a") -> Ledger:
    ledger = Ledger(path)
    ledger.charge(round_index=1, gateways=((0, 3),), steps=2, level=LEVEL, inputs=inputs)
    return ledger


def arrive(ledger: Ledger, attempt: int, gateways: list[int]) -> int:
    return ledger.record_arrivals(
        round_index=1,
        attempt=attempt,
        arrived=ranges_of(gateways),
        label=f"mac of {gateways}",
        everybody=len(gateways) == 4,
        central_noise=True,
    )


def noise_of(attempt: int, gateways: list[int]) -> np.ndarray:
    """Return what the aggregation adds: the release of a sum that is zero."""
    spec = prepare(RunConfig().resolve(**SMALL), UserParts()).spec
    keys = RoundKeys(round_key=KEY, round_index=1, attempt=attempt)
    return mechanism.aggregate(spec, keys, np.zeros(500), len(gateways), ranges_of(gateways))


def test_another_arrived_set_is_another_attempt_with_other_noise(tmp_path: Path) -> None:
    ledger_of_round(tmp_path / "ledger.jsonl")
    again = read(tmp_path / "ledger.jsonl")  # the round may have been released before the crash
    first = arrive(again, 0, [0, 1, 2, 3])
    other = arrive(again, 0, [0, 1, 3])
    third = arrive(again, 0, [0, 3])
    assert (first, other, third) == (0, 1, 2)
    assert again.charges().rounds == 3
    vectors = [noise_of(0, [0, 1, 2, 3]), noise_of(1, [0, 1, 3]), noise_of(2, [0, 3]), noise_of(0, [0, 1, 3])]
    for index, one in enumerate(vectors):
        assert all(abs(np.corrcoef(one, two)[0, 1]) < 0.25 for two in vectors[:index])


def test_the_same_arrived_set_is_the_same_attempt_without_a_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert arrive(ledger_of_round(path), 0, [0, 1]) == 0
    size = path.stat().st_size
    assert arrive(read(path), 0, [0, 1]) == 0
    assert path.stat().st_size == size
    assert arrive(read(path), 0, [1, 2]) == 1
    size = path.stat().st_size
    assert arrive(read(path), 0, [1, 2]) == 1
    assert arrive(read(path), 0, [0, 1]) == 0
    assert path.stat().st_size == size


def test_the_same_arrived_set_under_other_inputs_keeps_its_own_attempt(tmp_path: Path) -> None:
    """The set that arrived before did so with other updates: its noise must not be drawn again."""
    path = tmp_path / "ledger.jsonl"
    assert arrive(ledger_of_round(path), 0, [0, 1]) == 0
    ledger = read(path)
    assert ledger.charge(round_index=1, gateways=((0, 3),), steps=2, level=LEVEL, inputs="b") == 1
    assert arrive(ledger, 1, [0, 1]) == 1


@pytest.mark.parametrize("crash", ["before the arrival line", "after it"])
def test_arrival_survives_a_crash_between_its_lines(tmp_path: Path, crash: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger_of_round(path)
    assert arrive(read(path), 0, [0, 1]) == 1
    if crash == "before the arrival line":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert arrive(read(path), 0, [0, 1]) == 1
    assert [entry.event for entry in read(path).entries] == ["charge", "charge", "arrival"]


def test_charge_of_a_later_round_that_had_started_is_found_behind_a_repeated_one() -> None:
    ledger = Ledger(None)
    for round_index, inputs in ((1, "a"), (2, "a"), (1, "b")):
        ledger.charge(round_index=round_index, gateways=((0, 3),), steps=2, level=LEVEL, inputs=inputs)
    assert ledger.charge(round_index=2, gateways=((0, 3),), steps=2, level=LEVEL, inputs="b") == 1
    assert ledger.charges(through=1).rounds == 3
    assert ledger.charges().rounds == 4


@pytest.mark.parametrize("level", ["gateway", "sample"])
@pytest.mark.parametrize("changes", [{"gateways_per_actor": 1}, {"engine": "opacus"}])
def test_resume_with_other_groups_or_engine_draws_other_noise_and_charges_again(
    changes: dict[str, Any], level: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rounds": 3, "noise_level": level}
    run = disk / "run"
    assert in_child(cut_off_after_charge, run, 3, settings) == -9
    assert [entry["round"] for entry in lines(run / "ledger.jsonl")] == [1, 2, 3]
    drawn: list[tuple[int, int]] = []
    aggregate, local = mechanism.aggregate, LocalNoise.__init__

    def see_aggregate(spec: Any, keys: RoundKeys, *rest: Any) -> Any:
        drawn.append((keys.round_index, keys.attempt))
        return aggregate(spec, keys, *rest)

    def see_local(self: LocalNoise, spec: Any, keys: RoundKeys, gateways: Any) -> None:
        drawn.append((keys.round_index, keys.attempt))
        local(self, spec, keys, gateways)

    monkeypatch.setattr(mechanism, "aggregate", see_aggregate)
    monkeypatch.setattr("fedray.training.draws.LocalNoise", type("Seen", (LocalNoise,), {"__init__": see_local}))
    resume(run, **changes)
    # Rounds 2 and 3 had been charged with other groups: both are new attempts, with noise of their own.
    assert set(drawn) == {(2, 1), (3, 1)}
    charges = [(entry["round"], entry["attempt"]) for entry in lines(run / "ledger.jsonl")]
    assert charges == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert lines(run / "metrics.jsonl")[-1]["epsilon"] == last_epsilon(run)
    assert_true(run)


def last_epsilon(run: Path) -> dict[str, float]:
    from fedray.privacy.accounting import Charges, epsilon_by_unit

    spec = prepare(
        RunConfig().resolve(**{**SMALL, "noise_level": lines(run / "ledger.jsonl")[0]["level"]}), UserParts()
    ).spec
    return dict(epsilon_by_unit(spec, Charges(steps=5 * SMALL["local_steps"], rounds=5)))


def test_resume_with_the_same_groups_charges_nothing(disk: Path) -> None:
    assert in_child(cut_off_after_charge, disk / "run", 3, {"rounds": 3}) == -9
    train(disk / "whole", rounds=3)
    resume(disk / "run")
    assert outcome(disk / "run") == outcome(disk / "whole")


def test_resume_does_not_pay_twice_when_the_budget_is_met_exactly(disk: Path) -> None:
    epsilons = train(disk / "probe", rounds=3).history
    budget = {"rounds": 3, "max_epsilon": epsilons[-1]["epsilon"]["gateway"] * 1.001}
    whole = train(disk / "whole", **budget)
    assert whole.stopped is None
    assert in_child(cut_off_after_charge, disk / "run", 3, budget) == -9
    shutil.copytree(disk / "run", disk / "other")
    assert resume(disk / "run").stopped is None
    assert outcome(disk / "run") == outcome(disk / "whole")
    # Other groups need a second charge, which the budget does not allow: stopped, and never past it.
    stopped = resume(disk / "other", gateways_per_actor=1)
    assert stopped.stopped is not None
    assert "--max-epsilon" in stopped.stopped
    assert len(lines(disk / "other" / "ledger.jsonl")) == 3
    assert_true(disk / "other")


def test_a_second_charge_for_another_arrived_set_obeys_the_budget(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epsilons = train(disk / "probe", rounds=3).history
    budget = {"rounds": 3, "on_failure": "drop", "max_epsilon": epsilons[-1]["epsilon"]["gateway"] * 1.001}
    assert in_child(cut_off_after_charge, disk / "run", 3, budget) == -9
    collect = InlinePool.collect

    def late(self: InlinePool) -> list[GroupResult]:
        return [without_last(result) for result in collect(self)]

    monkeypatch.setattr(InlinePool, "collect", late)
    run = resume(disk / "run")
    assert run.stopped is not None
    assert run.privacy["guarantees"][0]["epsilon"] <= budget["max_epsilon"]


def without_last(result: GroupResult) -> GroupResult:
    assert result.updates is not None
    return GroupResult(
        gateways=result.gateways[:-1],
        updates=result.updates[:-1],
        weights=None,
        layout_digest=result.layout_digest,
        failures=("gateway 3 was late",),
    )


def test_left_out_gateways_are_charged_recorded_and_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collect = InlinePool.collect

    def late(self: InlinePool) -> list[GroupResult]:
        return [without_last(result) for result in collect(self)]

    monkeypatch.setattr(InlinePool, "collect", late)
    run = train(disk / "run", rounds=2, on_failure="drop")
    ledger = lines(run.path / "ledger.jsonl")
    assert [entry["event"] for entry in ledger] == ["charge", "arrival"] * 2
    assert [entry["gateways"] for entry in ledger] == [[[0, 3]], [[0, 2]]] * 2  # charged in full
    assert any("left out (and charged) in round 1, 2" in line for line in run.privacy["not_covered"])
    assert 'event=left_out round=1 gateways=3-3 causes=["gateway 3 was late"]' in caplog.text
    assert_true(run.path)


def test_check_budget_refuses_what_passes_it(tmp_path: Path) -> None:
    plan = prepare(RunConfig().resolve(**SMALL, max_epsilon=6.0), UserParts())
    curve = EpsilonCurve(plan)
    ledger = ledger_of_round(None)
    with pytest.raises(Exception, match="past --max-epsilon 6"):
        curve.check_budget(ledger, 2)
    curve.close()
