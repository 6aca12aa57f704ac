"""What an actor answers is checked before it is averaged, and blamed on its gateways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedray
from fedray.algorithms.aggregation import GroupResult, gather, matrix_sum, weighted_sum
from fedray.errors import RunFailedError
from fedray.models.layout import Layout
from fedray.models.reference import build
from fedray.pool.inline_pool import InlinePool
from tests.recovery.jobs import SMALL, lines, train

LAYOUT = Layout.of(build("mlp", (16,), 4))
CPU = torch.device("cpu")


def answer(gateways: tuple[int, ...] = (4, 5, 6), value: float = 1.0) -> GroupResult:
    updates = np.full((len(gateways), LAYOUT.num_params), value, np.float32)
    return GroupResult(gateways=gateways, updates=updates, weights=None, layout_digest=LAYOUT.digest)


def spoiled(value: float, row: int = 1) -> GroupResult:
    result = answer()
    assert result.updates is not None
    result.updates[row, 7] = value
    return result


def total_of(values: np.ndarray) -> GroupResult:
    return replace(answer(), updates=None, total=values)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(answer(), layout_digest="other"), "gateways 4–6 answered with another model layout"),
        (
            replace(answer(), updates=np.zeros((3, 5), np.float32)),
            r"gateways 4–6 answered with an array of shape \(3, 5\)",
        ),
        (
            replace(answer(), updates=np.zeros((2, LAYOUT.num_params), np.float32)),
            "gateways 4–6 answered with an array",
        ),
        (replace(answer(), updates=None), "gateways 4–6 answered with an array of shape None"),
        (spoiled(np.nan), "gateway 5 answered with NaN or infinite values in round 3"),
        (spoiled(np.inf), "gateway 5 answered with NaN or infinite values in round 3"),
        (spoiled(-np.inf, row=2), "gateway 6 answered with NaN or infinite values"),
        (total_of(np.full(LAYOUT.num_params, np.nan)), "gateways 4–6 answered with NaN or infinite values"),
        (total_of(np.zeros(3)), r"gateways 4–6 answered with an array of shape \(3,\)"),
    ],
)
def test_gather_refuses_a_bad_answer_and_names_its_gateways(bad: GroupResult, words: str) -> None:
    with pytest.raises(RunFailedError, match=words):
        gather([answer((0, 1)), bad], LAYOUT, CPU, 3)


def test_gather_refuses_infinities_that_cancel() -> None:
    bad = [replace(answer((number,)), updates=np.full((1, LAYOUT.num_params), np.inf * sign, np.float32))
           for number, sign in ((1, 1), (2, -1))]  # fmt: skip
    with pytest.raises(RunFailedError, match="gateway 1 answered with NaN or infinite values in round 3"):
        gather([answer((0,)), *bad], LAYOUT, CPU, 3)


def test_gather_takes_values_whose_sum_overflows() -> None:
    found = gather([answer(value=3e38)], LAYOUT, CPU, 3)
    assert np.isfinite(found.total).all()
    assert (found.weight, found.arrived) == (3.0, [4, 5, 6])


def test_gather_adds_stacks_and_sums_alike() -> None:
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(3, LAYOUT.num_params)).astype(np.float32)
    stack = replace(answer(), updates=updates)
    summed = total_of(updates.astype(np.float64).sum(axis=0))
    first, second = (gather([result], LAYOUT, CPU, 3).total for result in (stack, summed))
    assert np.allclose(first, second, rtol=1e-12, atol=1e-12)


def test_gather_adds_up_in_gateway_order_whatever_the_answers_are() -> None:
    """Stacks, sums and empty groups, of records' weights: the sum is that of all rows, one after the other, bit for bit."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, LAYOUT.num_params)).astype(np.float32)
    weights = rng.uniform(1, 9, size=7).tolist()  # whose products are rounded
    summed = weighted_sum(list(rows[2:4]), weights[2:4], CPU)
    results = [
        replace(answer((0, 1)), updates=rows[:2], weights=tuple(weights[:2])),
        replace(answer(()), updates=rows[:0], weights=()),
        replace(answer((2, 3)), updates=None, total=summed, weights=tuple(weights[2:4])),
        replace(answer((4, 5, 6)), updates=rows[4:], weights=tuple(weights[4:])),
    ]
    found = gather(results, LAYOUT, CPU, 3)
    expected = np.zeros(LAYOUT.num_params)
    for part in [*(rows[:2] * np.array(weights[:2])[:, None]), summed, *(rows[4:] * np.array(weights[4:])[:, None])]:
        expected += part
    assert found.total.tobytes() == expected.tobytes()
    assert (found.weight, found.arrived) == (sum(weights), list(range(7)))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_matrix_sum_is_the_weighted_sum(num_rows: int) -> None:
    """What a GPU runs, here on a CPU."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=33).astype(np.float32) for _ in range(num_rows)]
    weights = rng.uniform(0.5, 2, size=num_rows).tolist()
    np.testing.assert_allclose(matrix_sum(rows, weights, CPU), weighted_sum(rows, weights, CPU), rtol=1e-12, atol=1e-12)


def test_run_averages_nothing_of_a_bad_answer(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = InlinePool.collect
    rounds: list[Any] = []

    def bad(self: InlinePool) -> list[GroupResult]:
        results = collect(self)
        rounds.append(results)
        if len(rounds) == 2:
            assert results[0].updates is not None
            results[0].updates[3, 0] = np.nan
        return results

    monkeypatch.setattr(InlinePool, "collect", bad)
    with pytest.raises(
        RunFailedError, match=r"gateway 3 answered with NaN or infinite values in round 2; .* lower --lr"
    ):
        train(disk / "run")
    assert len(lines(disk / "run" / "metrics.jsonl")) == 1
    assert len(lines(disk / "run" / "ledger.jsonl")) == 2  # charged, as it was started


@pytest.mark.parametrize("on_failure", ["fail", "drop"])
def test_max_update_norm_refuses_long_updates(on_failure: str, disk: Path) -> None:
    settings = {"max_update_norm": 1e-6, "on_failure": on_failure, "noise_level": "none"}
    with pytest.raises(RunFailedError, match="past --max-update-norm 1e-06" if on_failure == "fail" else "no gateway"):
        train(disk / "run", **settings)


def test_refused_update_counts_as_zero_at_the_gateway_level(disk: Path) -> None:
    """The divisor stays; what is released is the noise alone."""
    config = fedray.RunConfig().resolve(
        **{**SMALL, "rounds": 1, "max_update_norm": 1e-6, "on_failure": "drop", "noise_multiplier": 0.004},
        out=disk / "run",
    )
    orchestrator = fedray.Orchestrator(config=config)
    before = orchestrator.plan.layout.flatten(orchestrator.plan.model).copy()
    released = orchestrator.plan.layout.flatten(orchestrator.run().model) - before
    assert np.std(released) == pytest.approx(0.004 / SMALL["gateways"], rel=0.2)


def test_long_update_that_is_finite_arrives(disk: Path) -> None:
    """Its float32 squares overflow, its norm does not."""
    train(disk / "run", noise_level="none", optimizer="sgd", lr=1e23, local_steps=1, rounds=1)
    assert [line["round"] for line in lines(disk / "run" / "metrics.jsonl")] == [1]
