"""Scores on held-out data: of one input or several, in parts that fit into memory."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fedray.models.layout import Layout
from fedray.orchestrator.evaluation import Evaluation, Score
from fedray.tasks.classification import Classification, cross_entropy

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(9000, 6, generator=RANDOM), torch.randint(3, (9000,), generator=RANDOM)


class Parts(nn.Module):
    """A linear model of one input or of two side by side; notes how many values each pass gives out."""

    sizes: ClassVar[list[int]] = []  # of the class: an evaluation works on a copy

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(6, outputs)

    def forward(self, *parts: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(torch.cat([*parts, *named.values()], 1))
        Parts.sizes.append(output.numel())
        return output


def score(x: Any, y: torch.Tensor, outputs: int = 3) -> Score:
    torch.manual_seed(1)
    model = Parts(outputs)
    Parts.sizes.clear()
    found = Evaluation(model, (x, y), Classification(), torch.device("cpu"))
    return found.score(Layout.of(model).flatten(model))


def test_score_is_that_of_all_records() -> None:
    torch.manual_seed(1)
    output = Parts()(X).detach()
    found = score(X, Y)
    assert found.metrics["accuracy"] == pytest.approx(float((output.argmax(1) == Y).double().mean()))
    assert found.loss == pytest.approx(float(cross_entropy(output, Y).double().mean()))


@pytest.mark.parametrize("x", [(X,), (X[:, :1], X[:, 1:]), {"left": X[:, :4], "right": X[:, 4:]}])
def test_score_is_the_same_for_one_input_and_several(x: Any) -> None:
    assert score(x, Y) == score(X, Y)


def test_score_takes_fewer_records_at_once_where_outputs_are_large() -> None:
    """64 MiB of outputs a pass: a language model gives a score for each word of its vocabulary at each place."""
    score(X[:600], Y[:600], outputs=100_000)
    assert sum(Parts.sizes[1:]) == 600 * 100_000
    assert max(Parts.sizes) * 4 <= 2**26
    assert max(Parts.sizes) * 4 > 2**26 - 400_000


def test_score_takes_4096_small_records_at_once() -> None:
    score(X, Y)
    assert [size // 3 for size in Parts.sizes] == [1, 4096, 4096, 9000 - 2 * 4096]
