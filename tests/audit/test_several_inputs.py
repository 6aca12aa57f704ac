"""What an attacker plants where x is a tuple or a dict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedray.audit.canaries import mislabelled, out_of_distribution, record_gradients
from fedray.data import inputs
from fedray.data.inputs import leaves, same_structure
from fedray.data.shards import Shard
from fedray.orchestrator.preparing import UserParts
from fedray.tasks.classification import cross_entropy
from tests.audit.worlds import audit_of, flagged


class Joined(nn.Module):
    """A linear model on numbers, tokens and a mask of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4 + 2, 3)

    def forward(self, numbers: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        summed = (self.tokens(tokens) * mask.unsqueeze(-1)).sum(1)
        found: torch.Tensor = self.head(torch.cat([numbers, summed], 1))
        return found


def shard(kind: str, number: int = 12) -> Shard:
    random = torch.Generator().manual_seed(0)
    x: Any = {
        "numbers": torch.randn(number, 2, generator=random),
        "tokens": 2 * torch.randint(4, (number, 5), generator=random),
        "mask": torch.arange(5) < torch.randint(1, 5, (number, 1), generator=random),
    }
    return Shard(x=x if kind == "dict" else tuple(x.values()), y=torch.randint(3, (number,), generator=random))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("make", [mislabelled, out_of_distribution])
def test_canaries_look_like_records(make: Any, kind: str) -> None:
    held, model = shard(kind), Joined()
    canary = make(model, held, 4, np.random.default_rng(1), True)
    assert same_structure(canary.x, held.x)
    assert [(leaf.dtype, leaf.shape[1:], len(leaf)) for leaf in leaves(canary.x)] == [
        (leaf.dtype, leaf.shape[1:], 4) for leaf in leaves(held.x)
    ]
    assert canary.num_records == 4
    assert np.isfinite(record_gradients(model, cross_entropy, canary)).all()


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_out_of_distribution_is_far_in_numbers_and_stays_among_tokens_and_masks(kind: str) -> None:
    held = shard(kind)
    numbers, tokens, mask = leaves(out_of_distribution(Joined(), held, 6, np.random.default_rng(1), True).x)
    assert float(numbers.abs().min()) > 10 * float(leaves(held.x)[0].abs().max())
    assert set(tokens.flatten().tolist()) <= {0, 2, 4, 6}
    assert {tuple(row) for row in mask.tolist()} <= {tuple(row) for row in leaves(held.x)[2].tolist()}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_record_gradients_are_those_of_each_record(kind: str) -> None:
    torch.manual_seed(0)
    model, held = Joined(), shard(kind)
    found = record_gradients(model, cross_entropy, held)
    for index, row in enumerate(found):
        one = held.records(slice(index, index + 1))
        loss = cross_entropy(model(*leaves(one.x)), one.y).sum()
        expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
        assert np.allclose(row, expected.numpy())


def test_audit_attacks_a_run_of_several_inputs() -> None:
    pairs = [(inputs.arrays(held.x), held.y.numpy()) for held in (shard("dict", 200) for _ in range(4))]
    audit = audit_of("sample", UserParts(shards=pairs, model=Joined), samples_per_gateway=None)
    assert "T5 canary record" in {finding.name for finding in audit.findings}
    assert not flagged(audit)
