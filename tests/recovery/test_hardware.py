"""Hardware decides how results are rounded: where it changes, a round has other noise and a charge of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedray.config.settings import RunConfig
from fedray.orchestrator.charged_rounds import inputs_digest
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.pool.hardware import hardware_of
from fedray.pool.inline_pool import InlinePool
from fedray.pool.pool import PoolInfo
from tests.recovery.jobs import SMALL, assert_true, entries, in_child, resume, train
from tests.recovery.test_attempts import cut_off_after_charge

CPU = torch.device("cpu")


def attempts(run: Path) -> list[tuple[int, int]]:
    return [(entry["round"], entry["attempt"]) for entry in entries(run)]


def test_hardware_names_processor_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hardware_of(CPU)
    assert torch.backends.cpu.get_cpu_capability() in plain
    assert hardware_of(CPU) == plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    chosen = hardware_of(CPU)
    torch.set_float32_matmul_precision("medium")
    try:
        assert len({plain, chosen, hardware_of(CPU)}) == 3
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inputs_digest_sees_the_hardware_of_each_actor() -> None:
    plan = prepare(RunConfig().resolve(**SMALL), UserParts())
    params = plan.layout.flatten(plan.model)
    info = PoolInfo(summary="", groups=(range(2), range(2, 4)), device="cpu", hardware=("one", "one"))
    others = (info, *(replace(info, hardware=pair) for pair in (("other", "one"), ("one", "other"))))
    assert len({inputs_digest(plan, params, other, ((0, 3),)) for other in others}) == 3


def elsewhere(monkeypatch: pytest.MonkeyPatch, since: int) -> None:
    """Let the actor be one on other hardware from the moment on at which it answers in a round."""
    info, collect = InlinePool.info, InlinePool.collect
    moved: list[bool] = []

    def see_collect(self: InlinePool) -> Any:
        moved.extend([True] * (self._round[0].round_index >= since))
        return collect(self)

    def see_info(self: InlinePool) -> PoolInfo:
        return replace(info(self), hardware=("elsewhere",)) if moved else info(self)

    monkeypatch.setattr(InlinePool, "collect", see_collect)
    monkeypatch.setattr(InlinePool, "info", see_info)


@pytest.mark.parametrize("level", ["gateway", "sample"])
def test_a_round_whose_actor_came_back_elsewhere_is_charged_and_trained_again(
    level: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch, since=2)
    moved = train(disk / "run", noise_level=level, rounds=3)
    assert attempts(disk / "run") == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert moved.privacy["steps"] == 4 * SMALL["local_steps"]
    monkeypatch.undo()
    stayed = train(disk / "other", noise_level=level, rounds=3)
    assert stayed.history[0]["loss"] == moved.history[0]["loss"]
    assert stayed.history[1]["loss"] != moved.history[1]["loss"]  # the second attempt's noise
    assert_true(disk / "run")


def test_a_second_charge_for_other_hardware_obeys_the_budget(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epsilon = train(disk / "probe", rounds=2).history[1]["epsilon"]["gateway"]
    elsewhere(monkeypatch, since=2)
    run = train(disk / "run", rounds=2, max_epsilon=epsilon * 1.001)
    assert run.stopped is not None
    assert len(run.history) == 1
    assert run.privacy["guarantees"][0]["epsilon"] <= epsilon * 1.001
    assert_true(disk / "run")


def test_resume_on_other_hardware_draws_other_noise_and_charges_again(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_child(cut_off_after_charge, disk / "run", 3, {"rounds": 3}) == -9
    elsewhere(monkeypatch, since=0)
    resume(disk / "run")
    # It was noticed when round 2 was answered, so that was charged a second time; round 3 was known by then.
    assert attempts(disk / "run") == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert_true(disk / "run")
