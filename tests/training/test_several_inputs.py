"""x as a tuple or a dict of tensors: the same training as one tensor that holds the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import fedray
from fedray.data.inputs import leaves
from fedray.data.shards import Shard
from fedray.errors import InputError
from fedray.models.layout import Layout
from fedray.pool.inline_pool import InlinePool
from fedray.tasks.classification import cross_entropy
from fedray.training.draws import RoundDraws
from fedray.training.engines import Engine, new_trainer
from fedray.training.trainer import LocalTraining
from tests.privacy.worlds import keys_of, spec_of

CPU = torch.device("cpu")
LEVELS = ["none", "sample", "batch", "gateway"]
CLASSES = 3


class Joined(nn.Module):
    """A perceptron on two inputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(torch.cat([left, right], 1)).tanh())
        return found


class Masked(nn.Module):
    """Adds up the embeddings of the tokens that a mask leaves, and weighs them by a number a record."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, CLASSES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        summed = (self.tokens(ids) * mask.unsqueeze(-1)).sum(1)
        found: torch.Tensor = self.head(summed * weight.unsqueeze(-1))
        return found


class AnyNames(nn.Module):
    """Adds up whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, CLASSES)

    def forward(self, **x: torch.Tensor) -> torch.Tensor:
        sums = [leaf.float().reshape(len(leaf), -1).sum(1, keepdim=True) for leaf in x.values()]
        found: torch.Tensor = self.layer(torch.stack(sums).sum(0))
        return found


def joined_model() -> nn.Module:
    torch.manual_seed(3)
    return Joined()


def sequence() -> nn.Module:
    """Return `joined_model` as a model of one input."""
    model = joined_model()
    return nn.Sequential(model.body, nn.Tanh(), model.head)


def masked_model() -> nn.Module:
    torch.manual_seed(3)
    return Masked()


def shards(kind: str) -> dict[int, Shard]:
    """Return three gateways' records, the same values for every kind of x."""
    found = {}
    for gateway, size in enumerate((30, 7, 19)):
        random = torch.Generator().manual_seed(gateway)
        x = torch.randn(size, 6, generator=random)
        parts: Any = {
            "tensor": x,
            "one": (x,),
            "named": {"input": x},
            "tuple": (x[:, :2], x[:, 2:]),
            "dict": {"left": x[:, :2], "right": x[:, 2:]},
        }[kind]
        found[gateway] = Shard(x=parts, y=torch.randint(CLASSES, (size,), generator=random))
    return found


def updates(engine: str, model: nn.Module, level: str, held: dict[int, Shard]) -> npt.NDArray[np.float32]:
    training = LocalTraining(privacy=spec_of(level), optimizer="adam", lr=0.05, loss=cross_entropy)
    trainer = new_trainer(cast(Engine, engine), model, training, CPU)
    return trainer.train(keys_of(1), Layout.of(model).flatten(model), sorted(held), held)


def distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(other.astype(np.float64)))


