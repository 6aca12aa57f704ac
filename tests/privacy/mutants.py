"""Ways to break the mechanism: each patches real functions or classes of fedray, wherever they were imported to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedray.orchestrator import charged_rounds
from fedray.orchestrator.session import Session
from fedray.privacy import accounting, clipping, levels, mechanism, noise, streams
from fedray.privacy.accounting import Charges
from fedray.privacy.ledger import Ledger
from fedray.privacy.noise import LocalNoise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.training import alone, program_check, record_parts
from fedray.training.layers.convolution import StackedConv
from fedray.training.layers.layer import StackedLayer
from fedray.training.stacked import StackedTrainer
from fedray.training.trainer import Float32Array, GatewayShards, LocalTraining, Release, StepObserver, Trainer

Patch = pytest.MonkeyPatch
Mutation = Callable[[Release, torch.Tensor], tuple[Release, torch.Tensor]]


def replace_everywhere(patch: Patch, original: Any, mutated: Any) -> None:
    """Replace a function or class under every name by which a module of fedray knows it."""
    import fedray.pool.worker
    import fedray.training.reference  # noqa: F401  # loaded on demand by fedray: it must be patched too

    found = 0
    for name, module in list(sys.modules.items()):
        if name == "fedray" or name.startswith("fedray."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, attribute, mutated)
                    found += 1
    assert found, f"nobody uses {original}"


# --- noise -------------------------------------------------------------------------------------------------------------


def scaled_noise(factor: float) -> Callable[[Patch, str], None]:
    """Return a mutant whose local and aggregate noise is `factor` times too large."""

    def apply(patch: Patch, engine: str) -> None:
        fill, aggregate = LocalNoise.fill, noise.aggregate_noise

        def mutated_fill(self: LocalNoise, step: int, out: npt.NDArray[np.float32]) -> None:
            fill(self, step, out)
            out *= np.float32(factor)

        def mutated_aggregate(*args: Any) -> npt.NDArray[np.float32]:
            return aggregate(*args) * np.float32(factor)

        patch.setattr(LocalNoise, "fill", mutated_fill)
        replace_everywhere(patch, aggregate, mutated_aggregate)

    return apply


def noise_shared_by_gateways(patch: Patch, engine: str) -> None:
    """Every gateway draws from the stream of gateway 0."""
    key = RoundKeys.key
    patch.setattr(RoundKeys, "key", lambda self, purpose, gateway: key(self, purpose, 0))


def noise_shared_by_steps(patch: Patch, engine: str) -> None:
    """Every step starts the stream anew."""
    nonce = streams._nonce
    patch.setattr(streams, "_nonce", lambda step, block=0: nonce(0))


def noise_shared_by_rounds(patch: Patch, engine: str) -> None:
    """The key does not ratchet and does not name the round."""
    key = RoundKeys.key

    def mutated(self: RoundKeys, purpose: str, gateway: int) -> bytes:
        return key(RoundKeys(round_key=bytes(32), round_index=0, attempt=self.attempt), purpose, gateway)

    patch.setattr(RoundKeys, "key", mutated)


def keys_start_again_on_resume(patch: Patch, engine: str) -> None:
    """The key ratchets but does not name the round, and a resumed run goes back to the first key."""
    key, resumed = RoundKeys.key, Session._resumed.__func__  # type: ignore[attr-defined]  # of a class method

    def mutated(cls: Any, plan: Any, *args: Any) -> Session:
        session: Session = resumed(cls, plan, *args)
        session.round_key = plan.first_round_key
        return session

    patch.setattr(RoundKeys, "key", lambda self, purpose, gateway: key(replace(self, round_index=0), purpose, gateway))
    patch.setattr(Session, "_resumed", classmethod(mutated))


def noise_shared_by_attempts(patch: Patch, engine: str) -> None:
    """A retry with other inputs gets the noise of the first attempt."""
    key = RoundKeys.key
    patch.setattr(RoundKeys, "key", lambda self, purpose, gateway: key(replace(self, attempt=0), purpose, gateway))


def keys_without_incarnation(patch: Patch, engine: str) -> None:
    """Whoever opens the directory draws from the same keys."""
    key = RoundKeys.key
    patch.setattr(RoundKeys, "key", lambda self, purpose, gateway: key(replace(self, incarnation=""), purpose, gateway))


def repeated_under_the_new_incarnation(patch: Patch, engine: str) -> None:
    """A round that was charged before is repeated without a charge, but with other noise."""
    patch.setattr(Ledger, "incarnation", lambda self, round_index, attempt: self._wanted_incarnation)


def cohort_without_the_attempt(patch: Patch, engine: str) -> None:
    """Each attempt at a round has the same secret cohort."""
    draw = charged_rounds.participation
    replace_everywhere(patch, draw, lambda plan, keys: draw(plan, replace(keys, attempt=0)))


def aggregate_noise_ignores_who_arrived(patch: Patch, engine: str) -> None:
    """Another set of gateways gets the same noise."""
    aggregate = noise.aggregate_noise
    replace_everywhere(patch, aggregate, lambda spec, keys, arrived, num_params: aggregate(spec, keys, (), num_params))


# --- clipping ----------------------------------------------------------------------------------------------------------


def no_clipping(patch: Patch, engine: str) -> None:
    """Every factor is 1 (non-finite vectors are still selected out)."""
    replace_everywhere(patch, clipping.clip_factors, lambda norms, clip_norm, **_: torch.isfinite(norms).float())


def non_finite_let_through(patch: Patch, engine: str) -> None:
    """A NaN norm is clipped like any other, and nothing is selected out; the check before training would refuse it first."""
    patch.setattr(program_check, "check_gradients", lambda *_: None)
    replace_everywhere(
        patch,
        clipping.clip_factors,
        lambda norms, clip_norm, **_: (clip_norm / norms).clamp(max=1.0).float(),
    )
    replace_everywhere(patch, clipping.select_finite, lambda values, norms: values)
    for layer in (StackedLayer, StackedConv, record_parts.Made, record_parts.Product, record_parts.Rows):
        patch.setattr(layer, "select", lambda self, keep: None)


def per_layer_clipping(patch: Patch, engine: str) -> None:
    """Each layer's gradient is clipped to C on its own."""
    if engine in ("stacked", "alone"):

        def mutated_records(self: Any, gradient: torch.Tensor, batch: Any, step: int) -> None:
            if not batch.mask.shape[1]:
                return
            if isinstance(self._gradients, alone.AloneGradients):
                parts: list[Any] = [part for some, _ in self._gradients._parts(batch, step) for part in some]
            else:
                parts = self._gradients._differentiated(batch, batch.mask)
            for part in parts:
                norms = part.squared_norms().sqrt()
                part.select(torch.isfinite(norms))
                factors = clipping.clip_factors(norms, self._training.privacy.clip_norm)
                add = part.add_sums if isinstance(part, StackedLayer) else part.add_sum
                add(gradient, factors)

        patch.setattr(StackedTrainer, "_add_clipped_records", mutated_records)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import KeyedDPOptimizer

    def mutated(self: Any) -> None:
        for p in self.params:
            if p.grad_sample is None:
                p.summed_grad = torch.zeros_like(p)
                continue
            norms = p.grad_sample.flatten(1).norm(2, dim=1)
            factors = clipping.clip_factors(norms, self.max_grad_norm)
            p.summed_grad = torch.einsum("i,i...", factors, clipping.select_finite(p.grad_sample, norms))

    patch.setattr(KeyedDPOptimizer, "clip_and_accumulate", mutated)


