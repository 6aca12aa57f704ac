"""The laws of privacy.md, each as one function that passes on the real mechanism and fails on a mutated one.

Every proof runs real code of fedray through public calls and raises AssertionError. Honest tests call them as they are,
mutant tests under a patch. Each statistic has alpha = 1e-6 (see `checks`); all draws have fixed seeds. What is charged
and printed (T11) is proven in `tests.privacy.books`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray import Orchestrator, RunConfig
from fedray.algorithms.aggregation import gather
from fedray.data.shards import Shard
from fedray.errors import GatewayError, InputError, RunInterruptedError
from fedray.models.checks import check as check_model
from fedray.models.layout import Layout
from fedray.privacy import mechanism, noise
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.tally import ranges_of
from fedray.reports.progress import Silent
from fedray.rundir.directory import RunDirectory
from tests.privacy import checks
from tests.privacy.worlds import (
    NUM_FEATURES,
    NUM_OUTPUTS,
    Observed,
    data_free_run,
    fresh,
    keys_of,
    model_of,
    observe,
    observe_nothing,
    product_loss,
    random_shard,
    shard_of,
    spec_of,
    training_of,
    wide_model,
    without_last,
    worker_of,
)

COORDINATES = 120_000


# --- what every release must look like ------------------------------------------------------------------------------


def releases_are_as_declared(observed: Observed, spec: PrivacySpec) -> None:
    """Each step releases (clipped + noise)/divisor once, with the public divisor and exactly the noise it names."""
    divisor = spec.batch_size if spec.noise_level == "sample" else 1
    per_gateway: dict[int, list[int]] = {}
    for gateway, step in observed.steps:
        per_gateway.setdefault(gateway, []).append(step)
    for gateway, steps in per_gateway.items():
        assert steps == list(range(spec.local_steps)), f"gateway {gateway} released steps {steps}"
    for seen in observed.steps.values():
        release = seen.release
        assert release.divisor == divisor, f"divided by {release.divisor}, public is {divisor}"
        expected = (release.clipped.astype(np.float64) + release.noise) / divisor
        np.testing.assert_allclose(seen.gradient, expected, rtol=1e-5, atol=1e-5 * spec.noise_std / divisor)


# --- T1: noise law ---------------------------------------------------------------------------------------------------


def local_noise_law(engine: str, level: str) -> None:
    """T1, local noise seen through the trainer's observer: 120 000 coordinates of released − clipped are N(0, sigma·C)."""
    spec = spec_of(level, local_steps=20)
    model = wide_model(COORDINATES // 20)
    shard = random_shard(16, num_outputs=COORDINATES // 20 // (NUM_FEATURES + 1))
    observed = observe(engine, model, training_of(spec), {3: shard}, keys_of(1))
    releases_are_as_declared(observed, spec)
    added = observed.noise()
    assert added.size == COORDINATES
    checks.check_noise_law(added, spec.noise_std)


def aggregate_noise_law() -> None:
    """T1, noise of the aggregate: (released · expected cohort − sum) is N(0, sigma·C), once for the whole sum."""
    spec = spec_of("gateway")
    total = np.random.default_rng(0).normal(size=COORDINATES)
    released = mechanism.aggregate(spec, keys_of(1), total, 4.0, ((0, 3),))
    checks.check_noise_law(released * spec.expected_cohort - total, spec.noise_std)


def run_noise_law(engine: str, level: str, out: Path) -> None:
    """T1, noise of a whole run without data in the way: what the parameters moved by is noise of the claimed size.

    Hardly anybody is sampled (q = .002, four records), and at the `gateway` level the learning rate is too small to move
    anything. B is large enough for the run not to look up other sigmas.
    """
    orchestrator = data_free_run(
        COORDINATES,
        noise_level=level,
        rounds=1,
        lr=0.5 if level != "gateway" else 1e-30,
        seed=fresh(4),
        engine=engine,
        out=out,
    )
    layout = orchestrator.plan.layout
    before = layout.flatten(orchestrator.plan.model).astype(np.float64)
    moved = layout.flatten(orchestrator.run().model) - before
    factor = 1 / 2 if level == "gateway" else 0.5 * math.sqrt(3 / 2) / (25 if level == "sample" else 1)
    checks.check_noise_law(moved, 0.7 * 20.0 * factor)


# --- T2: independence ------------------------------------------------------------------------------------------------


def local_noise_independence(engine: str, level: str) -> None:
    """T2, through the observer: noise of different gateways, steps, rounds and attempts is uncorrelated."""
    spec = spec_of(level)
    num_params = 3000
    model = wide_model(num_params)
    shards = {g: random_shard(4, seed=g, num_outputs=num_params // (NUM_FEATURES + 1)) for g in (0, 1, 5)}
    rows = [
        observe(engine, model, training_of(spec), shards, keys_of(2, index, attempt)).noise()
        for index, attempt in ((1, 0), (1, 1), (2, 0), (11, 0))
    ]
    checks.check_independence(np.concatenate(rows))


def stream_independence() -> None:
    """T2, at the source: gateways, steps, rounds, attempts, purposes and arrived sets each have noise of their own."""
    spec, length = spec_of("sample"), 5000
    rows: list[npt.NDArray[np.float32]] = []
    for index, attempt in ((1, 0), (1, 1), (2, 0), (3, 0)):
        keys = keys_of(3, index, attempt)
        local = LocalNoise(spec, keys, range(4))
        for step in range(3):
            out = np.empty((4, length), np.float32)
            local.fill(step, out)
            rows.extend(out)
        for arrived in (((0, 3),), ((0, 2),), ((0, 1), (3, 3)), ((0, 0), (2, 3)), ()):
            rows.append(noise.aggregate_noise(spec, keys, arrived, length))
        rows.extend(keys.stream(purpose, 0).normals(0, length) for purpose in ("batches", "model draws", "new purpose"))
    checks.check_independence(np.stack(rows))


class _Stop(Silent):
    """Ctrl-C after the first round."""

    def round(self, record: dict[str, Any], rounds: int) -> None:
        raise KeyboardInterrupt


def resumed_noise_is_fresh(level: str, out: Path) -> None:
    """T2 over a real stop, resume and two extensions: no round's noise has anything of an earlier one's.

    As in `run_noise_law`, what the parameters move by in a round is its noise.
    """
    num_params = 24_000

    def params() -> npt.NDArray[np.float64]:
        return RunDirectory(out).restore().checkpoint.params.astype(np.float64)

    lr = 0.5 if level == "sample" else 1e-30
    first = data_free_run(num_params, _Stop(), noise_level=level, rounds=2, lr=lr, seed=fresh(6), out=out)
    seen = [first.plan.layout.flatten(first.plan.model).astype(np.float64)]
    try:
        first.run()
    except RunInterruptedError:
        seen.append(params())
    else:
        raise AssertionError("the run was not cut off: the proof would prove nothing")
    for rounds in (2, 3, 4):
        data_free_run(num_params, resume=out, rounds=rounds).run()
        seen.append(params())
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 4
    checks.check_independence(np.diff(np.stack(seen), axis=0))


# --- T3: sampler -----------------------------------------------------------------------------------------------------


def draws_of(spec: PrivacySpec, num_records: int, draws: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return `[T, N]`: who was in which batch; draws go over steps, gateways, rounds and attempts."""
    drawn = np.zeros((draws, num_records), np.bool_)
    steps, row = 100, 0
    while row < draws:
        block = row // steps
        keys = keys_of(seed, 1 + block % 4, attempt=block % 3)
        sampler = PoissonSampler(spec, keys, gateway=block)
        for step in range(min(steps, draws - row)):
            drawn[row, sampler.batch(step, num_records)] = True
            row += 1
    return drawn


def sampler_law(num_records: int) -> None:
    """T3: 20 000 draws at q = .1 give every record its rate, and batch sizes the variance of Poisson sampling."""
    rate = 0.1
    drawn = draws_of(spec_of("sample", sample_rate=rate), num_records, 20_000)
    checks.check_record_counts(drawn, rate)
    checks.check_batch_sizes(drawn, rate)
    empty, expected = (~drawn.any(axis=1)).mean(), (1 - rate) ** num_records
    assert abs(empty - expected) <= 4.9 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9
    # Different gateways, steps, rounds and attempts draw on their own.
    half = spec_of("sample", sample_rate=0.5)
    rows = [
        draws_of(half, 4000, 6, seed=5),
        *(
            _inclusion(PoissonSampler(half, keys_of(5, index, attempt), gateway).batch(step, 4000), 4000)
            for index, attempt in ((1, 1), (2, 0))
            for gateway in (0, 1, 7)
            for step in (0, 1)
        ),
    ]
    checks.check_independence(np.concatenate([np.atleast_2d(row) for row in rows]) - 0.5)


def _inclusion(batch: npt.NDArray[np.int64], num_records: int) -> npt.NDArray[np.bool_]:
    drawn = np.zeros(num_records, np.bool_)
    drawn[batch] = True
    return drawn


def empty_batches_are_steps(engine: str, level: str) -> None:
    """T3, N = 20, q = .1: an eighth of the batches are empty, and these release nothing but full noise."""
    spec = spec_of(level, sample_rate=0.1, batch_size=2, local_steps=250)
    observed = observe(
        engine, wide_model(60), training_of(spec, lr=1e-3), {0: random_shard(20, num_outputs=10)}, keys_of(6)
    )
    releases_are_as_declared(observed, spec)
    empty = [seen for seen in observed.steps.values() if len(seen.release.batch) == 0]
    assert 10 <= len(empty) <= 60, f"{len(empty)} of 250 batches are empty, 30 are expected"
    assert all(not seen.release.clipped.any() for seen in empty)
    checks.check_noise_law(np.stack([seen.noise for seen in empty]), spec.noise_std)


# --- T4: sensitivity -------------------------------------------------------------------------------------------------


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
        total, weight, arrived = gather(results, layout, device)
        average = mechanism.aggregate(spec, keys, total, weight, ranges_of(arrived))
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
        check_model(model, shard.x, shard.y, product_loss)
    except InputError as error:
        refusal = str(error)
    else:
        raise AssertionError("a model with a running mean was let through")
    assert "buffer 0.mean changes" in refusal


class Fuse:
    """Two gateways' shards, loaded in every round, until the fuse is blown."""

    num_records = 20_000  # so many that only one shard is kept
    blown = False

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if Fuse.blown:
            raise ValueError("blown")
        shard = random_shard(Fuse.num_records, seed=index)
        return shard.x.numpy(), shard.y.numpy()


class _Blow(Silent):
    def round(self, record: dict[str, Any], rounds: int) -> None:
        Fuse.blown = True


def retry_has_other_noise(out: Path) -> None:
    """T2: a round that failed and is repeated in other groups, which may round differently, is charged a second time.

    The attempt is in every noise key ("T2 streams"), so a second attempt is other noise.
    """

    def run(progress: Silent, **settings: Any) -> None:
        config = RunConfig(
            pool="inline", device="cpu", samples_per_gateway=Fuse.num_records, memory_limit=1, **settings
        )
        Orchestrator(Fuse(), model=lambda: model_of("mlp"), loss=product_loss, config=config, progress=progress).run()

    Fuse.blown = False
    try:
        run(_Blow(), noise_level="sample", rounds=2, local_steps=2, batch_size=4, seed=5, out=out)
    except GatewayError:
        Fuse.blown = False
    else:
        raise AssertionError("round 2 did not fail: the proof would prove nothing")
    run(Silent(), resume=out, gateways_per_actor=1)
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 0), (2, 0), (2, 1)]
    assert json.loads((out / "privacy.json").read_text())["steps"] == 3 * 2


def aggregate_divisor_is_public() -> None:
    """T4 for `gateway`: the divisor is the public expected cohort, whoever arrived; nobody at all is still noise."""
    spec, keys = spec_of("gateway", expected_cohort=3.0), keys_of(9)
    for arrived, weight in ((((0, 3),), 4.0), (((1, 1),), 1.0), ((), 0.0)):
        total = np.full(50, weight)
        released = mechanism.aggregate(spec, keys, total, weight, arrived)
        added = noise.aggregate_noise(spec, keys, arrived, 50)
        assert added.all()
        np.testing.assert_allclose(released, (total + added) / 3.0, rtol=1e-12)
