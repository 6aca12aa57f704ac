"""T13 and T14: the audit sees records and gateways that are coupled, and leaves honest training alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedray.audit.audit import attacks
from fedray.audit.finding import Finding
from fedray.audit.isolation import attack_isolation, batch_sizes
from fedray.audit.lab import Lab
from fedray.audit.movement import Movement
from fedray.audit.sampler import attack_participation
from fedray.audit.updates import attack_updates
from fedray.orchestrator.preparing import UserParts
from tests.audit.coupled import COUPLINGS, Gated, clipped_by_halves, trained_by, unclipped
from tests.audit.mutants import COHORTS, COUPLED, MUTANTS
from tests.audit.worlds import LEVELS, QUICK, plan_of

UNCOUPLED = {level: [name for name in MUTANTS[level] if name not in COUPLED] for level in LEVELS}


def _isolation(level: str, **changes: object) -> list[Finding]:
    lab = Lab(plan_of(level, UserParts(model=Gated), **changes), QUICK)
    return attack_updates(lab) if level == "gateway" else attack_isolation(lab)


def _flagged(found: list[Finding]) -> set[str]:
    return {finding.name for finding in found if finding.violated}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_isolation_flags_coupled_records(coupling: str, level: str) -> None:
    with trained_by(coupling):
        assert "T13 isolation" in _flagged(_isolation(level))


@pytest.mark.parametrize("level", LEVELS)
def test_isolation_passes_the_same_trainer_without_coupling(level: str) -> None:
    with trained_by("none"):
        assert _flagged(_isolation(level)) == set()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_isolation_flags_coupled_records_of_a_single_gateway(coupling: str) -> None:
    with trained_by(coupling):
        assert "T13 isolation" in _flagged(_isolation("sample", gateways=1))


def test_isolation_flags_what_a_model_keeps_from_step_to_step() -> None:
    """At `batch` a gateway's records may be coupled within a batch, but not with a step that did not draw them."""
    with trained_by("centre"):
        assert "T13 isolation" in _flagged(_isolation("batch", gateways=1))


def test_isolation_passes_a_model_that_draws() -> None:
    def dropout() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))

    lab = Lab(plan_of("sample", UserParts(model=dropout)), QUICK)
    found = attack_isolation(lab)
    assert _flagged(found) == set(), [finding.text for finding in found]


@pytest.mark.parametrize("clip", [unclipped, clipped_by_halves])
@pytest.mark.parametrize("level", ["sample", "batch"])
def test_own_sum_flags_missing_and_partial_clipping(level: str, clip: object) -> None:
    with trained_by(clip=clip):  # type: ignore[arg-type]
        assert "T4 own sum" in _flagged(_isolation(level))


def test_own_sum_comes_as_close_to_the_claim_as_clipping_allows() -> None:
    """The margin of clipping is 1e-6 of C, the attack's tolerance 1e-5: neither hides much."""
    for level in LEVELS:
        own = _isolation(level)[0]
        assert 0.99999 < own.lower_bound <= own.claim


def test_movement_that_is_not_finite_is_a_violation() -> None:
    movement = Movement()
    movement.note_own(float("inf"), 1.0, "NaN")
    movement.note_elsewhere(float("inf"), 1e-5, "NaN")
    assert movement.own > 1e5
    assert movement.elsewhere > 1e5


def test_batch_sizes_are_all_up_to_twice_the_batch() -> None:
    for batch_size in (1, 4, 64):
        assert sorted(batch_sizes(batch_size)) == list(range(1, 2 * batch_size + 1))


def _first_flag(level: str, **changes: object) -> str | None:
    lab = Lab(plan_of(level, UserParts(model=Gated), **changes), QUICK)
    torch.set_num_threads(1)
    return next((finding.name for finding in attacks(lab) if finding.violated), None)


@pytest.mark.parametrize("name", UNCOUPLED["sample"])
def test_audit_flags_mutants_at_sample(name: str) -> None:
    with MUTANTS["sample"][name]():
        assert _first_flag("sample") is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCOUPLED["batch"])
def test_audit_flags_mutants_at_batch(name: str) -> None:
    with MUTANTS["batch"][name]():
        assert _first_flag("batch") is not None


@pytest.mark.parametrize("name", UNCOUPLED["gateway"])
def test_audit_flags_mutants_at_gateway(name: str) -> None:
    with MUTANTS["gateway"][name]():
        assert _first_flag("gateway") is not None


@pytest.mark.parametrize("name", COHORTS)
def test_audit_flags_cohorts_that_are_drawn_once(name: str) -> None:
    with COHORTS[name]():
        found = attack_participation(Lab(plan_of("gateway", participation=0.5), QUICK))
    assert "T3 cohort independence" in _flagged(found)


def test_audit_passes_cohorts_that_are_drawn_for_each_attempt() -> None:
    found = attack_participation(Lab(plan_of("gateway", participation=0.5), QUICK))
    assert [finding.verdict for finding in found] == ["consistent"] * 3
