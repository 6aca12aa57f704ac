"""Neighbouring data sets: shards of real records in which one record, or all others, are exchanged or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit.canaries import mislabelled, out_of_distribution
from fedray.audit.lab import Lab
from fedray.data.inputs import leaves, rebuilt
from fedray.data.shards import Shard, joined

_POOL = 8  # records of a kind that stand by
_ENORMOUS = 1e30  # finite, as records must be; what it is multiplied with may not be


def chosen(shard: Shard, index: npt.NDArray[np.int64]) -> Shard:
    """Return the records of a shard at these indices."""
    return shard.records(torch.from_numpy(index))


def exchanged(shard: Shard, index: int, record: Shard) -> Shard:
    """Return the shard with one record exchanged."""
    both = joined([shard, record])
    order = np.arange(shard.num_records)
    order[index] = shard.num_records
    return chosen(both, order)


def without_last(shard: Shard) -> Shard:
    """Return the shard without its last record."""
    return shard.records(slice(-1))


def repeated(records: Shard, number: int) -> Shard:
    """Return `number` records, these over and over."""
    return chosen(records, np.arange(number) % records.num_records)


@dataclass(frozen=True, kw_only=True)
class Substitute:
    """A record to put in the place of another one.

    Args:
        record: One record.
        overflows: Whether its values are so large that gradients may be infinite or NaN.
    """

    record: Shard
    overflows: bool = False


class Substitutes:
    """Records to put in the place of others: real ones, mislabelled ones, ones far outside of the data, and enormous ones.

    Args:
        lab: The run under attack.
    """

    def __init__(self, lab: Lab) -> None:
        shard, rng, labels = lab.shards[0], lab.rng("substitutes"), lab.plan.class_labels
        number = min(_POOL, shard.num_records)
        far = out_of_distribution(lab.model, shard, number, rng, labels)
        self._kinds = [
            chosen(shard, rng.integers(shard.num_records, size=number)),
            mislabelled(lab.model, shard, number, rng, labels),
            far,
        ]
        if any(leaf.is_floating_point() for leaf in leaves(shard.x)):
            enormous = [torch.sign(leaf) * _ENORMOUS if leaf.is_floating_point() else leaf for leaf in leaves(far.x)]
            self._kinds.append(Shard(x=rebuilt(far.x, enormous), y=far.y))

    def record(self, number: int) -> Substitute:
        """Return substitute `number`: the kinds take turns."""
        turn = number % len(self._kinds)
        kind = self._kinds[turn]
        place = (number // len(self._kinds)) % kind.num_records
        return Substitute(record=chosen(kind, np.array([place])), overflows=turn == 3)


@dataclass(frozen=True, kw_only=True)
class World:
    """One version of all gateways' shards, to compare with others that differ in one gateway's records.

    Args:
        shards: One a gateway.
        name: What is exchanged in it.
    """

    shards: Mapping[int, Shard]
    name: str


def worlds_around(
    lab: Lab, sizes: Sequence[int], victim: int, substitute: Shard, rng: np.random.Generator, remove: bool
) -> dict[str, World]:
    """Return neighbouring worlds in which one gateway's last record, its other records, or both are exchanged.

    Args:
        lab: Gives real records.
        sizes: Records of each gateway.
        victim: The gateway whose records change.
        substitute: What stands for its last record.
        rng: Chooses records.
        remove: Add a world without the last record, where the gateway has another one.
    """
    base, others = (
        [
            chosen(real, rng.integers(real.num_records, size=size))
            for real, size in ((lab.shards[gateway], size) for gateway, size in enumerate(sizes))
        ]
        for _ in range(2)
    )
    last = sizes[victim] - 1
    own = base[victim]
    context = exchanged(others[victim], last, chosen(own, np.array([last])))
    found = {
        "base": own,
        "record": exchanged(own, last, substitute),
        "others": context,
        "both": exchanged(context, last, substitute),
    }
    if remove and last > 0:
        found["without"] = without_last(own)
    return {name: World(shards={**dict(enumerate(base)), victim: shard}, name=name) for name, shard in found.items()}
