"""T4: whatever the records are, neighbours move a release by at most what the accountant was told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.clipping import clip_factors, clip_rows
from fedray.privacy.mechanism import aggregate
from fedray.privacy.noise import LocalNoise, aggregate_noise
from fedray.tasks.classification import cross_entropy
from fedray.training.engines import new_trainer
from tests.privacy import checks
from tests.privacy.proofs.sensitivity import hard_shards, neighbours_differ_at_most
from tests.privacy.worlds import (
    MODELS,
    NUM_FEATURES,
    NUM_OUTPUTS,
    clipped_sum,
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

FIXTURE = [HealthCheck.function_scoped_fixture]  # `engine` is a name; there is nothing to reset
SCALES = st.integers(-30, 30).map(lambda exponent: 10.0**exponent)
VALUES = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30, -1e30]))


@st.composite
def shards(draw: st.DrawFn, minimum: int = 2) -> Shard:
    """Draw records of wild scales: random, duplicated, opposite; the last one may hold anything."""
    num_records = draw(st.integers(minimum, 26))
    shard = random_shard(num_records, seed=draw(st.integers(0, 99)), scale=draw(SCALES))
    x, y = shard.x, shard.y
    kind = draw(st.sampled_from(["random", "duplicates", "opposite", "zeros"]))
    if kind == "duplicates":
        x, y = x[:1].repeat(num_records, 1), y[:1].repeat(num_records, 1)
    elif kind == "opposite":
        x, y = x[:1].repeat(num_records, 1), y[:1].repeat(num_records, 1)
        x[1::2] *= -1
    elif kind == "zeros":
        x = torch.zeros_like(x)
    x = x.clone()
    x[-1] = torch.tensor(draw(st.lists(VALUES, min_size=NUM_FEATURES, max_size=NUM_FEATURES))) * draw(SCALES)
    return Shard(x=x, y=y)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=FIXTURE)
@given(shard=shards(), kind=st.sampled_from(MODELS), rate=st.sampled_from([0.3, 1.0]))
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_sample_release_moves_by_at_most_c(engine: str, shard: Shard, kind: str, rate: float) -> None:
    """Add or remove the last record: ‖s(D) − s(D′)‖ ≤ C·(1 + 1e-5), everything else equal. Deterministic (no alpha)."""
    bound = spec_of("sample").clip_norm
    neighbours_differ_at_most(engine, kind, "sample", shard, without_last(shard), bound=bound, rate=rate)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=FIXTURE)
@given(shard=shards(minimum=1), other=shards(minimum=1), kind=st.sampled_from(MODELS))
def test_batch_release_moves_by_at_most_2c(engine: str, shard: Shard, other: Shard, kind: str) -> None:
    """Replace the whole shard: ‖h(D) − h(D′)‖ ≤ 2C·(1 + 1e-5), everything else equal. Deterministic (no alpha)."""
    clip_norm = spec_of("batch").clip_norm
    neighbours_differ_at_most(engine, kind, "batch", shard, other, bound=2 * clip_norm)
    observed = observe(engine, model_of(kind), training_of(spec_of("batch")), {0: shard}, keys_of(8))
    for seen in observed.steps.values():
        checks.check_distance(seen.release.clipped, np.zeros_like(seen.release.clipped), clip_norm)


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("kind", MODELS)
def test_release_is_the_clipped_sum_of_autograd(engine: str, level: str, kind: str) -> None:
    """The clipped value is what plain autograd gives record by record: frozen and shared parameters included."""
    spec = spec_of(level, clip_norm=0.8, local_steps=1)
    model, shard = model_of(kind), random_shard(12, seed=3)
    for seed in range(3):
        observed = observe(engine, model, training_of(spec), {0: shard}, keys_of(seed))
        release = observed.steps[0, 0].release
        if level == "sample":
            expected = clipped_sum(model, product_loss, shard, release.batch.tolist(), spec.clip_norm)
        else:
            mean = clipped_sum(model, product_loss, shard, release.batch.tolist(), math.inf) / spec.batch_size
            expected = mean * min(1.0, spec.clip_norm / max(float(np.linalg.norm(mean)), 1e-30))
        np.testing.assert_allclose(release.clipped, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_training_unobserved_is_the_same(engine: str, level: str) -> None:
    """What tests and audits observe is what a run does without an observer, to float32 rounding."""
    training = training_of(spec_of(level, local_steps=5))
    shards_ = {g: random_shard(6 + 9 * g, seed=g) for g in range(3)}
    observed = observe(engine, model_of("mlp"), training, shards_, keys_of(12)).updates.ravel()
    alone = observe_nothing(engine, model_of("mlp"), training, shards_, keys_of(12))
    assert np.linalg.norm(observed - alone) <= 1e-5 * np.linalg.norm(alone)


@pytest.mark.parametrize("kind", ["linear", "rectified"])
def test_record_outside_the_batch_changes_nothing(kind: str, engine: str) -> None:
    """A record that is not drawn has no influence at all: the amplification of the per-record claims rests on it.

    Record 0 is where a padded batch may look; it overflows, in the second model in the forward pass already.
    """
    wide = nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.ReLU(), nn.Linear(6, NUM_OUTPUTS))
    with torch.no_grad():
        wide[0].weight.fill_(10.0)
    model = model_of("linear") if kind == "linear" else wide
    for level in ("sample", "batch"):
        spec = spec_of(level, local_steps=40, sample_rate=0.2, batch_size=4)
        training = training_of(spec, loss=_soft_loss, lr=0.01)
        honest = {g: random_shard(16, seed=g) for g in range(4)}
        x = honest[1].x.clone()
        x[0] = 3e38
        poisoned = {**honest, 1: Shard(x=x, y=honest[1].y)}
        first = observe(engine, model, training, honest, keys_of(13))
        second = observe(engine, model, training, poisoned, keys_of(13), replay=first.steps)
        untouched = 0
        for where, one in first.steps.items():
            if where[0] != 1 or 0 not in one.release.batch:
                other = second.steps[where].release.clipped
                checks.check_distance(one.release.clipped, other, 1e-5)
                untouched += where[0] == 1
        assert untouched > 10


class Difference(nn.Module):
    """Scores the difference of two tokens' embeddings, much magnified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, NUM_OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors = self.embed(x)
        found: torch.Tensor = 1e9 * (vectors[:, 0] - vectors[:, 1])
        return found