def mean_clipped_then_multiplied(patch: Patch, engine: str) -> None:
    """The mean gradient is clipped and multiplied by the batch size."""
    if engine in ("stacked", "alone"):

        def mutated_records(self: Any, gradient: torch.Tensor, batch: Any, step: int) -> None:
            self._add_gradients(gradient, batch, step, 1.0 / np.maximum(batch.sizes, 1))
            clipped = clipping.clip_rows(gradient, self._training.privacy.clip_norm)
            gradient.copy_(clipped * torch.from_numpy(batch.sizes.astype(np.float32)).unsqueeze(1))

        patch.setattr(StackedTrainer, "_add_clipped_records", mutated_records)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import KeyedDPOptimizer

    def mutated(self: Any) -> None:
        samples = [torch.zeros_like(p).unsqueeze(0) if p.grad_sample is None else p.grad_sample for p in self.params]
        means = [torch.nan_to_num(sample).mean(dim=0) for sample in samples]
        norm = torch.stack([mean.norm() for mean in means]).norm()
        factor = clipping.clip_factors(norm, self.max_grad_norm) * len(samples[0])
        for p, mean in zip(self.params, means, strict=True):
            p.summed_grad = mean * factor

    patch.setattr(KeyedDPOptimizer, "clip_and_accumulate", mutated)


