"""Layers of many gateways at once, with the book-keeping that per-record clipping needs.

A stacked layer stands in for a leaf layer of the user's model. The model runs on a flat batch of G·B records; the stacked
layer gives each gateway's B records that gateway's own weights. One forward pass keeps the layer's input a, one backward
pass its output gradient e; from these two come each record's squared gradient norm and, once the clipping factors are
known, the clipped sum, without a second backward pass (Goodfellow 2015; Lee and Kifer 2021; Li et al. 2022).

Every layer kind in `KINDS` is proven equal to the reference trainer by tests/training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedray.privacy.clipping import factors_of_products, row_norms, selected


class Unsupported(Exception):
    """A layer cannot be stacked; the message says which and why."""


def _unflatten(values: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """Return `values` with one dimension split in several (torch's own method lacks annotations)."""
    result: torch.Tensor = values.unflatten(dim, sizes)  # type: ignore[no-untyped-call]  # see above
    return result


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a layer's parameter lies in the flat vector.

    Args:
        where: Slice of the P columns.
        shape: Of the parameter.
    """

    where: slice
    shape: tuple[int, ...]

    def view(self, stacked: torch.Tensor) -> torch.Tensor:
        """Return the parameter's view `[G, *shape]` of a `[G, P]` matrix."""
        return _unflatten(stacked[:, self.where], 1, *self.shape)


class StackedLayer(nn.Module):
    """One leaf layer of G gateways.

    Args:
        slots: Trainable parameters by local name ("weight", "bias").
        frozen: Other parameters by local name, shared by all gateways.
    """

    def __init__(self, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.slots = dict(slots)
        self.frozen = dict(frozen)
        self.num_values = 0
        self._values: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._target_of: torch.Tensor | None = None
        self._gateways = 0
        self._shape = torch.Size()
        self.a: Any = None
        self.e: Any = None

    # It holds no modules or parameters, and torch's look-out for them would take a tenth of a step's time.
    __setattr__ = object.__setattr__  # type: ignore[assignment]  # narrower than torch says

    def bind(self, params: torch.Tensor) -> None:
        """Take this layer's parameters from `params` `[G, P]` from now on (views: they follow the optimizer)."""
        self._gateways = len(params)
        self._target_of = None
        self._values = {name: slot.view(params) for name, slot in self.slots.items()}
        for name, value in self.frozen.items():
            self._values[name] = value.expand(len(params), *value.shape)

    def value(self, name: str) -> torch.Tensor | None:
        """Return a parameter `[G, …]`, or None when the layer has none of that name."""
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Tell whether a parameter is trainable."""
        return name in self.slots

    def targets(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return where in `out` `[G, P]` each trainable parameter lies: views, made once for a matrix."""
        if self._target_of is not out:
            self._target_of = out
            self._targets = {name: slot.view(out) for name, slot in self.slots.items()}
        return self._targets

    def grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Return `[G·B, …]` as `[G, B, …]`."""
        return flat.view(self._gateways, -1, *flat.shape[1:])

    def forget(self) -> None:
        """Drop what the last step kept."""
        self.a = self.e = None

    @property
    def factored(self) -> bool:
        """Whether each record's gradient is one outer product e aᵀ, of a weight, beside e, of a bias."""
        return False

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output and keep what the gradients will need."""
        raise NotImplementedError

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Keep the output gradient; return the input gradient when it is needed."""
        raise NotImplementedError

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run `compute` on gateways' records side by side: `[G, B, …]` to `[G, B, …]`."""
        self._shape = x.shape
        out = self.compute(x.flatten(0, 1))
        self.num_values = self.a.numel() + out.numel()
        return self.grouped(out)

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """Run `catch` on the gradient of such an output."""
        found = self.catch(e.flatten(0, 1), input_needed)
        return None if found is None else found.reshape(self._shape)

    def squared_norms(self) -> torch.Tensor:
        """Return the squared norm of each record's gradient in this layer, `[G, B]`."""
        raise NotImplementedError

    def select(self, keep: torch.Tensor) -> None:
        """Replace what was kept of records outside `keep` `[G, B]` by zeros (a factor of 0 would leave NaN)."""
        self.a, self.e = (_where(keep, part) for part in (self.a, self.e))

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """Add the sum over records of factor · gradient to `out` `[G, P]`; factors `[G, B]`, or None for 1."""
        raise NotImplementedError


def _where(keep: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    if not part.is_floating_point():
        return part
    return selected(part, keep)


def _weighted(e: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    return e if factors is None else e * factors.view(*factors.shape, *([1] * (e.dim() - 2)))


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of gradients over all but the first two dimensions, in float64."""
    return row_norms(values if values.dim() == 3 else values.flatten(2)).square_()


_LARGEST_FACTOR = 1e8  # of a gradient's norm that is computed in float32


def _exact_squares(values: torch.Tensor) -> torch.Tensor:
    """Return `_squares` of what is multiplied afterwards, where a tiny value times a huge one counts."""
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=2, dtype=torch.float64)
    return norms.square_()


class _Affine(StackedLayer):
    """y = x Wᵀ + b on rows: Linear, and convolutions after unfolding. a `[G, B(, T), in]`, e `[G, B(, T), out]`."""

    gradients: torch.Tensor | None = None
    lengths: torch.Tensor | None = None  # of e, where gradients are products that are never made

    def rows_forward(self, a: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return a Wᵀ + b for a `[G, B(, T), in]`, Wᵀ `[G, in, out]` and b `[G, 1, out]`, keeping a."""
        self.a = a
        rows = a if a.dim() == 3 else a.flatten(1, -2)
        out = torch.bmm(rows, columns) if bias is None else torch.baddbmm(bias, rows, columns)
        return out.view(*a.shape[:-1], -1)

    def rows_backward(self, e: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return e W `[G, B, T, in]` for a sequence."""
        return torch.bmm(e.flatten(1, -2), weight).view(*e.shape[:-1], -1)

    def squared_norms(self) -> torch.Tensor:
        """See `StackedLayer.squared_norms`.

        Without a sequence the norm is |e|²(|a|² + 1) exactly. With one, the gradients themselves are made, and summed
        later: the norm from products of positions (Gram matrices) would lose gradients that nearly cancel, and a record
        whose norm is underestimated is not clipped.
        """
        if self.a.dim() == 3:
            inputs = _exact_squares(self.a) if self.has("weight") else torch.zeros((), dtype=torch.float64)
            squares = _exact_squares(self.e)
            self.lengths = squares.sqrt()
            return squares.mul_(inputs + 1 if self.has("bias") else inputs)
        squares = torch.zeros((), dtype=torch.float64, device=self.e.device)
        if self.has("weight"):
            e, a = self.e.flatten(0, 1), self.a.flatten(0, 1)
            self.gradients = torch.bmm(e.transpose(1, 2), a).flatten(1).view(*self.a.shape[:2], -1)
            squares = squares + _squares(self.gradients)
        if self.has("bias"):
            squares = squares + _squares(self.e.sum(2))
        return squares

    def select(self, keep: torch.Tensor) -> None:
        """See `StackedLayer.select`."""
        super().select(keep)
        if self.gradients is not None:
            self.gradients = _where(keep, self.gradients)

    def forget(self) -> None:
        """See `StackedLayer.forget`."""
        super().forget()
        self.gradients = self.lengths = None

    def weight_sum(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted sum of the weight's gradients `[G, out, in]`."""
        if self.gradients is not None and factors is not None:
            return torch.bmm(factors.unsqueeze(1), self.gradients).view(len(factors), self.e.shape[-1], -1)
        weighted = _weighted(self.e, factors)
        return torch.bmm(weighted.flatten(1, -2).transpose(1, 2), self.a.flatten(1, -2))

    def bias_sum(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted sum of the bias' gradients `[G, out]`."""
        gradients = self.e.sum(2)
        return gradients.sum(1) if factors is None else torch.bmm(factors.unsqueeze(1), gradients).squeeze(1)

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`."""
        targets = self.targets(out)
        if self.has("weight"):
            target = targets["weight"]
            target += self.weight_sum(factors).view(target.shape)
        if self.has("bias"):
            target = targets["bias"]
            target += self.bias_sum(factors).view(target.shape)


class StackedLinear(_Affine):
    """nn.Linear, with or without a sequence dimension."""

    def bind(self, params: torch.Tensor) -> None:
        """See `StackedLayer.bind`."""
        super().bind(params)
        bias = self.value("bias")
        self._columns = self._values["weight"].transpose(1, 2)
        self._bias = None if bias is None else bias.unsqueeze(1)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.compute`."""
        a = self.grouped(x)
        if a.dim() > 4:
            a = a.flatten(2, -2)
        out = self.rows_forward(a, self._columns, self._bias)
        return out.view(*x.shape[:-1], -1)

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.catch`."""
        if self.a.dim() == 3:
            self.e = e.reshape(self._gateways, -1, e.shape[1])
            return torch.bmm(self.e, self._values["weight"]).flatten(0, 1) if input_needed else None
        self.e = e.reshape(*self.a.shape[:-1], e.shape[-1])
        return self.rows_backward(self.e, self._values["weight"]) if input_needed else None

    def grouped_forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.grouped_forward`."""
        if x.dim() != 3:
            return super().grouped_forward(x)
        self.a = x  # the usual case, in as few calls as can be
        out = torch.bmm(x, self._columns) if self._bias is None else torch.baddbmm(self._bias, x, self._columns)
        self.num_values = x.numel() + out.numel()
        return out

    def grouped_backward(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.grouped_backward`."""
        if e.dim() != 3:
            return super().grouped_backward(e, input_needed)
        self.e = e
        return torch.bmm(e, self._values["weight"]) if input_needed else None

    @property
    def factored(self) -> bool:
        """See `StackedLayer.factored`."""
        return len(self.slots) == 2 and self.a.dim() == 3

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`.

        The products get memory of their own: torch would make those that go into rows of `out` one gateway at a time.
        """
        if self.a.dim() != 3:
            super().add_sums(out, factors)
            return
        targets = self.targets(out)
        if factors is not None and self.lengths is not None:
            factors = factors_of_products(self.lengths, factors)
        weighted = self.e if factors is None else self.e * factors.unsqueeze(2)
        if self.has("weight"):
            targets["weight"].add_(torch.bmm(weighted.transpose(1, 2), self.a))
        if self.has("bias"):
            targets["bias"].add_(weighted.sum(1))


def quick_norms(
    layers: Sequence[StackedLayer], shape: torch.Size, clip_norm: float
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return the norm of each record's gradient in all layers together, `[G, B]`, of plain Linear layers in ordinary ranges.

    With e and a of a layer it is the root of the sum of |e|²(|a|² + 1), in float32 and in few calls.

    Args:
        layers: All that the loss depends on.
        shape: (G, B).
        clip_norm: C.

    Returns:
        None where other layers or shapes take part. Else the norms, and for which gateways `[G]` they hold, None for all:
        where others have them, one gateway's records must not decide how another's are added up. They hold as long as
        float32 loses nothing that counts. What it loses are values below 1.1e-19, whose squares it cannot hold: beside
        inputs of at most 1e8·C, and the bias' input of 1 where C is at least 1e-8, 10^8 of them are no more than 2e-7 of C.
        Every norm that holds is usable: of up to 1000 layers at most 4e17.
    """
    if clip_norm < 1 / _LARGEST_FACTOR or not all(layer.factored and layer.a.shape[:2] == shape for layer in layers):
        return None
    factors = torch.stack([row_norms(layer.e) for layer in layers] + [row_norms(layer.a) for layer in layers])
    largest = _LARGEST_FACTOR * min(1.0, clip_norm)
    hold = None if float(factors.max()) <= largest else factors.amax((0, 2)) <= largest  # false for NaN
    e, a = factors.square_().chunk(2)
    # Not sum(0), whose rounding depends on a record's place in the batch.
    first, *others = torch.addcmul(e, e, a).unbind()
    return functools.reduce(torch.Tensor.add_, others, first).sqrt_(), hold


def quick_sums(layers: Sequence[StackedLayer], factors: torch.Tensor) -> torch.Tensor:
    """Return the sums over records of factor · gradient `[G, P]` of the layers that `quick_norms` is for.

    Args:
        layers: Whose parameters, one layer after the other, are the P columns.
        factors: `[G, B]`.
    """
    columns, factors = [], factors.unsqueeze(2)
    for layer in layers:
        weighted = layer.e * factors
        sums = {"weight": torch.bmm(weighted.transpose(1, 2), layer.a).flatten(1), "bias": weighted.sum(1)}
        columns += [sums[name] for name in layer.slots]
    return torch.cat(columns, 1)


class StackedConv(_Affine):
    """nn.Conv1d and nn.Conv2d by unfolding: a convolution is a Linear layer over patches, one output pixel a row.

    Rows are laid out kernel row, kernel column, channel, so that an unfolded patch is made of long contiguous runs.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        frozen: Mapping[str, torch.Tensor],
        *,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
        one_dimensional: bool,
    ) -> None:
        super().__init__(slots, frozen)
        self._kernel, self._stride, self._dilation, self._groups = kernel, stride, dilation, groups
        self._padding = padding  # left, right, top, bottom
        self._one_dimensional = one_dimensional
        self._padded: tuple[int, ...] = ()

    def _matrix(self) -> torch.Tensor:
        """Return the weight as `[G·groups, out/groups, kh·kw·in/groups]`."""
        weight = self._values["weight"]
        if self._one_dimensional:
            weight = weight.unsqueeze(3)
        weight = weight.permute(0, 1, 3, 4, 2).flatten(2)
        return _unflatten(weight, 1, self._groups, -1).flatten(0, 1) if self._groups > 1 else weight

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows `[G, B, T, groups·c]` as `[G·groups, B, T, c]`."""
        if self._groups == 1:
            return rows
        return _unflatten(rows, 3, self._groups, -1).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def _join(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_split`."""
        if self._groups == 1:
            return rows
        return _unflatten(rows, 0, -1, self._groups).permute(0, 2, 3, 1, 4).flatten(3)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.compute`."""
        if self._one_dimensional:
            x = x.unsqueeze(2)
        (kh, kw), (sh, sw), (dh, dw) = self._kernel, self._stride, self._dilation
        image = F.pad(x, self._padding).permute(0, 2, 3, 1).contiguous()  # [n, H, W, C]
        n, height, width, channels = self._padded = tuple(image.shape)
        oh, ow = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
        sn, s1, s2, s3 = image.stride()
        patches = image.as_strided((n, oh, ow, kh, kw, channels), (sn, sh * s1, sw * s2, dh * s1, dw * s2, s3))
        rows = patches.reshape(n, oh * ow, kh * kw, channels)
        if self._groups > 1:  # put the group's channels of all kernel positions side by side
            rows = _unflatten(rows, 3, self._groups, -1).transpose(2, 3)
        a = self._split(self.grouped(rows.reshape(n, oh * ow, -1)))
        bias = self._values.get("bias")
        if bias is not None and self._groups > 1:
            bias = _unflatten(bias, 1, self._groups, -1).flatten(0, 1)
        bias = None if bias is None else bias.unsqueeze(1)
        out = self._join(self.rows_forward(a, self._matrix().transpose(1, 2), bias))
        image_out = out.reshape(n, oh, ow, -1).permute(0, 3, 1, 2)
        return image_out.squeeze(2) if self._one_dimensional else image_out

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.catch`."""
        if self._one_dimensional:
            e = e.unsqueeze(2)
        oh, ow = e.shape[2:]
        self.e = self._split(self.grouped(e.permute(0, 2, 3, 1).flatten(1, 2)))
        if not input_needed:
            return None
        (kh, kw), (sh, sw), (dh, dw) = self._kernel, self._stride, self._dilation
        n, height, width, channels = self._padded
        patches = self._join(self.rows_backward(self.e, self._matrix())).reshape(n, oh, ow, -1)
        if self._groups > 1:
            patches = _unflatten(patches, 3, self._groups, kh * kw, -1).transpose(3, 4).reshape(n, oh, ow, -1)
        patches = patches.view(n, oh, ow, kh, kw, channels)
        image = patches.new_zeros(n, height, width, channels)
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
                columns = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
                image[:, rows, columns] += patches[:, :, :, i, j]
        left, right, top, bottom = self._padding
        inner: torch.Tensor = image[:, top : height - bottom, left : width - right].permute(0, 3, 1, 2)
        return inner.contiguous()

    def squared_norms(self) -> torch.Tensor:
        """See `StackedLayer.squared_norms`; the groups of a convolution are layers of their own."""
        squares = super().squared_norms()
        return _unflatten(squares, 0, -1, self._groups).sum(1) if self._groups > 1 else squares

    def select(self, keep: torch.Tensor) -> None:
        """See `StackedLayer.select`."""
        super().select(keep.repeat_interleave(self._groups, 0) if self._groups > 1 else keep)

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`."""
        if factors is not None and self._groups > 1:
            factors = factors.repeat_interleave(self._groups, 0)
        gateways = len(out)
        if self.has("weight"):
            target = self.slots["weight"].view(out)
            kh, kw = self._kernel
            summed = self.weight_sum(factors).view(gateways, target.shape[1], kh, kw, -1).permute(0, 1, 4, 2, 3)
            target += summed.squeeze(3) if self._one_dimensional else summed
        if self.has("bias"):
            target = self.slots["bias"].view(out)
            target += self.bias_sum(factors).view(target.shape)


class StackedEmbedding(StackedLayer):
    """nn.Embedding: a is `[G, B, T]` token indices, e `[G, B, T, D]`."""

    def __init__(
        self, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor], *, padding_index: int | None
    ) -> None:
        super().__init__(slots, frozen)
        self._padding_index = padding_index

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """See `StackedLayer.compute`."""
        weight = self._values["weight"]
        tokens = self.grouped(x).flatten(1)
        self.a = tokens.view(len(tokens), -1, math.prod(x.shape[1:]))
        out = torch.gather(weight, 1, tokens.unsqueeze(2).expand(-1, -1, weight.shape[2]))
        return out.view(*x.shape, weight.shape[2])

    def catch(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.catch`; token indices have no gradient."""
        self.e = e.reshape(*self.a.shape, e.shape[-1])
        if self._padding_index is not None:
            self.e = torch.where((self.a == self._padding_index).unsqueeze(3), 0.0, self.e)
        return None

    def squared_norms(self) -> torch.Tensor:
        """See `StackedLayer.squared_norms`.

        Tokens that occur twice in a record are added up first, for the norm and for the sum alike: gradients that cancel
        would otherwise be small in the norm and large in what is added onto the noise.
        """
        if self.a.shape[2] > 1:
            tokens = self.a.flatten(0, 1)
            same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
            first = ~same.tril(-1).any(2)
            added = torch.bmm(same.double(), self.e.flatten(0, 1).double())  # cancelling tokens need the digits
            self.e = torch.where(first.unsqueeze(2), added, 0.0).to(self.e.dtype).view_as(self.e)
        return _squares(self.e)

    def add_sums(self, out: torch.Tensor, factors: torch.Tensor | None) -> None:
        """See `StackedLayer.add_sums`."""
        weighted = _weighted(self.e, factors).flatten(1, 2)
        index = self.a.flatten(1).unsqueeze(2).expand_as(weighted)
        self.targets(out)["weight"].scatter_add_(1, index, weighted)


def _linear(module: nn.Linear, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> StackedLayer:
    return StackedLinear(slots, frozen)


def _conv(module: nn.Conv1d | nn.Conv2d, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> StackedLayer:
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding_mode {module.padding_mode!r} is not proven")
    one = isinstance(module, nn.Conv1d)
    kernel, stride, dilation = (_two(value) for value in (module.kernel_size, module.stride, module.dilation))
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        padding = (left, total[1] - left, top, total[0] - top)
    elif module.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        amounts = _two(module.padding, missing=0)
        padding = (amounts[1], amounts[1], amounts[0], amounts[0])
    return StackedConv(
        slots,
        frozen,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=module.groups,
        one_dimensional=one,
    )


def _two(sizes: Any, missing: int = 1) -> tuple[int, int]:
    """Return (vertical, horizontal) of a convolution's setting; one-dimensional ones lie in a single row."""
    return (missing, int(sizes[0])) if len(sizes) == 1 else (int(sizes[0]), int(sizes[1]))


def _embedding(module: nn.Embedding, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]) -> StackedLayer:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise Unsupported("max_norm, scale_grad_by_freq and sparse are not proven")
    return StackedEmbedding(slots, frozen, padding_index=module.padding_idx)


KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
}
"""The proven list: how each kind of leaf layer is stacked. Subclasses are not on it: their forward may differ."""
