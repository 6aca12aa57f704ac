"""Odd models: each trains with its records' own gradients and nobody else's, or is refused with the reason."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.streams import RoundKeys
from fedray.tasks.classification import cross_entropy
from fedray.training import program_check
from fedray.training.alone import AloneGradients
from fedray.training.engines import Isolation, isolation_of, traced
from fedray.training.program import Program, Untraceable
from fedray.training.program_check import check_gradients
from fedray.training.record_draws import RecordDraws
from fedray.training.rules.call import Call
from fedray.training.rules.table import RULES
from fedray.training.rules.values import full_reduction
from fedray.training.trainer import LocalTraining
from tests.privacy.worlds import keys_of, observe, spec_of
from tests.training.coupling import class_losses
from tests.training.odd_models import CLASSES, MODELS, REFUSED, WIDTH

C, RECORDS = 1e4, 5  # clips nothing
CPU = torch.device("cpu")


def _shard(seed: int) -> Shard:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(RECORDS, WIDTH, generator=random)
    return Shard(x=x, y=torch.randint(CLASSES, (RECORDS,), generator=random))


def _made(make: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: nn.Module = make().train()  # type: ignore[operator]  # a maker
    return model


def _sums(model: nn.Module, shards: dict[int, Shard]) -> dict[int, np.ndarray]:
    """Return each gateway's sum in one step over all its records, trained side by side."""
    privacy = spec_of("sample", clip_norm=C, sample_rate=1.0, local_steps=1)
    training = LocalTraining(privacy=privacy, optimizer="sgd", lr=0.1, loss=class_losses)
    seen = observe("alone", copy.deepcopy(model), training, shards, keys_of(3))
    return {gateway: seen.steps[gateway, 0].release.clipped for gateway in shards}


def _by_autograd(model: nn.Module, program: Program, keys: RoundKeys, gateway: int, shard: Shard) -> np.ndarray:
    """Return the sum of gradients of batches of one, with the random numbers that the records are given."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = np.zeros(Layout.of(model).num_params)
    for record in range(RECORDS):
        draws = RecordDraws(program.draws, keys, [gateway], CPU).of(0, np.array([[record]]))
        with program_check._SameDraws(draws) as same:
            loss = class_losses(model(shard.x[record : record + 1]), shard.y[record : record + 1]).sum()
        assert not same.differ
        parts = torch.autograd.grad(loss, params, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(params, parts, strict=True)]
        total += torch.cat([part.flatten() for part in flat]).double().numpy()
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_gateways", [1, 3])
def test_odd_model_gives_the_gradients_of_single_records(name: str, num_gateways: int) -> None:
    model = _made(MODELS[name])
    shards = {gateway: _shard(gateway) for gateway in range(num_gateways)}
    program = traced("alone", model, class_losses, shards[0])
    assert program is not None
    found = _sums(model, shards)
    for gateway, shard in shards.items():
        expected = _by_autograd(model, program, keys_of(3), gateway, shard)
        assert np.linalg.norm(found[gateway] - expected) <= 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [40.0, float("nan")])
def test_a_record_of_an_odd_model_moves_nobody_else_by_a_bit(name: str, value: float) -> None:
    model, shards = _made(MODELS[name]), {gateway: _shard(gateway) for gateway in range(3)}
    x = shards[1].x.clone()
    x[-1] = value
    if name in ("single numbers", "embedding under no_grad") and np.isnan(value):
        pytest.skip("NaN makes no index")
    other = shards | {1: Shard(x=x, y=shards[1].y)}
    before, after = _sums(model, shards), _sums(model, other)
    assert not np.array_equal(before[1], after[1])
    for gateway in (0, 2):
        np.testing.assert_array_equal(before[gateway], after[gateway])


@pytest.mark.parametrize("name", REFUSED)
def test_odd_model_is_refused_with_the_reason(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(Untraceable, match=words) as caught:
        traced("alone", _made(make), class_losses, _shard(0))
    assert "\n" not in str(caught.value)


def test_a_token_that_is_in_no_table_is_no_row_of_another_gateways() -> None:
    from fedray.training.gateway_rules import each_embedding

    tables, tokens = torch.randn(2, 4, 3), torch.tensor([[1, 3], [0, 2]])
    np.testing.assert_array_equal(each_embedding(tables, tokens, 2)[1], tables[1][tokens[1]])
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="in no table of 4 rows"):
            each_embedding(tables, torch.tensor([[1, wrong], [0, 2]]), 2)


def _masked(model: nn.Module) -> None:
    next(model.parameters()).register_hook(lambda gradient: 0.5 * gradient)


def _watched(model: nn.Module) -> None:
    next(model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize("engine", ["alone", "sequence"])
@pytest.mark.parametrize("hooked", [_masked, _watched])
def test_hook_on_a_parameters_gradient_is_refused_by_name(engine: Isolation, hooked: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES)).train()
    hooked(model)
    with pytest.raises(Untraceable, match=r"parameter 0\.weight has a hook"):
        traced(engine, model, cross_entropy, _shard(0))


class Ticks:
    """Counts where no state is looked for: at the class."""

    calls = itertools.count()


def ticking_losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return another loss at each call."""
    return class_losses(output, target) * (1.0 + next(Ticks.calls))


def test_loss_on_a_sequence_that_is_not_what_was_traced_is_refused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES)).train()
    with pytest.raises(Untraceable, match="not the one that was traced"):
        traced("sequence", model, ticking_losses, _shard(0))


@pytest.mark.parametrize("method", ["forward", "_call_impl", "_conv_forward"])
def test_layer_with_a_method_of_its_own_is_no_part_of_a_sequence(method: str) -> None:
    layer = nn.Conv1d(1, 2, 3)
    setattr(layer, method, types.MethodType(lambda self, *arguments: arguments[0], layer))
    assert isolation_of("stacked", nn.Sequential(layer, nn.Flatten())) == "alone"


# Rules that couple records, or give what no record gives: whoever writes the next one is told before anything is released.
def _centred(call: Call) -> str | None:
    found = full_reduction("aten.sum.dim_IntList")(call)
    return None if found is None else f"(lambda r: r - r.mean(0))({found})"


def _last_for_all(call: Call) -> str | None:
    found = full_reduction("aten.sum.dim_IntList")(call)
    return None if found is None else f"(lambda r: r[-1:].expand_as(r))({found})"


def _leaks_at_nan(call: Call) -> str | None:
    """Right for all ordinary values."""
    found = full_reduction("aten.sum.dim_IntList")(call)
    return None if found is None else f"(lambda r: r + 0.0 * r.sum(0))({found})"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (_centred, "not the one that was traced"),  # nothing is left of a single record
        (_last_for_all, "side by side"),
        (_leaks_at_nan, "moves another's gradient|side by side"),
    ],
)
@pytest.mark.parametrize("draws", [False, True])
def test_a_rule_that_couples_records_is_found_before_anything_is_released(
    rule: object, words: str, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.dropout(x, 0.2) if draws else x
        return x * x.sum()

    model = _made(lambda: _odd(part))
    program = traced("alone", model, class_losses, _shard(0))
    assert program is not None
    assert any(instruction.op == "aten.sum.default" for instruction in program.instructions)
    monkeypatch.setitem(RULES, "aten.sum.default", rule)
    with pytest.raises(Untraceable, match=words):
        check_gradients(
            lambda: AloneGradients(lambda _: program, Layout.of(model), CPU, 2**31),
            program.draws,
            model,
            class_losses,
            _shard(0),
        )


def _odd(part: object) -> nn.Module:
    from tests.training.odd_models import Odd

    return Odd(part, {})  # type: ignore[arg-type]
