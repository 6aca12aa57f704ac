"""The Python entry: shards, models, losses and tests that a caller brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedray

RNG = np.random.default_rng(0)


def records(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return records of three classes that are easy to tell apart."""
    y = RNG.integers(0, 3, number)
    return (3 * np.eye(3, 5)[y] + RNG.normal(size=(number, 5))).astype(np.float32), y


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def config(outdir: Path, **changes: Any) -> fedray.RunConfig:
    settings = {"rounds": 3, "batch_size": 32, "pool": "inline", "seed": 0, "out": outdir}
    # The level whose epsilon takes no time to compute; what is tested here does not depend on it.
    private = {"noise_level": "gateway", "noise_multiplier": 0.2}
    return fedray.RunConfig().resolve(**{**settings, **private, **changes})


class Lazy:
    """Shards that remember which were loaded."""

    def __init__(self, number: int) -> None:
        self.shards = [records(100) for _ in range(number)]
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.loaded.append(index)
        return self.shards[index]


def test_orchestrator_trains_gateways_with_a_model(outdir: Path) -> None:
    gateways = [fedray.Gateway(f"clinic-{i}", data=records(100)) for i in range(4)]
    run = fedray.Orchestrator(gateways, model=make, test=records(300), config=config(outdir)).run()
    assert run.history[-1]["accuracy"] > 0.85
    assert run.privacy["noise_level"] == "gateway"
    assert [record["round"] for record in run.history] == [1, 2, 3]
    assert run.stopped is None
    assert not run.model.training


def test_orchestrator_takes_pairs_and_counts_them(outdir: Path) -> None:
    run = fedray.Orchestrator([records(64) for _ in range(3)], model=make, config=config(outdir, gateways=99))
    assert run.plan.config.federation.gateways == 3


def test_orchestrator_takes_deferred_gateways(outdir: Path) -> None:
    gateways = [fedray.Gateway(f"clinic-{i}", data=lambda: records(100)) for i in range(3)]
    settings = config(outdir, samples_per_gateway=100)
    run = fedray.Orchestrator(gateways, model=make, test=records(300), config=settings).run()
    assert run.history[-1]["accuracy"] > 0.8


def test_orchestrator_builds_a_model_that_fits_when_none_is_given(outdir: Path) -> None:
    run = fedray.Orchestrator([records(64) for _ in range(3)], config=config(outdir, rounds=1)).run()
    assert run.model(torch.zeros(2, 5)).shape == (2, 3)


def test_orchestrator_has_no_accuracy_without_a_test(outdir: Path) -> None:
    run = fedray.Orchestrator([records(64) for _ in range(3)], model=make, config=config(outdir)).run()
    assert {(record["accuracy"], record["loss"]) for record in run.history} == {(None, None)}


def test_orchestrator_prepares_lazy_shards_without_loading_them(outdir: Path) -> None:
    shards = Lazy(5)
    fedray.Orchestrator(shards, model=make, test=records(50), config=config(outdir, samples_per_gateway=100))
    assert shards.loaded == []


def test_orchestrator_loads_each_lazy_shard_once(outdir: Path) -> None:
    shards = Lazy(5)
    settings = config(outdir, samples_per_gateway=100)
    run = fedray.Orchestrator(shards, model=make, test=records(300), config=settings).run()
    assert sorted(shards.loaded) == [0, 1, 2, 3, 4]
    assert run.history[-1]["accuracy"] > 0.85


def test_orchestrator_does_not_vouch_for_disjoint_shards_of_others(outdir: Path) -> None:
    run = fedray.Orchestrator([records(64) for _ in range(3)], model=make, config=config(outdir, rounds=1)).run()
    assert any("assumed to be disjoint" in line for line in run.privacy["not_covered"])


@pytest.mark.parametrize("level", ["none", "sample", "batch", "gateway"])
def test_orchestrator_trains_a_regression_with_its_own_loss(level: str, outdir: Path) -> None:
    weights = np.array([[1.0], [-2.0], [0.5]], np.float32)

    def measured(number: int) -> tuple[np.ndarray, np.ndarray]:
        x = RNG.normal(size=(number, 3)).astype(np.float32)
        return x, x @ weights

    def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((output - target) ** 2).sum(dim=1)

    noise = None if level == "none" else 0.3
    settings = config(outdir, rounds=5, lr=0.1, noise_level=level, noise_multiplier=noise)
    run = fedray.Orchestrator(
        [measured(64) for _ in range(4)],
        model=lambda: nn.Linear(3, 1),
        loss=squared,
        test=measured(200),
        config=settings,
    ).run()
    assert run.history[-1]["accuracy"] is None
    assert run.history[-1]["loss"] < 1.5  # 5.25 is the targets' own variance


def test_orchestrator_takes_tokens(outdir: Path) -> None:
    def tokens(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(RNG.integers(0, 10, (number, 6)))
        return x, (x[:, 0] > 4).long()

    def embed() -> nn.Module:
        return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 2))

    run = fedray.Orchestrator(
        [tokens(200) for _ in range(3)], model=embed, test=tokens(200), config=config(outdir, lr=0.05, rounds=5)
    ).run()
    assert run.history[-1]["accuracy"] > 0.8


def test_orchestrator_is_reproducible_from_its_seed(tmp_path: Path) -> None:
    shards = [records(64) for _ in range(3)]
    files = []
    for name in ("one", "other"):
        fedray.Orchestrator(shards, model=make, config=config(tmp_path / name)).run()
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_orchestrator_differs_without_a_seed(tmp_path: Path) -> None:
    shards = [records(64) for _ in range(3)]
    files = []
    for name in ("one", "other"):
        fedray.Orchestrator(shards, model=make, config=config(tmp_path / name, seed=None)).run()
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] != files[1]


def test_orchestrator_leaves_global_generators_alone(outdir: Path) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fedray.Orchestrator([records(64) for _ in range(3)], model=make, config=config(outdir, rounds=1)).run()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
