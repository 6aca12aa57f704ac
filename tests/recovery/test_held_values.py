"""What a loss or model holds outside of its parameters: a run goes on with the same values only."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedray.errors import InputError
from fedray.training.held_state import held_arrays
from tests.recovery.jobs import assert_true, entries, in_child
from tests.recovery.test_resuming import make, own, stop_own

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CLASS_WEIGHTS = torch.ones(3)


class Weighted:
    """A loss with class weights among its attributes."""

    def __init__(self, **held: Any) -> None:
        self.held = held

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weight = torch.as_tensor(self.held.get("weights", [1.0, 1.0, 1.0]), dtype=torch.float32)
        return F.cross_entropy(output * self.held.get("scale", 1.0), target, weight=weight, reduction="none")


class Shifted(nn.Module):
    """A model that adds a tensor which is neither a parameter nor a part of its state."""

    def __init__(self, shift: torch.Tensor, buffer: bool) -> None:
        super().__init__()
        self.inner = make()
        if buffer:
            self.register_buffer("shift", shift, persistent=False)
        else:
            self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x) + self.shift
        return output


def in_closure(weights: torch.Tensor) -> Loss:
    return lambda output, target: F.cross_entropy(output, target, weight=weights, reduction="none")


def in_default(weights: torch.Tensor) -> Loss:
    def loss(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor = weights) -> torch.Tensor:
        return F.cross_entropy(output, target, weight=weight, reduction="none")

    return loss


def in_global(weights: torch.Tensor) -> Loss:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, weight=CLASS_WEIGHTS, reduction="none")

    # As its module would have it in another process.
    scope = {**loss.__globals__, "CLASS_WEIGHTS": weights}
    return types.FunctionType(loss.__code__, scope, "loss")


HELD: dict[str, tuple[str, Callable[[torch.Tensor], dict[str, Any]]]] = {
    "partial": ("arguments of the loss", lambda w: {"loss": partial(F.cross_entropy, weight=w, reduction="none")}),
    "closure": ("variable weights around in_closure", lambda w: {"loss": in_closure(w)}),
    "default argument": ("default arguments of in_default", lambda w: {"loss": in_default(w)}),
    "global": ("global CLASS_WEIGHTS", lambda w: {"loss": in_global(w)}),
    "attribute": ("attribute held of the loss", lambda w: {"loss": Weighted(weights=w)}),
    "numpy array": ("attribute held of the loss", lambda w: {"loss": Weighted(weights=w.numpy())}),
    "torch loss": ("attribute weight of the loss", lambda w: {"loss": nn.CrossEntropyLoss(weight=w, reduction="none")}),
    "attribute of the model": ("attribute shift of the model", lambda w: {"model": lambda: Shifted(w, buffer=False)}),
    "buffer that is not saved": ("buffer shift", lambda w: {"model": lambda: Shifted(w, buffer=True)}),
}


def stop_holding(run: Path, name: str) -> None:
    stop_own(run, **HELD[name][1](torch.ones(3)))


def attempts(run: Path) -> list[int]:
    return [entry["attempt"] for entry in entries(run)]


@pytest.mark.parametrize("name", HELD)
def test_resume_refuses_other_values_that_a_part_holds(disk: Path, name: str) -> None:
    """Round 2 had been charged, and may have been released with the old values under the same noise."""
    assert in_child(stop_holding, disk / "run", name) == -9
    said, parts = HELD[name]
    with pytest.raises(InputError, match=rf"{said}.* is not what the run began with"):
        own(resume=disk / "run", **parts(torch.tensor([1.0, 1.0, 1.5])))
    assert attempts(disk / "run") == [0, 0]
    own(resume=disk / "run", **parts(torch.ones(3)))
    assert attempts(disk / "run") == [0, 0]
    assert_true(disk / "run")


def stop_with_settings(run: Path) -> None:
    stop_own(run, loss=Weighted(scale=1.0))


@pytest.mark.parametrize(("scale", "expected"), [(1.0, [0, 0]), (2.0, [0, 0, 1])])
def test_resume_with_other_plain_values_draws_other_noise_and_charges_again(
    disk: Path, scale: float, expected: list[int]
) -> None:
    assert in_child(stop_with_settings, disk / "run") == -9
    own(resume=disk / "run", loss=Weighted(scale=scale))
    assert attempts(disk / "run") == expected


class Slotted:
    """Keeps a tensor where no attribute dictionary tells of it."""

    __slots__ = ("weights",)

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights


def hidden_in(holder: Slotted) -> Loss:
    return lambda output, target: F.cross_entropy(output, target, weight=holder.weights, reduction="none")


def stop_hiding(run: Path) -> None:
    stop_own(run, loss=hidden_in(Slotted(torch.ones(3))))


@pytest.mark.parametrize(("last", "expected"), [(1.0, [0, 0]), (1.5, [0, 0, 1])])
def test_resume_with_other_values_that_no_name_tells_draws_other_noise_and_charges_again(
    disk: Path, last: float, expected: list[int]
) -> None:
    """What the code was traced to holds them, wherever they came from."""
    assert in_child(stop_hiding, disk / "run") == -9
    own(resume=disk / "run", loss=hidden_in(Slotted(torch.tensor([1.0, 1.0, last]))))
    assert attempts(disk / "run") == expected
    assert_true(disk / "run")


def test_directory_tells_no_plain_digest_of_held_values(disk: Path) -> None:
    """Weights of classes may come from private counts: equal ones have other digests in another run."""
    for run in ("one", "other"):
        own(out=disk / run, loss=in_closure(torch.tensor([0.2, 0.3, 0.5])), rounds=1)
    identities = [(disk / run / "checkpoint" / "identity.json").read_text().splitlines()[0] for run in ("one", "other")]
    found = [{name: value for name, value in json.loads(text).items() if "weights" in name} for text in identities]
    assert found[0].keys() == found[1].keys() != set()
    assert found[0] != found[1]


def test_equal_arrays_in_other_objects_are_the_same(disk: Path) -> None:
    """It is values that count, not which object holds them."""
    assert in_child(stop_holding, disk / "run", "numpy array") == -9
    own(resume=disk / "run", loss=Weighted(weights=np.ones(3, np.float32)))
    assert attempts(disk / "run") == [0, 0]


def test_functions_of_one_name_do_not_hide_what_the_other_holds() -> None:
    first, second = in_closure(torch.ones(3)), in_closure(torch.ones(3))

    def both(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return first(output, target) + second(output, target)

    before = held_arrays(make(), both)
    for one in (first, second):
        (weights,) = (cell.cell_contents for cell in one.__closure__)  # type: ignore[attr-defined]  # a function
        weights[2] = 1.5
        assert held_arrays(make(), both) != before
        weights[2] = 1.0
    assert held_arrays(make(), both) == before
