"""Reference models, and the checks that a user's model passes or fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedray.errors import InputError
from fedray.models import calls, checks, reference
from fedray.privacy.streams import forked_global_rng
from fedray.tasks.classification import Classification, cross_entropy
from fedray.tasks.own_loss import OwnLoss

CLASSES = Classification()

X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


def test_mlp_takes_records_of_any_shape() -> None:
    assert reference.mlp((1, 8, 8), 10)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert reference.mlp((16,), 4)(torch.zeros(3, 16)).shape == (3, 4)


def test_mlp_is_the_issues_16_32_4() -> None:
    assert [tuple(parameter.shape) for parameter in reference.mlp((16,), 4).parameters()] == [
        (32, 16),
        (32,),
        (4, 32),
        (4,),
    ]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 4, 7)])
def test_cnn_takes_images(shape: tuple[int, int, int]) -> None:
    assert reference.cnn(shape, 10)(torch.zeros(2, *shape)).shape == (2, 10)


def test_cnn_normalises_within_records() -> None:
    assert any(isinstance(module, nn.GroupNorm) for module in reference.cnn((1, 8, 8), 10).modules())


@pytest.mark.parametrize("shape", [(16,), (8, 8), (1, 3, 8)])
def test_cnn_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--model cnn needs images"):
        reference.cnn(shape, 10)


class Module(nn.Module):
    """A linear layer inside the forward of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)


class FunctionalDropout(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.layer(x), training=self.training)


class TiedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).tanh()))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)


GOOD = {
    "linear": lambda: nn.Linear(6, 3),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)),
    "functional_dropout": FunctionalDropout,
    "layer_norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "group_norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)),
    "frozen_layer": lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)),
    "tied": TiedTwice,
    "own_parameter": Scale,
}


@pytest.mark.parametrize("name", GOOD)
def test_check_accepts(name: str) -> None:
    with forked_global_rng(1):
        assert checks.check(GOOD[name](), X, Y, CLASSES) == (3,)


def test_check_leaves_the_model_unchanged() -> None:
    model = GOOD["dropout"]()
    before = copy.deepcopy(model.state_dict())
    with forked_global_rng(1):
        checks.check(model, X, Y, CLASSES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_check_sees_a_coupling_even_if_all_records_are_equal() -> None:
    class Centred(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x - x.mean(dim=0))

    with forked_global_rng(1), pytest.raises(InputError, match="depends on the other records"):
        checks.check(Centred(), torch.ones(1, 6), Y[:1], CLASSES)


def test_check_names_the_module_that_couples() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm()

    model = nn.Sequential(nn.Linear(6, 4), Sorted(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"the output of 1 \(Sorted\) for a record depends on the other records"):
        checks.check(model, X, Y, CLASSES)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_check_names_batch_norm_and_the_remedy(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(kind(8)), nn.Linear(8, 3))
    with pytest.raises(InputError, match=rf"1\.0 is {kind.__name__}.*use GroupNorm or LayerNorm, or --fix-model"):
        checks.check(model, X, Y, CLASSES)


def test_check_refuses_instance_norm_that_keeps_statistics() -> None:
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
    model.append(nn.Linear(6, 3))
    with pytest.raises(InputError, match=r"buffer 1\.running_mean changes during a forward pass"):
        checks.check(model, X, Y, CLASSES)


def test_fix_replaces_batch_norm() -> None:
    model = checks.fix(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[1], nn.GroupNorm)
    assert model[:2](X).std() > 0.1  # one feature a group would normalise everything away
    assert checks.check(model, X, Y, CLASSES) == (3,)


def test_fix_replaces_batch_norm_of_images() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    assert checks.check(checks.fix(model), torch.rand(3, 1, 8, 8), Y[:3], CLASSES) == (3,)


def test_fix_leaves_a_good_model_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    fixed = checks.fix(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fixed.parameters(), strict=True))


def test_cross_entropy_gives_one_value_a_record() -> None:
    values = cross_entropy(torch.zeros(5, 4), Y)
    assert torch.allclose(values, torch.full((5,), 4.0).log())


class RunningSum(torch.nn.Module):
    """Adds up records: the first one alone looks innocent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(dim=0)


class TimeFirst(torch.nn.Module):
    """An LSTM that takes the batch for time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(4, 3), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (torch.nn.Sequential(torch.nn.Linear(4, 2), RunningSum()), torch.randn(3, 4)),
        (TimeFirst(), torch.randn(3, 5, 4)),
    ],
)
def test_check_refuses_coupling_that_spares_the_first_record(model: torch.nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="depends on the other records"):
        checks.check(model, x, torch.zeros(3, dtype=torch.int64), CLASSES)


