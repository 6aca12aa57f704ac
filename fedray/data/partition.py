"""How one data set is split over gateways: evenly at random, or with Dirichlet label skew (Hsu et al. 2019)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedray.errors import InputError

Indices = list[npt.NDArray[np.int64]]


def dirichlet_alpha(partition: str) -> float | None:
    """Return ALPHA of "dirichlet:ALPHA", or None for "iid".

    Raises:
        InputError: Neither of the two, or ALPHA is not a positive number.
    """
    if partition == "iid":
        return None
    kind, _, value = partition.partition(":")
    try:
        alpha = float(value) if kind == "dirichlet" else float("nan")
    except ValueError:
        alpha = float("nan")
    if not 0 < alpha < float("inf"):
        raise InputError(f"--partition is {partition!r}; it must be iid or dirichlet:ALPHA with ALPHA > 0.")
    return alpha


def split(labels: npt.NDArray[np.int64], gateways: int, alpha: float | None, rng: np.random.Generator) -> Indices:
    """Split records into disjoint, non-empty shards.

    Args:
        labels: `[N]` class indices.
        gateways: G, at most N.
        alpha: Dirichlet concentration over gateways within each class; None for an even split at random.
        rng: Source of the draws.

    Returns:
        G sorted index arrays that cover 0 … N−1 once.

    Raises:
        InputError: There are more gateways than records.
    """
    if gateways > len(labels):
        raise InputError(
            f"--gateways is {gateways} but the data has {len(labels)} training records; each gateway needs at least one."
        )
    owner = np.empty(len(labels), np.int64)
    if alpha is None:
        owner[rng.permutation(len(labels))] = np.arange(len(labels)) % gateways
    else:
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(rng.dirichlet(np.full(gateways, alpha)))
            cuts = np.minimum(np.floor(shares * len(members)).astype(np.int64), len(members))
            owner[members] = np.searchsorted(cuts, np.arange(len(members)), side="right").clip(max=gateways - 1)
        _fill_empty(owner, gateways, rng)
    order = np.argsort(owner, kind="stable")
    return list(np.split(order, np.cumsum(np.bincount(owner, minlength=gateways))[:-1]))


def _fill_empty(owner: npt.NDArray[np.int64], gateways: int, rng: np.random.Generator) -> None:
    counts = np.bincount(owner, minlength=gateways)
    for empty in np.flatnonzero(counts == 0):
        giver = int(counts.argmax())
        owner[rng.choice(np.flatnonzero(owner == giver))] = empty
        counts[giver] -= 1
        counts[empty] += 1