def test_gradients_that_cancel_within_a_record_leave_the_noise_alone() -> None:
    """The same token twice: its gradients are huge and cancel, so the record is as good as not there."""
    spec = spec_of("sample", sample_rate=1.0, batch_size=2, local_steps=1)
    training = training_of(spec, loss=cross_entropy)
    y = torch.zeros(2, dtype=torch.int64)
    model = Difference()

    def update(*records: tuple[int, int]) -> np.ndarray:
        shard = Shard(x=torch.tensor(records), y=y[: len(records)])
        trainer = new_trainer("stacked", model, training, torch.device("cpu"))
        return trainer.train(keys_of(1), Layout.of(model).flatten(model), [0], {0: shard})[0]

    with_records = update((1, 1), (2, 2))
    noise = np.empty((1, 3 * NUM_OUTPUTS), np.float32)
    LocalNoise(spec, keys_of(1), [0]).fill(0, noise)
    np.testing.assert_allclose(with_records, -training.lr * noise[0] / 2, atol=1e-6)


def test_sample_release_of_a_sequence_moves_by_at_most_c(engine: str) -> None:
    """Positions of a sequence that nearly cancel: the record's norm must not be lost to rounding.

    e₁ ≈ −e₂ and a₁ ≈ a₂ of length 1e4: terms of 1e12 in the squared norm cancel to some 1e5, which float32 cannot see
    when it adds up products of Gram matrices.
    """
    size, loss = 64, _opposite_positions
    model = nn.Sequential(nn.Unflatten(1, (2, size)), nn.Linear(size, size, bias=False))
    rng = np.random.default_rng(0)
    spec = spec_of("sample", local_steps=1, sample_rate=1.0)
    for scale in (1.0, 1e2, 1e4, 1e6):
        base = rng.normal(size=size)
        x = scale * np.concatenate([base, base * (1 + 1e-4 * rng.normal(size=size))])[None]
        observed = observe(engine, model, training_of(spec, loss=loss), {0: shard_of(x, np.ones((1, 1)))}, keys_of(1))
        clipped = observed.steps[0, 0].release.clipped
        checks.check_distance(clipped, np.zeros_like(clipped), spec.clip_norm)


