"""Proofs of sensitivity (T4): how far one record, shard or gateway moves what is released."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import gather
from fedray.data.shards import Shard
from fedray.errors import InputError
from fedray.models.checks import check as check_model
from fedray.models.layout import Layout
from fedray.privacy import mechanism, noise
from fedray.privacy.tally import ranges_of
from fedray.tasks.own_loss import OwnLoss
from tests.privacy import checks
from tests.privacy.proofs.releases import releases_are_as_declared
from tests.privacy.worlds import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    keys_of,
    model_of,
    observe,
    observe_nothing,
    product_loss,
    random_shard,
    shard_of,
    spec_of,
    training_of,
    without_last,
    worker_of,
)


def neighbours_differ_at_most(
    engine: str, kind: str, level: str, shard: Shard, neighbour: Shard, *, bound: float, rate: float = 0.5
) -> None:
    """Record D, replay D′: at every step the released sums differ by at most `bound`, and nothing else differs.

    Without an observer a trainer may take another path: so one step without it must obey the bound as well.
    """
    spec = spec_of(level, sample_rate=rate)
    model, training, keys = model_of(kind), training_of(spec), keys_of(8)
    first = observe(engine, model, training, {2: shard}, keys)
    second = observe(engine, model, training, {2: neighbour}, keys, replay=first.steps)
    nearest = replace(training, privacy=replace(spec, local_steps=1), lr=1.0)  # lr 1: the update is −gradient
    updates = [observe_nothing(engine, model, nearest, {2: held}, keys) for held in (shard, neighbour)]
    released = [update * (spec.batch_size if level == "sample" else 1) for update in updates]
    rounding = 1e-5 * (spec.noise_std * math.sqrt(released[0].size) + 10 * spec.clip_norm * spec.batch_size)
    checks.check_distance(*released, bound + rounding)
    common = min(shard.num_records, neighbour.num_records)
    assert first.steps.keys() == second.steps.keys() == {(2, step) for step in range(spec.local_steps)}
    for where, one in first.steps.items():
        other = second.steps[where]
        checks.check_distance(one.release.clipped, other.release.clipped, bound)
        assert np.isfinite(one.gradient).all()
        assert np.isfinite(other.gradient).all()
        assert one.release.noise.tobytes() == other.release.noise.tobytes(), "neighbours got different noise"
        assert one.release.divisor == other.release.divisor, "the divisor depends on private data"
        mine, theirs = one.release.batch, other.release.batch
        assert mine[mine < common].tolist() == theirs[theirs < common].tolist(), "other records were sampled"
    releases_are_as_declared(first, spec)
    releases_are_as_declared(second, spec)


def hard_shards() -> Iterator[tuple[str, Shard]]:
    """Yield shards whose last record is as unpleasant as possible for the sum of the others."""
    ones, target = torch.ones(NUM_FEATURES), torch.ones(NUM_OUTPUTS)
    for num_records in (2, 7, 8, 9, 16, 17, 24):
        shard = random_shard(num_records, seed=num_records, scale=5.0)
        yield f"{num_records} normal records", shard
    aligned = shard_of(10 * ones.repeat(9, 1), target.repeat(9, 1))
    yield "duplicates", aligned
    for name, factor in (("an opposite giant", -1e4), ("a giant", 1e15), ("an overflow", 1e30), ("a dwarf", 1e-30)):
        x = aligned.x.clone()
        x[-1] = factor * ones
        yield name, Shard(x=x, y=aligned.y)
    for name, value in (("NaN", math.nan), ("inf", math.inf), ("zero", 0.0)):
        x = aligned.x.clone()
        x[-1, 0] = value
        if value == 0.0:
            x[-1] = 0.0
        yield name, Shard(x=x, y=aligned.y)


def record_sensitivity(engine: str) -> None:
    """T4 for `sample`: one record more or less moves the released sum by at most C, whatever it holds."""
    clip_norm = spec_of("sample").clip_norm
    for kind in ("linear", "mlp"):
        for _, shard in hard_shards():
            neighbours_differ_at_most(engine, kind, "sample", shard, without_last(shard), bound=clip_norm, rate=1.0)


def batch_sensitivity(engine: str) -> None:
    """T4 for `batch`: any other shard moves the released value by at most 2C, silence by C."""
    spec = spec_of("batch", sample_rate=1.0)
    shards = [shard for _, shard in hard_shards()]
    for one, other in zip(shards, [*shards[1:], shards[0]], strict=True):
        neighbours_differ_at_most(engine, "linear", "batch", one, other, bound=2 * spec.clip_norm, rate=1.0)
        observed = observe(engine, model_of("linear"), training_of(spec), {0: one}, keys_of(8))
        for seen in observed.steps.values():
            checks.check_distance(seen.release.clipped, np.zeros_like(seen.release.clipped), spec.clip_norm)


def gateway_sensitivity(engine: str) -> None:
    """T4 for `gateway`: leaving one gateway out moves the aggregate by at most C/cohort, another shard by 2C/cohort."""
    spec = spec_of("gateway", expected_cohort=3.0)
    device = torch.device("cpu")
    shards = [random_shard(5, seed=1), random_shard(30, seed=2, scale=3.0), random_shard(90, seed=3, scale=100.0)]

    def released(held: list[Shard]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        local = worker_of(engine, model_of("mlp"), training_of(spec, lr=5.0), held)
        keys = keys_of(9)
        layout = Layout.of(model_of("mlp"))
        results = [local.train(keys, layout.flatten(model_of("mlp")), [gateway]) for gateway in range(3)]
        sums = gather(results, layout, device)
        average = mechanism.aggregate(spec, keys, sums.total, sums.weight, ranges_of(sums.arrived))
        return average, np.concatenate([result.updates for result in results if result.updates is not None])

    honest, updates = released(shards)
    norms = np.linalg.norm(updates.astype(np.float64), axis=1)
    assert norms.max() > 0.99 * spec.clip_norm, "nothing was clipped: the proof would prove nothing"
    for update in updates:
        checks.check_distance(update, np.zeros_like(update), spec.clip_norm)
    silent, _ = released([*shards[:2], shard_of(np.zeros((90, NUM_FEATURES)), np.zeros((90, NUM_OUTPUTS)))])
    checks.check_distance(honest * 3, silent * 3, spec.clip_norm)
    replaced, _ = released([*shards[:2], random_shard(1, seed=4, scale=100.0)])
    checks.check_distance(honest * 3, replaced * 3, 2 * spec.clip_norm)


def upload_sensitivity(engine: str) -> None:
    """T4 for what an actor sends: with the same noise one record moves the whole upload by at most lr·C/B a step."""
    spec, lr = spec_of("sample", local_steps=1, sample_rate=1.0, clip_norm=0.25), 0.1
    shard = random_shard(9, seed=5)

    def sent(held: Shard) -> npt.NDArray[np.float32]:
        worker = worker_of(engine, model_of("mlp"), training_of(spec, lr=lr), [held])
        result = worker.train(keys_of(9), Layout.of(model_of("mlp")).flatten(model_of("mlp")), [0])
        assert result.updates is not None
        return result.updates[0]

    largest = lr * spec.clip_norm / spec.batch_size
    whole, without = sent(shard), sent(without_last(shard))
    assert np.linalg.norm(whole - without) > 0.9 * largest, "the record was not clipped: the proof would prove nothing"
    checks.check_distance(whole, without, largest)


class RunningMean(torch.nn.Module):
    """Keeps a mean of what it saw in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Note the mean and change nothing."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return x


def changing_buffers_are_refused() -> None:
    """T4: a model whose buffers gather records is refused, with the buffer's name."""
    shard = random_shard(8)
    model = torch.nn.Sequential(RunningMean(), model_of("mlp"))
    try:
        check_model(model, shard.x, shard.y, OwnLoss(product_loss))
    except InputError as error:
        refusal = str(error)
    else:
        raise AssertionError("a model with a running mean was let through")
    assert "buffer 0.mean changes" in refusal


def aggregate_divisor_is_public() -> None:
    """T4 for `gateway`: the divisor is the public expected cohort, whoever arrived; nobody at all is still noise."""
    spec, keys = spec_of("gateway", expected_cohort=3.0), keys_of(9)
    for arrived, weight in ((((0, 3),), 4.0), (((1, 1),), 1.0), ((), 0.0)):
        total = np.full(50, weight)
        released = mechanism.aggregate(spec, keys, total, weight, arrived)
        added = noise.aggregate_noise(spec, keys, arrived, 50)
        assert added.all()
        np.testing.assert_allclose(released, (total + added) / 3.0, rtol=1e-12)
