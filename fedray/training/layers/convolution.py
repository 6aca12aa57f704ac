"""nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedray.training.layers.affine import Affine
from fedray.training.layers.layer import Slot, StackedLayer, Unsupported, unflatten


class StackedConv(Affine):
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
        return unflatten(weight, 1, self._groups, -1).flatten(0, 1) if self._groups > 1 else weight

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows `[G, B, T, groups·c]` as `[G·groups, B, T, c]`."""
        if self._groups == 1:
            return rows
        return unflatten(rows, 3, self._groups, -1).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def _join(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_split`."""
        if self._groups == 1:
            return rows
        return unflatten(rows, 0, -1, self._groups).permute(0, 2, 3, 1, 4).flatten(3)

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
            rows = unflatten(rows, 3, self._groups, -1).transpose(2, 3)
        a = self._split(self.grouped(rows.reshape(n, oh * ow, -1)))
        bias = self._values.get("bias")
        if bias is not None and self._groups > 1:
            bias = unflatten(bias, 1, self._groups, -1).flatten(0, 1)
        bias = None if bias is None else bias.unsqueeze(1)
        out = self._join(self.rows_forward(a, self._matrix().transpose(1, 2), bias))
        image_out = out.reshape(n, oh, ow, -1).permute(0, 3, 1, 2)
        return image_out.squeeze(2) if self._one_dimensional else image_out

    def backpropagate(self, e: torch.Tensor, input_needed: bool) -> torch.Tensor | None:
        """See `StackedLayer.backpropagate`."""
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
            patches = unflatten(patches, 3, self._groups, kh * kw, -1).transpose(3, 4).reshape(n, oh, ow, -1)
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
        return unflatten(squares, 0, -1, self._groups).sum(1) if self._groups > 1 else squares

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


def stacked_convolution(
    module: nn.Conv1d | nn.Conv2d, slots: Mapping[str, Slot], frozen: Mapping[str, torch.Tensor]
) -> StackedLayer:
    """Return the stacked layer of a convolution, or raise Unsupported."""
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
