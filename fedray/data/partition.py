"""How one data set is split over gateways: the seam, an even split at random, and Dirichlet label skew (Hsu et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedray.errors import InputError

Indices = Sequence[npt.NDArray[np.int64]]


@runtime_checkable
class Partitioner(Protocol):
    """Says which gateway holds which record."""

    def split(self, targets: npt.NDArray[Any], gateways: int, rng: np.random.Generator) -> Indices:
        """Return the records of each gateway.

        Args:
            targets: `[N, …]` of all records.
            gateways: G, at most N.
            rng: Of the run's setup key: the only source of draws, so that a seed decides who holds what.

        Returns:
            G index arrays, none empty, no record in two of them.
        """
        ...


class Iid:
    """Evenly, at random."""

    def split(self, targets: npt.NDArray[Any], gateways: int, rng: np.random.Generator) -> Indices:
        """Return G arrays whose lengths differ by one at most, covering all records."""
        owner = np.empty(len(targets), np.int64)
        owner[rng.permutation(len(targets))] = np.arange(len(targets)) % gateways
        return by_owner(owner, gateways)


class Dirichlet:
    """Label skew: each class is spread over gateways by shares drawn from a Dirichlet distribution (Hsu et al. 2019).

    Args:
        alpha: Concentration; a smaller one gives more skew.

    Raises:
        InputError: It is no number between 1e-6 and 1e6.
    """

    def __init__(self, alpha: str = "") -> None:
        try:
            self.alpha = float(alpha)
        except ValueError:
            self.alpha = float("nan")
        if not 1e-6 <= self.alpha <= 1e6:
            given = f"dirichlet:{alpha}" if alpha else "dirichlet"
            raise InputError(
                f"--partition is {given!r}; it must be iid or dirichlet:ALPHA with ALPHA > 0, between 1e-6 and 1e6."
            )

    def split(self, targets: npt.NDArray[Any], gateways: int, rng: np.random.Generator) -> Indices:
        """Return G arrays that cover all records; a gateway that drew none gets one from the largest."""
        owner = np.empty(len(targets), np.int64)
        for label in np.unique(targets):
            members = rng.permutation(np.flatnonzero(targets == label))
            shares = np.cumsum(rng.dirichlet(np.full(gateways, self.alpha)))
            cuts = np.minimum(np.floor(shares * len(members)).astype(np.int64), len(members))
            owner[members] = np.searchsorted(cuts, np.arange(len(members)), side="right").clip(max=gateways - 1)
        _fill_empty(owner, gateways, rng)
        return by_owner(owner, gateways)


def by_owner(owner: npt.NDArray[np.int64], gateways: int) -> Indices:
    """Return each gateway's records from each record's gateway `[N]`, sorted."""
    order = np.argsort(owner, kind="stable")
    return list(np.split(order, np.cumsum(np.bincount(owner, minlength=gateways))[:-1]))


def split(
    partitioner: Partitioner, name: str, targets: npt.NDArray[Any], gateways: int, rng: np.random.Generator
) -> Indices:
    """Split records, and check what a partitioner returned: claims of privacy rest on disjoint shards.

    Args:
        partitioner: Whose rule.
        name: The value of --partition.
        targets: `[N, …]`.
        gateways: G.
        rng: Source of the draws.

    Raises:
        InputError: There are more gateways than records, or the shards are not G disjoint, non-empty sets of records.
    """
    if gateways > len(targets):
        raise InputError(
            f"--gateways is {gateways} but the data has {len(targets)} training records; each gateway needs at least one."
        )
    try:
        found = [np.asarray(own).reshape(-1) for own in partitioner.split(targets, gateways, rng)]
        if any(len(own) and own.dtype.kind not in "iu" for own in found):
            raise TypeError("its arrays must hold whole numbers, no masks and no floats")
        indices = [np.sort(own.astype(np.int64)) for own in found]
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's rule may raise anything
        raise InputError(
            f"--partition {name} raised {type(error).__name__}: {error}; it must return index arrays."
        ) from error
    rule = f"it must return {gateways} index arrays, none empty, no record in two of them"
    if len(indices) != gateways or not all(map(len, indices)):
        empty = sum(not len(own) for own in indices)
        raise InputError(f"--partition {name} returned {len(indices)} index arrays, {empty} of them empty; {rule}.")
    taken = np.sort(np.concatenate(indices))
    if taken[0] < 0 or taken[-1] >= len(targets) or (np.diff(taken) == 0).any():
        raise InputError(f"--partition {name} returned a record twice, or one that does not exist; {rule}.")
    return indices


def _fill_empty(owner: npt.NDArray[np.int64], gateways: int, rng: np.random.Generator) -> None:
    counts = np.bincount(owner, minlength=gateways)
    for empty in np.flatnonzero(counts == 0):
        giver = int(counts.argmax())
        owner[rng.choice(np.flatnonzero(owner == giver))] = empty
        counts[giver] -= 1
        counts[empty] += 1
