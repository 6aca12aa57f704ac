"""Mechanisms that are broken on purpose: what the audit must flag at each level, and the honest run beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from fedray.audit.lab import Lab
from fedray.privacy import mechanism
from fedray.privacy.noise import LocalNoise, aggregate_noise
from fedray.privacy.sampling import PoissonSampler
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from tests.audit.coupled import COUPLINGS, clipped_by_halves, trained_by, unclipped

Keys = Callable[[RoundKeys], RoundKeys]
Indices = npt.NDArray[np.int64]
Batches = Callable[[PoissonSampler, range, int], list[Indices]]


def of_first_round(keys: RoundKeys) -> RoundKeys:
    """Return keys that forget the round."""
    return replace(keys, round_key=bytes(32), round_index=1)


def of_first_attempt(keys: RoundKeys) -> RoundKeys:
    """Return keys that forget the attempt."""
    return replace(keys, attempt=0)


def of_first_opening(keys: RoundKeys) -> RoundKeys:
    """Return keys that forget who opened the directory."""
    return replace(keys, incarnation="")


@contextmanager
def scaled_noise(factor: float) -> Iterator[None]:
    """Make every noise `factor` times what the constants say; the accountant keeps believing them."""
    less = property(lambda spec: factor * spec.noise_multiplier * spec.clip_norm)
    with mock.patch.object(PrivacySpec, "noise_std", less):
        yield


@contextmanager
def noise_missing_in_places() -> Iterator[None]:
    """Add no noise to a twentieth of the parameters."""
    fill = LocalNoise.fill

    def in_places(self: LocalNoise, step: int, out: npt.NDArray[np.float32]) -> None:
        fill(self, step, out)
        out[:, : out.shape[1] // 20] = 0.0

    with mock.patch.object(LocalNoise, "fill", in_places):
        yield


@contextmanager
def noise_of_step_zero() -> Iterator[None]:
    """Use the same local noise at every step of a round."""
    fill = LocalNoise.fill
    with mock.patch.object(LocalNoise, "fill", lambda self, _step, out: fill(self, 0, out)):
        yield


@contextmanager
def noise_of_gateway_zero() -> Iterator[None]:
    """Use the same local noise in every gateway."""
    make = LocalNoise.__init__

    def shared(self: LocalNoise, spec: PrivacySpec, keys: RoundKeys, gateways: Sequence[int]) -> None:
        make(self, spec, keys, [0] * len(gateways))

    with mock.patch.object(LocalNoise, "__init__", shared):
        yield


@contextmanager
def noise_keyed(change: Keys) -> Iterator[None]:
    """Draw local and aggregate noise under changed keys."""
    make = LocalNoise.__init__

    def local(self: LocalNoise, spec: PrivacySpec, keys: RoundKeys, gateways: Sequence[int]) -> None:
        make(self, spec, change(keys), gateways)

    def aggregate(spec: PrivacySpec, keys: RoundKeys, arrived: Any, num_params: int) -> npt.NDArray[np.float32]:
        return aggregate_noise(spec, change(keys), arrived, num_params)

    with (
        mock.patch.object(LocalNoise, "__init__", local),
        mock.patch.object(mechanism, "aggregate_noise", aggregate),
    ):
        yield


@contextmanager
def noise_of_any_set() -> Iterator[None]:
    """Draw the same aggregate noise whoever arrived."""

    def aggregate(spec: PrivacySpec, keys: RoundKeys, _arrived: Any, num_params: int) -> npt.NDArray[np.float32]:
        return aggregate_noise(spec, keys, ((0, 0),), num_params)

    with mock.patch.object(mechanism, "aggregate_noise", aggregate):
        yield


@contextmanager
def batches_keyed(change: Keys, one_gateway: bool = False, times: float = 1.0) -> Iterator[None]:
    """Draw batches under changed keys, for all gateways alike or not, at so many times the rate."""
    make = PoissonSampler.__init__

    def changed(self: PoissonSampler, spec: PrivacySpec, keys: RoundKeys, gateway: int) -> None:
        rate = min(1.0, times * spec.sample_rate)
        make(self, replace(spec, sample_rate=rate), change(keys), 0 if one_gateway else gateway)

    with mock.patch.object(PoissonSampler, "__init__", changed):
        yield


@contextmanager
def batches_by(draw: Batches) -> Iterator[None]:
    """Draw the batches of some steps by a function of (sampler, steps, N)."""

    def one(self: PoissonSampler, step: int, num_records: int) -> Indices:
        return draw(self, range(step, step + 1), num_records)[0]

    def several(self: PoissonSampler, steps: range, num_records: int) -> tuple[Indices, Indices]:
        found = draw(self, steps, num_records)
        return np.concatenate(found), np.array([len(batch) for batch in found])

    with mock.patch.object(PoissonSampler, "batch", one), mock.patch.object(PoissonSampler, "batches", several):
        yield


_poisson = PoissonSampler.batch


def _of_step_zero(sampler: PoissonSampler, steps: range, num_records: int) -> list[Indices]:
    return [_poisson(sampler, 0, num_records)] * len(steps)


def _of_fixed_size(sampler: PoissonSampler, steps: range, num_records: int) -> list[Indices]:
    """Draw without replacement: always as many records as Poisson sampling draws on average."""
    size = round(sampler._rate * num_records)
    return [
        np.sort(np.random.default_rng(int(_poisson(sampler, step, 10_000).sum())).permutation(num_records)[:size])
        for step in steps
    ]


def _of_epochs(sampler: PoissonSampler, steps: range, num_records: int) -> list[Indices]:
    """Cut a shuffled shard into batches."""
    order = np.random.default_rng(int(_poisson(sampler, 0, 10_000).sum())).permutation(num_records)
    size = max(1, round(sampler._rate * num_records))
    parts = max(1, num_records // size)
    return [np.sort(order[(step % parts) * size :][:size]) for step in steps]


@contextmanager
def cohorts_of(change: Keys) -> Iterator[None]:
    """Draw the gateways of a round under changed keys; with `same` keys, as the run should."""

    def drawn(lab: Lab, keys: RoundKeys) -> list[int]:
        federation = lab.plan.config.federation
        return (
            change(keys).stream("participation", 0).bernoulli(0, federation.gateways, federation.participation).tolist()
        )  # type: ignore[no-any-return]  # numpy's lists are untyped

    with mock.patch.object(Lab, "cohort", drawn):
        yield


def same(keys: RoundKeys) -> RoundKeys:
    """Return the keys as they are."""
    return keys


Make = Callable[[], AbstractContextManager[None]]
_LOCAL: Mapping[str, Make] = {
    "4 q": lambda: batches_keyed(same, times=4),
    "one batch for all steps": lambda: batches_by(_of_step_zero),
    "the same batches in every round": lambda: batches_keyed(of_first_round),
    "the same batches in every attempt": lambda: batches_keyed(of_first_attempt),
    "the same batches in every opening": lambda: batches_keyed(of_first_opening),
    "the same batches in every gateway": lambda: batches_keyed(same, one_gateway=True),
    "batches of fixed size": lambda: batches_by(_of_fixed_size),
    "epochs": lambda: batches_by(_of_epochs),
    "the same noise in every step": noise_of_step_zero,
    "the same noise in every gateway": noise_of_gateway_zero,
    "half the noise when nobody looks": lambda: trained_by(unwatched_noise=0.5),
    "no noise in places": noise_missing_in_places,
}
_EVERYWHERE: Mapping[str, Make] = {
    "half the noise": lambda: scaled_noise(0.5),
    "no noise": lambda: scaled_noise(0.0),
    "the same noise in every round": lambda: noise_keyed(of_first_round),
    "the same noise in every attempt": lambda: noise_keyed(of_first_attempt),
    "the same noise in every opening": lambda: noise_keyed(of_first_opening),
}
_CENTRAL: Mapping[str, Make] = {
    "the same noise whoever arrives": noise_of_any_set,
    "clipping left out": lambda: mock.patch("fedray.pool.worker.clip_rows", lambda rows, *_rule: rows),  # type: ignore[dict-item,return-value]  # a patch is a context
}
COUPLED: Mapping[str, Make] = {name: (lambda name=name: trained_by(name)) for name in COUPLINGS}
_CLIPPING: Mapping[str, Make] = {
    "clipping left out": lambda: trained_by(clip=unclipped),
    "clipping by halves": lambda: trained_by(clip=clipped_by_halves),
}
MUTANTS: Mapping[str, Mapping[str, Make]] = {
    "sample": {**COUPLED, **_CLIPPING, **_EVERYWHERE, **_LOCAL},
    "batch": {**COUPLED, **_CLIPPING, **_EVERYWHERE, **_LOCAL},
    "gateway": {**COUPLED, **_EVERYWHERE, **_CENTRAL},
}
COHORTS: Mapping[str, Make] = {
    "the same cohort in every attempt": lambda: cohorts_of(of_first_attempt),
    "the same cohort in every opening": lambda: cohorts_of(of_first_opening),
    "the same cohort in every round": lambda: cohorts_of(of_first_round),
}
