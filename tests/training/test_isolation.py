"""T13: what a record adds to its gateway's sum, and a gateway to its update, depends on no other record and no other gateway.

Neighbouring worlds with models and losses that couple records in a batch: at perturbed parameters, batches of up to twice B,
several steps, in train mode. Each model is refused by name, or moves its own sum by at most C and nobody else's at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.spec import NoiseLevelName
from fedray.training.engines import isolation_of, traced
from fedray.training.program import Untraceable
from fedray.training.trainer import LocalTraining
from tests.privacy.checks import ROUNDING
from tests.privacy.worlds import Observed, keys_of, observe, spec_of
from tests.training.coupling import CLASSES, FEATURES, MODELS, REFUSED

GATEWAYS, RECORDS, C = 3, 16, 2.0
LEVELS: tuple[NoiseLevelName, ...] = ("sample", "batch", "gateway")


def shards(seed: int = 0) -> list[Shard]:
    """Return each gateway's records; those of a gateway are unlike the others'."""
    random = torch.Generator().manual_seed(seed)
    return [
        Shard(
            x=torch.randn(RECORDS, FEATURES, generator=random) + gateway,
            y=torch.randint(CLASSES, (RECORDS,), generator=random),
        )
        for gateway in range(GATEWAYS)
    ]


def perturbed(make: object, seed: int = 0) -> nn.Module:
    """Return a model away from its initial parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = make().train()  # type: ignore[operator]  # a maker
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


def neighbours(whole: Sequence[Shard]) -> dict[str, list[Shard]]:
    """Return worlds in which the last record of gateway 1 is another one, or missing."""
    x, y = whole[1].x.clone(), whole[1].y.clone()
    x[-1], y[-1] = 40.0 * torch.ones(FEATURES), (y[-1] + 1) % CLASSES
    return {
        "swapped": [whole[0], Shard(x=x, y=y), whole[2]],
        "missing": [whole[0], Shard(x=whole[1].x[:-1], y=whole[1].y[:-1]), whole[2]],
    }


def observed(
    name: str, level: NoiseLevelName, world: Sequence[Shard], rate: float, replay: Observed | None = None
) -> Observed:
    """Train the three gateways side by side."""
    make, loss = MODELS[name]
    privacy = spec_of(level, clip_norm=C, sample_rate=rate, batch_size=8, local_steps=8)
    training = LocalTraining(privacy=privacy, optimizer="adam", lr=0.1, loss=loss)
    steps = None if replay is None else replay.steps
    return observe("stacked", perturbed(make), training, dict(enumerate(world)), keys_of(3), replay=steps)


@pytest.mark.parametrize("name", REFUSED)
def test_code_that_keeps_state_or_cannot_be_keyed_is_refused_by_name(name: str) -> None:
    make, loss = MODELS[name]
    model = perturbed(make)
    with pytest.raises(Untraceable, match=REFUSED[name]):
        traced(isolation_of("stacked", model), model, loss, shards()[0])


@pytest.mark.parametrize("rate", [0.5, 1.0])  # batches of about B, and of 2 B
@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_a_record_moves_its_own_sum_by_its_share_and_no_other(name: str, level: NoiseLevelName, rate: float) -> None:
    whole = shards()
    base = observed(name, level, whole, rate)
    for kind, world in neighbours(whole).items():
        other = observed(name, level, world, rate, replay=base)
        # `batch` clips the whole gradient: one record may turn it round.
        most = 2 * C if level == "batch" or kind == "swapped" else C
        moved = []
        for (gateway, step), one in base.steps.items():
            release, its = one.release, other.steps[gateway, step].release
            np.testing.assert_array_equal(release.noise, its.noise)
            distance = float(np.linalg.norm(release.clipped.astype(np.float64) - its.clipped))
            if gateway == 1:
                assert distance <= most * (1 + ROUNDING)
                moved.append(distance)
            elif kind == "swapped":
                np.testing.assert_array_equal(release.clipped, its.clipped)
            else:  # another padding changes the order in which a kernel adds up
                assert distance <= 1e-5 * C
        assert max(moved) > 0.01 * C, "the record is in no batch: the test would prove nothing"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_a_gateway_moves_no_other_gateways_update(name: str) -> None:
    whole = shards()
    make, loss = MODELS[name]
    training = LocalTraining(
        privacy=spec_of("gateway", local_steps=4, sample_rate=1.0), optimizer="sgd", lr=0.05, loss=loss
    )
    model = perturbed(make)
    updates = [
        observe("stacked", model, training, dict(enumerate(world)), keys_of(3)).updates
        for world in (whole, [whole[0], shards(9)[1], whole[2]])
    ]
    assert np.linalg.norm(updates[0][1] - updates[1][1]) > 1e-3
    for gateway in (0, 2):
        np.testing.assert_array_equal(updates[0][gateway], updates[1][gateway])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_records_that_are_trained_alone_give_the_gradients_of_batches_of_one(name: str) -> None:
    make, loss = MODELS[name]
    model, shard = perturbed(make), shards()[1]
    training = LocalTraining(
        privacy=spec_of("sample", clip_norm=C, sample_rate=1.0, local_steps=1), optimizer="sgd", lr=0.1, loss=loss
    )
    found = observe("stacked", model, training, {1: shard}, keys_of(3)).steps[1, 0].release.clipped
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = np.zeros(Layout.of(model).num_params)
    for i in range(RECORDS):
        value = loss(model(shard.x[i : i + 1]), shard.y[i : i + 1]).sum()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(value, params)]).double().numpy()
        total += flat * min(1.0, C / np.linalg.norm(flat))
    assert np.linalg.norm(found - total) <= 1e-5 * np.linalg.norm(total)


class OutsideOfTorch(nn.Module):
    """Computes a factor where no trace looks: by numpy, on a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * float(np.random.rand())  # type: ignore[no-any-return]


class Looks(OutsideOfTorch):
    """Branches on a record's values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if x.sum() > 0 else self.first(-x)  # type: ignore[no-any-return]


class Counts(OutsideOfTorch):
    """Does something else from its second pass on, by a count that no attribute holds."""

    calls = iter(range(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * (1.0 if next(Counts.calls) == 0 else 7.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OutsideOfTorch, "numpy's global random numbers"),
        (Looks, "looks at the values"),
        (Counts, "not the one that was traced"),
    ],
)
def test_code_that_a_trace_does_not_see_is_refused_with_the_reason(kind: type[nn.Module], words: str) -> None:
    with pytest.raises(Untraceable, match=words):
        traced("alone", kind().train(), MODELS["hook"][1], shards()[0])