def test_check_refuses_a_loss_that_couples_records() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target) - output.mean()

    with pytest.raises(InputError, match="loss of a record depends on the other records"):
        checks.check(torch.nn.Linear(4, 2), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), OwnLoss(loss))


def test_check_refuses_outputs_that_only_the_loss_sorts_into_records() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.unflatten(0, (-1, 5)).sum((1, 2))

    model = torch.nn.Sequential(torch.nn.Flatten(0, 1), torch.nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"outputs have shape \(15, 2\) for 3 records"):
        checks.check(model, torch.randn(3, 5, 4), torch.zeros(3, dtype=torch.int64), OwnLoss(loss))


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)


class Pair(nn.Module):
    """Takes two inputs."""

    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        self.layer, self.coupled = nn.Linear(6, 3), coupled

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = values * mask.unsqueeze(1)
        return self.layer(values - values.mean(dim=0) if self.coupled else values)  # type: ignore[no-any-return]


MASK = torch.tensor([True, False, True, True, False])


class Scores:
    """What model libraries return: an object with scores among other things."""

    def __init__(self, logits: object) -> None:
        self.logits = logits


class Wrapped(Module):
    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(self.layer(x))


def test_call_model_hands_over_one_input_a_tuple_or_a_dict() -> None:
    model = Pair()
    expected = model(X, MASK)
    assert torch.equal(calls.call_model(model, (X, MASK)), expected)
    assert torch.equal(calls.call_model(model, {"mask": MASK, "values": X}), expected)
    assert torch.equal(calls.call_model(model.layer, X), model.layer(X))


def test_call_model_takes_the_logits_of_an_output() -> None:
    model = Wrapped()
    assert torch.equal(calls.call_model(model, X), model.layer(X))


def test_check_accepts_an_output_with_logits() -> None:
    assert checks.check(Wrapped(), X, Y, CLASSES) == (3,)


@pytest.mark.parametrize("logits", [None, [0.0]])
def test_check_refuses_an_output_without_a_tensor(logits: object) -> None:
    class Odd(Module):
        def forward(self, x: torch.Tensor) -> Scores:
            return Scores(logits)

    with pytest.raises(InputError, match=r"it returned Scores, not a tensor or an object whose \.logits is one"):
        checks.check(Odd(), X, Y, CLASSES)


@pytest.mark.parametrize("x", [(X, MASK), {"values": X, "mask": MASK}])
def test_check_accepts_several_inputs(x: Any) -> None:
    with forked_global_rng(1):
        assert checks.check(Pair(), x, Y, CLASSES) == (3,)


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("named", [False, True])
def test_check_sees_a_coupling_through_several_inputs(named: bool, number: int) -> None:
    values, mask = X[:number], MASK[:number]
    x: Any = {"values": values, "mask": mask} if named else (values, mask)
    with forked_global_rng(1), pytest.raises(InputError, match="depends on the other records"):
        checks.check(Pair(coupled=True), x, Y[:number], CLASSES)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (
            (X, MASK, X),
            r"shape \(\(6,\), \(\), \(6,\)\) raised TypeError.*x is a tuple, so it is called with 3 arguments",
        ),
        ({"values": X}, r"shape {'values': \(6,\)} raised TypeError.*x is a dict, .*with the arguments values\)"),
    ],
)
def test_check_says_how_several_inputs_were_handed_over(x: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        checks.check(Pair(), x, Y, CLASSES)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_build_refuses_several_inputs_for_models_of_one(name: str) -> None:
    with pytest.raises(InputError, match=f"--model is {name} but x is several inputs; it takes one array"):
        reference.build(name, None, 3)
