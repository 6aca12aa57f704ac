"""Mutants of the books and of what an actor sends: charges, claims, weights and uploads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedray.privacy import accounting, levels, mechanism
from fedray.privacy.accounting import Charges
from fedray.privacy.ledger import Ledger
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys
from fedray.training.trainer import Float32Array
from tests.privacy.mutants.patching import Patch, replace_everywhere


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
    arrive = Ledger.record_arrivals

    def mutated(self: Ledger, **about: Any) -> int:
        return arrive(self, **{**about, "central_noise": False})

    patch.setattr(Ledger, "record_arrivals", mutated)


def everybody_needs_no_new_attempt(patch: Patch, engine: str) -> None:
    """When all arrive, nobody asks who had arrived before the crash."""
    arrive = Ledger.record_arrivals

    def mutated(self: Ledger, *, everybody: bool, attempt: int, **about: Any) -> int:
        return attempt if everybody else arrive(self, everybody=everybody, attempt=attempt, **about)

    patch.setattr(Ledger, "record_arrivals", mutated)


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