@pytest.mark.parametrize("kind", ["one", "named"])
@pytest.mark.parametrize("level", LEVELS)
def test_updates_are_the_same_bits_for_x_and_for_one_argument(engine: str, level: str, kind: str) -> None:
    expected = updates(engine, sequence(), level, shards("tensor"))
    assert updates(engine, sequence(), level, shards(kind)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("level", LEVELS)
def test_reference_trains_on_several_inputs_as_on_all_in_one(level: str, kind: str) -> None:
    expected = updates("opacus", sequence(), level, shards("tensor"))
    assert distance(updates("opacus", joined_model(), level, shards(kind)), expected) < 1e-6


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("level", LEVELS)
def test_fast_trainer_gives_the_reference_updates_for_several_inputs(level: str, kind: str) -> None:
    expected = updates("opacus", joined_model(), level, shards(kind))
    assert distance(updates("stacked", joined_model(), level, shards(kind)), expected) < 1e-5


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_batches_hold_the_same_records_of_every_input(kind: str) -> None:
    held = list(shards(kind).values())
    for batch in RoundDraws(spec_of("sample"), CPU, keys_of(1), [0, 1, 2], held).batches():
        assert isinstance(batch.x, tuple if kind == "tuple" else dict)
        for row, shard in enumerate(held):
            chosen = batch.indices(row)
            for leaf, whole in zip(leaves(batch.x), leaves(shard.x), strict=True):
                assert torch.equal(leaf[row, : len(chosen)], whole[torch.from_numpy(chosen)])


def records(number: int, seed: int) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Return tokens, a mask and a weight, and labels."""
    rng = np.random.default_rng(seed)
    x = {
        "ids": rng.integers(7, size=(number, 5)).astype(np.uint8),
        "mask": rng.random((number, 5)) < 0.7,
        "weight": rng.random(number),
    }
    return x, rng.integers(CLASSES, size=number)


def as_kind(pair: tuple[dict[str, Any], Any], kind: str) -> tuple[Any, Any]:
    return (pair[0] if kind == "dict" else tuple(pair[0].values())), pair[1]


def federation(kind: str, level: str, out: Path, **changes: Any) -> fedray.Orchestrator:
    settings: dict[str, Any] = {"rounds": 2, "local_steps": 3, "batch_size": 8, "pool": "inline", "seed": 0, "out": out}
    return fedray.Orchestrator(
        [as_kind(records(24 + gateway, gateway), kind) for gateway in range(3)],
        model=masked_model,
        test=as_kind(records(40, 9), kind),
        config=fedray.RunConfig().resolve(**{**settings, "noise_level": level, **changes}),
    )


@pytest.mark.parametrize("level", ["sample", "gateway"])
def test_federations_of_tuples_and_dicts_give_the_same_run(level: str, tmp_path: Path) -> None:
    runs = [federation(kind, level, tmp_path / kind).run() for kind in ("tuple", "dict")]
    one, other = ((run.path / "model.safetensors").read_bytes() for run in runs)
    assert one == other
    assert runs[0].history[-1]["loss"] == runs[1].history[-1]["loss"]
    trained = fedray.load_model(runs[1].path, masked_model)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), masked_model().parameters(), strict=True))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("level", ["sample", "gateway"])
def test_federation_agrees_with_the_reference_trainer(level: str, kind: str, tmp_path: Path) -> None:
    plan = federation(kind, level, tmp_path / "run").plan
    found = []
    for setup in (plan.setup, replace(plan.setup, engine="opacus", program=None)):
        pool = InlinePool(setup, 3, "auto", "cpu")
        pool.start()
        pool.load(plan.setup_key)
        pool.begin(keys_of(2), plan.layout.flatten(plan.model), range(3))
        (result,) = pool.collect()
        found.append(result.updates)
        pool.close()
    assert distance(*found) < 1e-5


def test_identity_covers_every_input_and_its_name(tmp_path: Path) -> None:
    """A changed value, type or name of any input of a shard or of the test data is seen; the order of keys is not."""

    def identity(changed: Any) -> dict[str, str]:
        pairs = [records(24, 0), records(24, 1)]
        config = fedray.RunConfig().resolve(batch_size=8, pool="inline", seed=0, out=tmp_path / "run")

        held = [(changed(x), y) for x, y in pairs]
        plan = fedray.Orchestrator(held, model=AnyNames, test=held[0], config=config).plan
        return {name: value for name, value in plan.identity({}).items() if name in ("shard 0", "shard 1", "test data")}

    def edited(name: str, value: Any) -> Any:
        return lambda x: {**x, name: value(x[name])}

    def renamed(x: dict[str, Any]) -> dict[str, Any]:  # to a name that sorts alike
        return {("identifiers" if name == "ids" else name): leaf for name, leaf in x.items()}

    base = identity(dict)
    assert identity(lambda x: dict(reversed(x.items()))) == base
    changes = [edited("ids", lambda v: 6 - v), edited("mask", np.logical_not), edited("weight", lambda v: v + 0.5)]
    changes += [edited("mask", lambda v: v.astype(np.int64)), renamed]
    for changed in changes:
        other = identity(changed)
        assert len(other) == 3
        assert all(other[name] != base[name] for name in base)


def test_resume_refuses_a_changed_input(tmp_path: Path) -> None:
    federation("dict", "gateway", tmp_path / "run").run()
    held = [records(24 + gateway, gateway) for gateway in range(3)]
    held[1][0]["mask"] ^= True
    with pytest.raises(InputError, match="shard 1"):
        fedray.Orchestrator(
            held,
            model=masked_model,
            test=records(40, 9),
            config=fedray.RunConfig().resolve(resume=tmp_path / "run", rounds=3, gateways=3),
        ).run()
