"""The seam between the fast trainer and what knows a model: sums of record gradients, clipped or weighted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import only_leaf
from fedray.data.shards import Shard
from fedray.privacy.clipping import clip_factors, usable
from fedray.privacy.shapes import Clipping
from fedray.privacy.streams import RoundKeys
from fedray.training.batching import Batched
from fedray.training.chain import cross_entropy_gradient
from fedray.training.draws import Batch
from fedray.training.layers.layer import StackedLayer
from fedray.training.layers.linear import quick_norms, quick_sums
from fedray.training.program import Program, Untraceable
from fedray.training.stacking import StackedModel

Identity = tuple[RoundKeys, list[int]]


class RecordGradients(Protocol):
    """Gives gateways' sums of record gradients.

    What a record adds depends on itself, its own draws and its gateway's parameters: on no other record or gateway.
    """

    num_params: int
    cache_bytes: int
    """Memory that a group's step had better go over at most, on a CPU: larger groups leave the last-level cache."""
    fewest_together: int
    """Gateways that had better run together all the same, where their parameters fit the cache."""

    def bytes_per_record(self, shard: Shard) -> int:
        """Return the memory that one record's pass takes, about; the shard gives an example. Comes first."""
        ...

    def bind(self, params: torch.Tensor, identity: Identity) -> None:
        """Use `params` `[G, P]` from now on (they may change in place); `identity` is the round's keys and gateways."""
        ...

    def add_clipped(self, out: torch.Tensor, batch: Batch, step: int, clip_norm: float, rule: Clipping) -> None:
        """Add each gateway's sum of gradients clipped to C to `out` `[G, P]`; a non-finite gradient counts as zero."""
        ...

    def add_weighted(self, out: torch.Tensor, batch: Batch, step: int, scales: npt.NDArray[np.float64]) -> None:
        """Add each gateway's sum of gradients times its scale to `out` `[G, P]`, which is zero."""
        ...