def _soft_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(output, dim=1) - (output * target).sum(dim=1)


def _opposite_positions(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 10 * (output[:, 0] - output[:, 1]).sum(dim=1) * target[:, 0]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=FIXTURE)
@given(exponent=st.integers(-6, 6), shard=shards())
def test_sample_release_is_bounded_for_any_clip_norm(engine: str, exponent: int, shard: Shard) -> None:
    """The bound scales with C over twelve orders of magnitude."""
    clip_norm = 10.0**exponent
    spec = spec_of("sample", clip_norm=clip_norm, sample_rate=1.0, local_steps=1)
    only = Shard(x=shard.x[-1:], y=shard.y[-1:])
    clipped = observe(engine, model_of("linear"), training_of(spec), {0: only}, keys_of(1)).steps[0, 0].release.clipped
    checks.check_distance(clipped, np.zeros_like(clipped), clip_norm)


def test_gateway_update_is_clipped_and_a_diverged_one_counts_as_zero(engine: str) -> None:
    """Every row that leaves a worker has norm at most C; one that is not finite is zero, the divisor stays public."""
    spec = spec_of("gateway", local_steps=8)
    held = [random_shard(4, seed=1), random_shard(9, seed=2, scale=1e3), random_shard(9, seed=3, scale=1e18)]
    worker = worker_of(engine, model_of("mlp"), training_of(spec, lr=1e30), held)
    params = np.zeros(sum(p.numel() for p in model_of("mlp").parameters()), np.float32)
    result = worker.train(keys_of(1), params, [0, 1, 2])
    assert result.updates is not None
    for update in result.updates:
        checks.check_distance(update, np.zeros_like(update), spec.clip_norm)
    assert not result.updates[2].any()
    nobody = aggregate(spec, keys_of(1), np.zeros(7), 0.0, ())
    np.testing.assert_allclose(nobody, aggregate_noise(spec, keys_of(1), (), 7) / spec.expected_cohort, rtol=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=6),
    scale=SCALES,
    clip_norm=st.sampled_from([1e-6, 0.3, 1.0, 1e6]),
)
def test_clip_rows_never_leaves_the_ball(rows: list[list[float]], scale: float, clip_norm: float) -> None:
    """Guarantee of `clip_factors` and edge cases of `select_finite`: zero stays, what is not finite becomes zero."""
    matrix = torch.tensor(rows) * scale
    clipped = clip_rows(matrix, clip_norm)
    assert torch.isfinite(clipped).all()
    norms = torch.linalg.vector_norm(clipped.double(), dim=1)
    assert (norms <= clip_norm * (1 + 1e-5)).all()
    assert (clipped[~torch.isfinite(matrix).all(dim=1)] == 0).all()


def test_clip_factors_leave_small_vectors_alone() -> None:
    """Factor 1 for norms below C and for zero; 0 for NaN and infinity."""
    norms = torch.tensor([0.0, 0.5, 2.0, 4.0, math.nan, math.inf])
    np.testing.assert_allclose(clip_factors(norms, 2.0), [1, 1, 1, 0.5, 0, 0], rtol=2e-6)
    assert torch.equal(clip_factors(norms[:4], 2.0, all_usable=True), clip_factors(norms[:4], 2.0))


def test_clip_rows_keep_direction() -> None:
    """A clipped row points where the row pointed."""
    rows = torch.tensor([[3.0, -4.0, 0.0]])
    np.testing.assert_allclose(clip_rows(rows, 1.0), rows / 5, rtol=1e-5)


def test_clip_rows_bound_the_updates_of_large_models() -> None:
    """Ten million coordinates: a norm that float32 adds up misses up to a hundredth of it."""
    clipped = clip_rows(torch.full((1, 10**7), 0.1), 1.0)
    assert np.linalg.norm(clipped[0].double().numpy()) <= 1 + 1e-5


def test_hard_shards_cover_the_edge_cases() -> None:
    """The fixed neighbours of the proofs hold what privacy.md asks for."""
    names = [name for name, _ in hard_shards()]
    assert {"duplicates", "an opposite giant", "an overflow", "a dwarf", "NaN", "inf", "zero"} <= set(names)
    assert NUM_OUTPUTS > 1
