"""Mutants of the noise: its size, its keys, and the aggregate that it is added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.orchestrator import charged_rounds
from fedray.orchestrator.session import Session
from fedray.privacy import mechanism, noise, streams
from fedray.privacy.ledger import Ledger
from fedray.privacy.noise import LocalNoise
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from tests.privacy.mutants.patching import Patch, replace_everywhere


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