class SequenceGradients:
    """Of a sequence of proven layers, for many gateways at once; the loss saw one record alone, if it is not the default one.

    Args:
        model: See `fedray.training.stacking`.
        loss_of: Gives the loss' program (see `trace_loss`) from a shard that shows what records look like; None for the
            default loss.
        device: Where.

    Raises:
        Unsupported: It is no such sequence.
    """

    cache_bytes = 16 * 2**20
    fewest_together = 4

    def __init__(
        self,
        model: torch.nn.Module,
        loss_of: Callable[[Shard], Program] | None,
        device: torch.device,
    ) -> None:
        self._model = StackedModel(model, device)
        self._loss_of = loss_of
        self._loss: OutputGradient | None = None
        self._device = device
        self.num_params = self._model.num_params

    def bytes_per_record(self, shard: Shard) -> int:
        """See `RecordGradients.bytes_per_record`."""
        _, values = self._model.one_output(only_leaf(shard.x)[:1].to(self._device))
        if self._loss_of is not None and self._loss is None:
            with torch.inference_mode(False):
                self._loss = OutputGradient(self._loss_of(shard), self._device)
        return 16 * values  # inputs, outputs, their gradients and one temporary of each

    def bind(self, params: torch.Tensor, identity: Identity) -> None:
        """See `RecordGradients.bind`."""
        self._model.bind(params)

    def add_clipped(self, out: torch.Tensor, batch: Batch, step: int, clip_norm: float, rule: Clipping) -> None:
        """See `RecordGradients.add_clipped`."""
        layers = self._differentiated(batch, batch.mask)
        if not layers:
            return
        on_cpu = self._device.type == "cpu"  # on a GPU, looking at values would cost more than it spares
        quick = quick_norms(layers, batch.mask.shape, clip_norm) if on_cpu else None
        if quick is None:
            self._add_carefully(out, layers, clip_norm, rule)
            return
        norms, hold = quick
        if hold is None:
            self._add_quickly(out, layers, clip_factors(norms, clip_norm, all_usable=True, rule=rule))
            return
        quickly, carefully = torch.zeros_like(out), torch.zeros_like(out)
        self._add_quickly(quickly, layers, clip_factors(norms, clip_norm, all_usable=True, rule=rule))
        self._add_carefully(carefully, layers, clip_norm, rule)
        out += torch.where(hold.unsqueeze(1), quickly, carefully)

    def _add_quickly(self, out: torch.Tensor, layers: Sequence[StackedLayer], factors: torch.Tensor) -> None:
        """Add sums of gradients times factors, by norms that `quick_norms` gave; all of them are usable."""
        if len(layers) == len(self._model.layers):  # their parameters are the whole vector, in its order
            out += quick_sums(layers, factors)
            return
        for layer in layers:
            layer.add_sums(out, factors)

    def _add_carefully(
        self, out: torch.Tensor, layers: Sequence[StackedLayer], clip_norm: float, rule: Clipping
    ) -> None:
        """Add sums of gradients of any size."""
        squares = [layer.squared_norms() for layer in layers]
        norms = functools.reduce(torch.Tensor.add_, squares[1:], squares[0]).sqrt_()
        if self._device.type != "cpu" or not bool(usable(norms.max())):
            for layer in layers:
                layer.select(usable(norms))
        factors = clip_factors(norms, clip_norm, rule=rule)
        for layer in layers:
            layer.add_sums(out, factors)

    def add_weighted(self, out: torch.Tensor, batch: Batch, step: int, scales: npt.NDArray[np.float64]) -> None:
        """See `RecordGradients.add_weighted`."""
        weights = batch.mask * torch.from_numpy(scales.astype(np.float32)).to(self._device).unsqueeze(1)
        layers = self._differentiated(batch, weights)
        for layer in layers:
            layer.add_sums(out, None)
        padded = bool((batch.sizes < batch.mask.shape[1]).any())
        # Padding repeats a record that was not drawn, which must count for nothing; but 0 · NaN is NaN. On a GPU, looking
        # would cost more than selecting.
        if padded and (self._device.type != "cpu" or not bool(torch.isfinite(out.sum()))):
            finite, first = torch.isfinite(out).all(1, keepdim=True), out.clone()
            out.zero_()
            for layer in layers:
                layer.select(batch.mask.bool())
                layer.add_sums(out, None)
            out.copy_(torch.where(finite, first, out))  # nobody's sum is made otherwise for another gateway's sake

    def _differentiated(self, batch: Batch, weights: torch.Tensor) -> list[StackedLayer]:
        """Return the layers that sum(weights · losses) depends on, each with its inputs and output gradients."""
        output = self._model.compute(only_leaf(batch.x))
        if self._loss is None:
            gradient: torch.Tensor | None = cross_entropy_gradient(output, batch.y, weights)
        else:
            gradient = self._loss.of(output, batch.y, weights)
        if gradient is not None:
            self._model.chain.differentiate(gradient)
        return self._model.used_layers()


class OutputGradient:
    """The gradient of a loss at outputs, by a program that saw one record.

    Args:
        program: From `fedray.training.tracing.trace_loss`.
        device: Where.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        if program.draws:
            raise Untraceable("the loss draws random numbers; draw in the model instead")
        self._batched = Batched(program, "records")
        self._constants = [constant.to(device) for constant in program.constants]

    def of(self, output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of sum(weights · losses) `[G, B, …]`; None when the loss does not depend on outputs.

        Args:
            output: `[G, B, …]`.
            target: `[G, B, …]`.
            weights: `[G, B]`.
        """
        if not self._batched.wanted:
            return None
        outputs, targets = (part.flatten(0, 1).unsqueeze(1) for part in (output, target))
        nothing = output.new_zeros(len(outputs), 1, 1)
        (index,), n = self._batched.wanted, len(outputs)
        (found,) = self._batched.run([outputs], self._constants, (), [nothing], targets, n, 1, n)
        gradient = self._batched.expanded({index: found}, index, 1, n).reshape(output.shape)
        return gradient * weights.view(*weights.shape, *([1] * (output.dim() - 2)))