# --- around a step: engine-neutral, through the trainer's seam ----------------------------------------------------------


class _Steered:
    """A trainer whose releases are mutated before the test's observer sees them."""

    def __init__(self, inner: Trainer, mutation: Mutation) -> None:
        self.observer: StepObserver | None = None
        self._inner = inner
        self._mutation = mutation
        inner.observer = self

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        return self._inner.train(keys, params, gateways, shards)

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        return clipped if self.observer is None else self.observer.before_noise(gateway, step, batch, clipped)

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        release, gradient = self._mutation(release, gradient)
        return gradient if self.observer is None else self.observer.released(release, gradient)


def _steer(patch: Patch, mutation: Mutation) -> None:
    from fedray.training import engines

    new_trainer = engines.new_trainer
    replace_everywhere(patch, new_trainer, lambda *args, **named: _Steered(new_trainer(*args, **named), mutation))


def divided_by_realised_size(patch: Patch, engine: str) -> None:
    """The noisy sum is divided by the size of the batch that was drawn."""

    def mutation(release: Release, gradient: torch.Tensor) -> tuple[Release, torch.Tensor]:
        divisor = max(1, len(release.batch))
        return replace(release, divisor=divisor), gradient * (release.divisor / divisor)

    _steer(patch, mutation)


def noise_before_clipping(patch: Patch, engine: str) -> None:
    """The noisy sum is clipped again."""

    def mutation(release: Release, gradient: torch.Tensor) -> tuple[Release, torch.Tensor]:
        return release, clipping.clip_rows(gradient.unsqueeze(0) * release.divisor, 2.0)[0] / release.divisor

    _steer(patch, mutation)


class _PrivateDivisor:
    """A trainer that derives the divisor from the number of records, as Opacus' make_private does."""

    def __init__(self, new_trainer: Any, args: Sequence[Any]) -> None:
        self.observer: StepObserver | None = None
        self._new_trainer, self._args = new_trainer, args

    def train(
        self, keys: RoundKeys, params: Float32Array, gateways: Sequence[int], shards: GatewayShards
    ) -> Float32Array:
        rows = []
        engine, model, training, device = self._args[:4]
        for gateway in gateways:
            privacy: PrivacySpec = training.privacy
            expected = max(1, round(privacy.sample_rate * shards[gateway].num_records))
            mutated: LocalTraining = replace(training, privacy=replace(privacy, batch_size=expected))
            trainer = self._new_trainer(engine, model, mutated, device)
            trainer.observer = self.observer
            rows.append(trainer.train(keys, params, [gateway], shards))
        return cast(Float32Array, np.concatenate(rows))


def divisor_from_private_size(patch: Patch, engine: str) -> None:
    """B is q·N of the gateway's own N."""
    from fedray.training import engines

    new_trainer = engines.new_trainer
    replace_everywhere(patch, new_trainer, lambda *args, **_: _PrivateDivisor(new_trainer, args))


def empty_batches_skipped(patch: Patch, engine: str) -> None:
    """An empty batch is no step."""
    if engine in ("stacked", "alone"):
        observe = StackedTrainer._observe

        def mutated_observe(self: Any, observer: Any, gradient: torch.Tensor, *args: Any) -> None:
            if args[-1].sizes.all():
                observe(self, observer, gradient, *args)
            else:  # the proof trains one gateway at a time
                gradient.zero_()

        patch.setattr(StackedTrainer, "_observe", mutated_observe)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import OpacusTrainer

    step = OpacusTrainer._step

    def mutated(self: OpacusTrainer, optimizer: Any, gateway: int, index: int, batch: Any, draws: Any) -> None:
        if len(batch):
            step(self, optimizer, gateway, index, batch, draws)

    patch.setattr(OpacusTrainer, "_step", mutated)


# --- sampler -----------------------------------------------------------------------------------------------------------


def sampled_without_replacement(patch: Patch, engine: str) -> None:
    """Batches have a fixed size but are booked as Poisson."""

    def mutated(self: PoissonSampler, step: int, num_records: int) -> npt.NDArray[np.int64]:
        self._stream.seek(step)
        words = np.empty(num_records, np.uint32)
        self._stream.fill_bytes(words.view(np.uint8))
        return np.sort(np.argsort(words)[: round(self._rate * num_records)])

    patch.setattr(PoissonSampler, "batch", mutated)

    def mutated_steps(self: PoissonSampler, steps: range, num_records: int) -> Any:
        batches = [mutated(self, step, num_records) for step in steps]
        return np.concatenate(batches), np.array([len(batch) for batch in batches])

    patch.setattr(PoissonSampler, "batches", mutated_steps)


