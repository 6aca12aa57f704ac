"""Two pools, one law: the same seed gives the same bits however gateways are placed, and global generators rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedray import Orchestrator, RunConfig
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from tests.privacy.worlds import keys_of, model_of, product_loss, random_shard, spec_of

GATEWAYS = 16
Params = np.ndarray[Any, np.dtype[np.float32]]


def train(out: Path, **changes: Any) -> tuple[Params, bytes]:
    """Run a small job and return its final parameters and the bytes of its model file."""
    settings: dict[str, Any] = {
        "rounds": 2,
        "local_steps": 3,
        "batch_size": 4,
        "samples_per_gateway": 16,
        "seed": 3,
        "pool": "inline",
        "device": "cpu",
        "out": out,
    }
    shards = [(s.x.numpy(), s.y.numpy()) for s in (random_shard(9 + g, seed=g) for g in range(GATEWAYS))]
    orchestrator = Orchestrator(
        shards, model=lambda: model_of("mlp"), loss=product_loss, config=RunConfig().resolve(**{**settings, **changes})
    )
    model = orchestrator.run().model
    return orchestrator.plan.layout.flatten(model), (out / "model.safetensors").read_bytes()


def assert_same(one: tuple[Params, bytes], other: tuple[Params, bytes], *, exact: bool = True) -> None:
    """Fail unless two runs ended at the same parameters: within 1e-6, and byte for byte where `exact`.

    The stacked trainer pads a group's batches to the largest one, so its sums are rounded differently in other groups.
    """
    np.testing.assert_allclose(one[0], other[0], atol=1e-6, rtol=0)
    assert not exact or one[1] == other[1]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("level", "engine"),
    [
        ("sample", "stacked"),
        ("gateway", "stacked"),
        pytest.param("sample", "opacus", marks=pytest.mark.slow),
    ],
)
def test_ray_equals_inline_with_one_and_two_actors(tmp_path: Path, level: str, engine: str) -> None:
    """Final parameters are those of this process: the same bytes for the same groups, within 1e-6 for others."""
    whole = train(tmp_path / "inline-16", noise_level=level, engine=engine, gateways_per_actor=16)
    for per_actor in (16, 8) if level == "sample" else (8,):
        ray = train(
            tmp_path / f"ray-{per_actor}", noise_level=level, engine=engine, pool="ray", gateways_per_actor=per_actor
        )
        assert_same(whole, ray, exact=engine == "opacus")
        inline = train(tmp_path / f"same-{per_actor}", noise_level=level, engine=engine, gateways_per_actor=per_actor)
        assert_same(inline, ray)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_equals_inline_with_more_actors_than_cores(tmp_path: Path) -> None:
    """Four actors on two cores change nothing with central noise; sixteen with local noise: tests/cluster/test_nodes.py."""
    ray = train(tmp_path / "ray", noise_level="gateway", pool="ray", gateways_per_actor=4)
    assert_same(train(tmp_path / "inline-4", noise_level="gateway", gateways_per_actor=4), ray)
    assert_same(train(tmp_path / "inline-16", noise_level="gateway"), ray, exact=False)


@pytest.mark.parametrize(
    ("level", "engine"),
    [
        *((level, "stacked") for level in ("none", "batch", "sample", "gateway")),
        ("sample", "opacus"),
        *(pytest.param(level, "opacus", marks=pytest.mark.slow) for level in ("none", "batch", "gateway")),
    ],
)
def test_inline_grouping_changes_nothing(tmp_path: Path, level: str, engine: str) -> None:
    """Groups of 16, 5 and 1 gateways end at the same parameters, at every level; the reference at the same bytes."""
    runs = [
        train(tmp_path / str(per_actor), noise_level=level, engine=engine, gateways_per_actor=per_actor)
        for per_actor in (16, 5, 1)
    ]
    assert_same(runs[0], runs[1], exact=engine == "opacus")
    assert_same(runs[0], runs[2], exact=engine == "opacus")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("level", "engine"), [("sample", "stacked"), pytest.param("batch", "opacus", marks=pytest.mark.slow)]
)
def test_noise_is_the_same_bits_in_actors(tmp_path: Path, level: str, engine: str) -> None:
    """With q so small that nobody is drawn, parameters are made of noise alone: equal bytes mean equal noise."""
    quiet = {"noise_level": level, "engine": engine, "samples_per_gateway": 10**5, "optimizer": "sgd", "rounds": 1}
    quiet["noise_multiplier"], quiet["batch_size"] = 1.0, 1
    assert_same(train(tmp_path / "inline", **quiet), train(tmp_path / "ray", **quiet, pool="ray", gateways_per_actor=8))


def test_noise_and_batches_do_not_depend_on_placement() -> None:
    """A gateway's noise and batches are the same bits whichever gateways are beside it."""
    spec, keys = spec_of("sample"), keys_of(1)
    whole = np.empty((GATEWAYS, 676), np.float32)
    together = LocalNoise(spec, keys, range(GATEWAYS))
    apart = [LocalNoise(spec, keys, [gateway]) for gateway in range(GATEWAYS)]
    for step in range(3):
        together.fill(step, whole)
        for gateway, noise in enumerate(apart):
            alone = np.empty((1, 676), np.float32)
            noise.fill(step, alone)
            assert alone.tobytes() == whole[gateway].tobytes()
    first, second = PoissonSampler(spec, keys, 3), PoissonSampler(spec, keys, 3)
    drawn, sizes = first.batches(range(4), 30)
    assert [batch.tolist() for batch in np.split(drawn, np.cumsum(sizes)[:-1])] == [
        second.batch(step, 30).tolist() for step in range(4)
    ]


def global_state() -> tuple[Any, ...]:
    """Return the state of torch's, numpy's and Python's global generators."""
    name, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, np.asarray(words).tolist(), tuple(rest), random.getstate()


@pytest.mark.parametrize("level", ["none", "batch", "sample", "gateway"])
def test_run_leaves_global_generators_alone(tmp_path: Path, level: str, engine: str) -> None:
    """No draw of a run comes from a global generator, none of their states moves, and theirs do not move it."""
    before = global_state()
    first = train(tmp_path / "one", noise_level=level, engine=engine)
    assert global_state() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert_same(first, train(tmp_path / "two", noise_level=level, engine=engine))


@pytest.mark.usefixtures("local_ray")
def test_ray_run_leaves_global_generators_alone(tmp_path: Path) -> None:
    """The same through Ray."""
    before = global_state()
    train(tmp_path / "ray", pool="ray", gateways_per_actor=16)
    assert global_state() == before


@pytest.mark.parametrize("level", ["sample", "batch", "gateway"])
def test_runs_without_seed_differ(tmp_path: Path, level: str) -> None:
    """Without --seed two runs share nothing; with two seeds they differ as well."""
    one, two = (train(tmp_path / str(number), noise_level=level, seed=None) for number in range(2))
    assert one[1] != two[1]
    assert train(tmp_path / "a", noise_level=level, seed=1)[1] != train(tmp_path / "b", noise_level=level, seed=2)[1]


@pytest.mark.parametrize("change", [{"optimizer": "sgd"}, {"rounds": 1}, {"noise_multiplier": 2.0}])
def test_equality_is_not_vacuous(tmp_path: Path, change: dict[str, Any]) -> None:
    """The comparison fails as soon as anything that matters differs."""
    check: Callable[[], None] = lambda: assert_same(train(tmp_path / "a"), train(tmp_path / "b", **change))  # noqa: E731
    with pytest.raises(AssertionError):
        check()
