"""Attack T2: looks for noise used twice, by correlating that of every two gateways, steps, rounds and attempts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedray.audit import power
from fedray.audit.bounds import ALPHA, correlation_limit
from fedray.audit.finding import Finding
from fedray.audit.lab import Float32Array, Lab
from fedray.audit.releases import Place, neighbouring
from fedray.privacy.levels import Unit


def attack_reuse(lab: Lab, noises: Mapping[str, Mapping[Place, Float32Array]], unit: Unit) -> Finding:
    """Look for noise that was used twice.

    Args:
        lab: The run under attack.
        noises: Noise by place, `[d]`, under the name of how it was read.
        unit: Whom the claim protects.
    """
    best, where, number, powers = 0.0, "-", 0, []
    for how, vectors in noises.items():
        correlation, place = largest_correlation(vectors, ALPHA / len(noises))
        number += len(vectors)
        powers.append(power.correlation_leak(sizes_and_alphas(vectors, ALPHA / len(noises))))
        if correlation > best:
            best, where = correlation, f"{place} ({how})"
    caught = [leak for leak in powers if leak is not None]
    return Finding(
        name="T2 noise reuse",
        level=lab.spec.noise_level,
        unit=unit,
        adjacency=lab.adjacency,
        measure="correlation",
        claim=0.0,
        lower_bound=best,
        smallest_leak_caught=max(caught) if len(caught) == len(powers) and caught else None,
        text=f"correlations of {number} noises, every two of them and all neighbouring gateways, steps, rounds and attempts "
        f"together. Claim: independent, whoever trains, whenever, at whatever attempt. Farthest: {where}.",
    )


def largest_correlation(vectors: Mapping[Place, Float32Array], alpha: float = ALPHA) -> tuple[float, str]:
    """Return a lower bound of the largest correlation and which noise it is of; 0 when chance explains it.

    Half of alpha goes to single pairs, half to all neighbouring pairs of a coordinate together. A correlation beyond what
    independence exceeds with probability alpha is proven to be at least the difference.
    """
    best, where = 0.0, "-"
    pairs, together = _alphas(vectors, alpha)
    places = list(vectors)
    rows = np.stack([vectors[place] for place in places])
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    rows = (rows / np.maximum(norms, 1e-30)[:, None]).astype(np.float32)
    if len(places) > 1:
        found = np.triu(np.abs(rows @ rows.T), 1)
        one, other = np.unravel_index(int(found.argmax()), found.shape)
        # Equal rows correlate to 1 but for rounding.
        best = min(1.0, float(found[one, other])) - correlation_limit(rows.shape[1], pairs)
        where = f"{_name(places[int(one)])} and {_name(places[int(other)])}"
    for name, neighbours in neighbouring(vectors).items():
        product = first = second = 0.0
        for a, b in neighbours:
            x, y = vectors[a].astype(np.float64), vectors[b].astype(np.float64)
            product, first, second = product + float(x @ y), first + float(x @ x), second + float(y @ y)
        size = len(neighbours) * rows.shape[1]
        correlation = abs(product) / max(math.sqrt(first * second), 1e-300) - correlation_limit(size, together)
        if correlation > best:
            best, where = correlation, f"neighbouring {name}s, {len(neighbours)} pairs together"
    return max(0.0, best), where


def sizes_and_alphas(vectors: Mapping[Place, Float32Array], alpha: float = ALPHA) -> list[list[tuple[int, float]]]:
    """Return, for each coordinate that may be forgotten in a key, the tests that would see it: (values, alpha)."""
    pairs, together = _alphas(vectors, alpha)
    size = len(next(iter(vectors.values())))
    return [[(size, pairs), (len(neighbours) * size, together)] for neighbours in neighbouring(vectors).values()]


def _alphas(vectors: Mapping[Place, Float32Array], alpha: float) -> tuple[float, float]:
    number = len(vectors) * (len(vectors) - 1) / 2
    return alpha / 2 / max(number, 1.0), alpha / 2 / max(len(neighbouring(vectors)), 1)


def _name(place: Place) -> str:
    return f"(round {place.round}, attempt {place.attempt}, opening {place.opening}, gateway {place.gateway}, step {place.step})"