def sampled_at_double_rate(patch: Patch, engine: str) -> None:
    """The sampler draws at 2q, the accountant books q."""
    init = PoissonSampler.__init__

    def mutated(self: PoissonSampler, spec: PrivacySpec, keys: RoundKeys, gateway: int) -> None:
        init(self, replace(spec, sample_rate=min(1.0, 2 * spec.sample_rate)), keys, gateway)

    patch.setattr(PoissonSampler, "__init__", mutated)


# --- the orchestrator and the books --------------------------------------------------------------------------------------


def ledger_reset_each_round(patch: Patch, engine: str) -> None:
    """A fresh accountant each round: what is charged is the last round's share."""

    def mutated(self: Ledger, through: int | None = None) -> Charges:
        last = self.entries[-1:]
        return Charges(steps=sum(entry.steps for entry in last), rounds=len(last))

    patch.setattr(Ledger, "charges", mutated)


def sample_epsilon_in_batch_mode(patch: Patch, engine: str) -> None:
    """The `batch` level reports the `sample` level's epsilon."""
    patch.setitem(levels._CLAIMS, "batch", levels._CLAIMS["sample"])


def replace_claimed_at_zero_out_price(patch: Patch, engine: str) -> None:
    """Claims for replacing a shard forget that the sensitivity is 2C."""

    def halved(
        claims: Callable[[PrivacySpec], Sequence[levels.Claim]],
    ) -> Callable[[PrivacySpec], Sequence[levels.Claim]]:
        return lambda spec: tuple(
            replace(claim, event=replace(claim.event, noise_multiplier=spec.noise_multiplier, replaces=False))
            for claim in claims(spec)
        )

    for name in ("batch", "gateway"):
        patch.setitem(levels._CLAIMS, name, halved(levels._CLAIMS[name]))


def sampled_replace_priced_as_removal(patch: Patch, engine: str) -> None:
    """Replacing a sampled update is booked as adding or removing it."""
    loss = accounting._losses
    patch.setattr(accounting, "_losses", lambda event: loss(replace(event, replaces=False)))


def arrival_keeps_the_attempt(patch: Patch, engine: str) -> None:
    """Another set of gateways is released under the attempt that was charged."""
    arrive = Ledger.arrive

    def mutated(self: Ledger, **about: Any) -> int:
        return arrive(self, **{**about, "central_noise": False})

    patch.setattr(Ledger, "arrive", mutated)


def everybody_needs_no_new_attempt(patch: Patch, engine: str) -> None:
    """When all arrive, nobody asks who had arrived before the crash."""
    arrive = Ledger.arrive

    def mutated(self: Ledger, *, everybody: bool, attempt: int, **about: Any) -> int:
        return attempt if everybody else arrive(self, everybody=everybody, attempt=attempt, **about)

    patch.setattr(Ledger, "arrive", mutated)


def extension_forgets_what_was_spent(patch: Patch, engine: str) -> None:
    """Only what follows the last extension is charged."""

    def mutated(self: Ledger, through: int | None = None) -> Charges:
        starts = [number for number, entry in enumerate(self.entries) if entry.event == "extension"]
        last = self.entries[starts[-1] if starts else 0 :]
        return Charges(steps=sum(entry.steps for entry in last), rounds=sum(entry.event == "charge" for entry in last))

    patch.setattr(Ledger, "charges", mutated)


def weighted_average_with_uniform_noise(patch: Patch, engine: str) -> None:
    """At the `gateway` level updates are weighted by record counts while the noise stays that of uniform weights."""
    from fedray.pool.worker import Worker

    train = Worker.train

    def mutated(self: Worker, keys: RoundKeys, params: Float32Array, gateways: Sequence[int]) -> Any:
        counts = [float(self._shards[gateway].num_records) for gateway in gateways]
        return replace(train(self, keys, params, gateways), weights=tuple(counts))

    aggregate = mechanism.aggregate

    def mutated_aggregate(spec: PrivacySpec, keys: RoundKeys, total: Any, weight: float, arrived: Any) -> Any:
        num = sum(last - first + 1 for first, last in arrived)
        return aggregate(spec, keys, total * (num / weight), weight, arrived)

    patch.setattr(Worker, "train", mutated)
    replace_everywhere(patch, aggregate, mutated_aggregate)
    # The proofs call the mechanism through its module, which is patched above.


