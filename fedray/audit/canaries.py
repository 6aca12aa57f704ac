"""Makes canaries, which an attacker plants to recognise them later: gradient directions and real records."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft

from fedray.data.inputs import Inputs, leaves, rebuilt
from fedray.data.shards import Shard
from fedray.models.calls import Loss, call_model
from fedray.models.layout import Layout

Float32Array = npt.NDArray[np.float32]
_FAR = 30.0  # an out-of-distribution record lies this many times as far out as the farthest value of the data


class Directions:
    """M orthonormal directions of a P-dimensional space in general position: random signs, then a cosine transform.

    Costs O(M log M) where a random rotation would cost M². Directions that are no coordinate axes also find noise that is
    right on each coordinate but shared between them. A large model is read on M coordinates drawn at random.

    Args:
        num_params: P.
        rng: Source of signs and coordinates.
        at_most: Bound of M, which is P where P is smaller.
    """

    def __init__(self, num_params: int, rng: np.random.Generator, at_most: int = 2**16) -> None:
        self.size = min(num_params, at_most)
        self._num_params = num_params
        self._where = np.sort(rng.permutation(num_params)[: self.size])
        self._signs = rng.choice(np.array([-1.0, 1.0]), self.size)

    def combine(self, coefficients: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return sum_i coefficients_i · direction_i: `[..., M]` to `[..., P]`."""
        combined = np.zeros((*coefficients.shape[:-1], self._num_params))
        combined[..., self._where] = self._signs * fft.idct(coefficients, norm="ortho", axis=-1)
        return combined

    def coefficients(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the inner products with all directions: `[..., P]` to `[..., M]`."""
        found: npt.NDArray[np.float64] = fft.dct(self._signs * vectors[..., self._where], norm="ortho", axis=-1)
        return found

    def first(self, number: int) -> Float32Array:
        """Return the first directions as rows `[number, P]` (fewer when M is smaller)."""
        number = min(number, self.size)
        unit = np.zeros((number, self.size))
        unit[np.arange(number), np.arange(number)] = 1.0
        return self.combine(unit).astype(np.float32)


def mislabelled(
    model: torch.nn.Module, shard: Shard, number: int, rng: np.random.Generator, class_labels: bool
) -> Shard:
    """Return real records with the label that the model finds least likely (or another record's target).

    Args:
        model: With its initial parameters.
        shard: Whose records are taken.
        number: How many, at most as many as the shard has.
        rng: Chooses them.
        class_labels: Whether targets are class indices.
    """
    x = shard.records(torch.from_numpy(rng.permutation(shard.num_records)[:number])).x
    return Shard(x=x, y=_unlikely(model, x, shard, rng, class_labels))


def out_of_distribution(
    model: torch.nn.Module, shard: Shard, number: int, rng: np.random.Generator, class_labels: bool
) -> Shard:
    """Return records of random signs, far outside of the data, with the unlikeliest label.

    Tokens are drawn at random among those of the data; masks are those of real records, or a record could hide itself.
    """
    x = rebuilt(shard.x, [_far(leaf, number, rng) for leaf in leaves(shard.x)])
    return Shard(x=x, y=_unlikely(model, x, shard, rng, class_labels))


def _far(leaf: torch.Tensor, number: int, rng: np.random.Generator) -> torch.Tensor:
    """Return values `[number, …]` that a tensor `[N, …]` of the data would not hold together."""
    shape = (number, *leaf.shape[1:])
    if leaf.dtype == torch.bool:
        return leaf[torch.from_numpy(rng.integers(len(leaf), size=number))]
    if leaf.is_floating_point():
        scale = _FAR * max(1e-3, float(leaf.abs().max()))
        return torch.from_numpy(rng.choice(np.array([-scale, scale], np.float32), shape))
    return torch.from_numpy(rng.choice(np.unique(leaf.numpy()), shape))


def _unlikely(
    model: torch.nn.Module, x: Inputs, shard: Shard, rng: np.random.Generator, class_labels: bool
) -> torch.Tensor:
    if class_labels:
        with torch.no_grad():
            return call_model(copy.deepcopy(model).eval(), x).argmin(dim=1)  # type: ignore[no-any-return]  # a module's call is untyped
    return shard.y[torch.from_numpy(rng.integers(shard.num_records, size=len(leaves(x)[0])))]


def record_gradients(model: torch.nn.Module, loss: Loss, shard: Shard) -> Float32Array:
    """Return each record's gradient `[n, P]` by plain autograd, one record at a time: no code of the trainers.

    A parameter that the loss does not reach has gradient zero.
    """
    model = copy.deepcopy(model).train()
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out = np.zeros((shard.num_records, Layout.of(model).num_params), np.float32)
    for index, row in enumerate(out):
        record = shard.records(slice(index, index + 1))
        value = loss(call_model(model, record.x), record.y).sum()
        found = torch.autograd.grad(value, params, allow_unused=True)
        row[:] = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(found, params, strict=True)]
        ).numpy()
    return out


def clipped(vectors: Float32Array, clip_norm: float) -> npt.NDArray[np.float64]:
    """Return rows `[n, P]` clipped to norm C in float64; rows that are not finite become zero."""
    rows = vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows[~np.isfinite(norms[:, 0])] = 0.0
    scale = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-300))
    return rows * np.where(np.isfinite(scale), scale, 0.0)
