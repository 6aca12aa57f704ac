"""The flat vector of a model's trainable parameters and its layout.

Only trainable float32 parameters travel between orchestrator and gateways. Knows nothing of training or privacy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedray.errors import InputError

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and shapes of the trainable parameters in `named_parameters` order (tied parameters appear once)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Read the layout of a model.

        Raises:
            InputError: Nothing is trainable, or a trainable parameter is not float32.
        """
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError("--model has no trainable parameter; at least one must have requires_grad=True.")
        for name, parameter in trainable:
            if parameter.dtype != torch.float32:
                raise InputError(
                    f"--model: trainable parameter {name} is {parameter.dtype}; all trainable parameters must be "
                    "float32: call model.float() before returning it."
                )
        return cls(names=tuple(name for name, _ in trainable), shapes=tuple(tuple(p.shape) for _, p in trainable))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def num_params(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and shapes; compared at every gather."""
        return hashlib.sha256(json.dumps([self.names, self.shapes]).encode()).hexdigest()

    def slices(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        """Yield (name, shape, slice of the flat vector) in order."""
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            yield name, shape, slice(start, start + size)
            start += size

    def flatten(self, model: nn.Module) -> Float32Array:
        """Return the model's trainable values as one float32 vector `[P]` (a copy, on the CPU)."""
        named = dict(model.named_parameters())
        flat = np.empty(self.num_params, np.float32)
        for name, _, where in self.slices():
            flat[where] = named[name].detach().cpu().numpy().reshape(-1)
        return flat

    @torch.no_grad()
    def load(self, model: nn.Module, flat: Float32Array) -> None:
        """Copy the flat vector `[P]` into the model's trainable parameters, in place."""
        named = dict(model.named_parameters())
        source = torch.from_numpy(np.array(flat, np.float32))  # a copy: the vector may be a read-only shared view
        for name, shape, where in self.slices():
            named[name].copy_(source[where].view(shape))