def uploaded_buffer(patch: Patch, engine: str) -> None:
    """A layer may keep a running mean of its inputs, which travels with the update, as one more number in it."""
    from fedray.models import checks
    from fedray.pool.worker import Worker

    train = Worker.train

    def mutated(self: Worker, keys: RoundKeys, params: Float32Array, gateways: Sequence[int]) -> Any:
        result = train(self, keys, params, gateways)
        assert result.updates is not None
        for update, gateway in zip(result.updates, result.gateways, strict=True):
            update[-1] = self._shards[gateway].x.mean()
        return result

    patch.setattr(checks, "_refuse_changed_buffers", lambda model, before: None)
    patch.setattr(Worker, "train", mutated)


def retry_with_old_noise(patch: Patch, engine: str) -> None:
    """A round that is repeated with other inputs goes on under the attempt that was charged before."""
    charge = Ledger.charge

    def mutated(self: Ledger, *, round_index: int, **about: Any) -> int:
        if any(entry.round == round_index for entry in self.entries):
            return 0
        return charge(self, round_index=round_index, **about)

    patch.setattr(Ledger, "charge", mutated)


def noise_divided_once_more(patch: Patch, engine: str) -> None:
    """The aggregate's noise has sigma·C/n on the sum: n times too little."""
    aggregate = noise.aggregate_noise

    def mutated(spec: PrivacySpec, *args: Any) -> npt.NDArray[np.float32]:
        return aggregate(spec, *args) / np.float32(spec.expected_cohort)

    replace_everywhere(patch, aggregate, mutated)


def divisor_is_who_arrived(patch: Patch, engine: str) -> None:
    """The aggregate is divided by the number of gateways that arrived."""
    aggregate = mechanism.aggregate

    def mutated(spec: PrivacySpec, keys: RoundKeys, total: Any, weight: float, arrived: Any) -> Any:
        return aggregate(replace(spec, expected_cohort=max(1.0, weight)), keys, total, weight, arrived)

    replace_everywhere(patch, aggregate, mutated)


Applied = Mapping[str, Callable[[Patch, str], None]]
MUTANTS: Applied = {
    "half noise": scaled_noise(0.5),
    "two thirds of the noise": scaled_noise(2 / 3),
    "three halves of the noise": scaled_noise(1.5),
    "no noise": scaled_noise(0.0),
    "noise shared by gateways": noise_shared_by_gateways,
    "noise shared by steps": noise_shared_by_steps,
    "noise shared by rounds": noise_shared_by_rounds,
    "noise shared by attempts": noise_shared_by_attempts,
    "keys start again on resume": keys_start_again_on_resume,
    "round keys without incarnation": keys_without_incarnation,
    "repeated under the new incarnation": repeated_under_the_new_incarnation,
    "cohort drawn without the attempt": cohort_without_the_attempt,
    "aggregate noise ignores who arrived": aggregate_noise_ignores_who_arrived,
    "no clipping": no_clipping,
    "non-finite let through": non_finite_let_through,
    "per-layer clipping at C each": per_layer_clipping,
    "mean clipped, then multiplied": mean_clipped_then_multiplied,
    "divided by the realised size": divided_by_realised_size,
    "noise before clipping": noise_before_clipping,
    "divisor from private N": divisor_from_private_size,
    "empty batches skipped": empty_batches_skipped,
    "sampled without replacement": sampled_without_replacement,
    "sampled at 2q": sampled_at_double_rate,
    "ledger reset each round": ledger_reset_each_round,
    "sample epsilon in batch mode": sample_epsilon_in_batch_mode,
    "replace at the price of zero-out": replace_claimed_at_zero_out_price,
    "sampled replace at the price of removal": sampled_replace_priced_as_removal,
    "another arrived set under the old attempt": arrival_keeps_the_attempt,
    "everybody needs no new attempt": everybody_needs_no_new_attempt,
    "extension forgets what was spent": extension_forgets_what_was_spent,
    "weighted average with uniform noise": weighted_average_with_uniform_noise,
    "uploaded buffer": uploaded_buffer,
    "retry with old noise and new weights": retry_with_old_noise,
    "noise at sigma/n": noise_divided_once_more,
    "divisor is who arrived": divisor_is_who_arrived,
}
"""Name of each mutant and the function that applies it (monkeypatch, engine)."""
