"""Mutants of clipping: what bounds a record's gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedray.privacy import clipping
from fedray.training import alone, program_check, record_parts
from fedray.training.layers.convolution import StackedConv
from fedray.training.layers.layer import StackedLayer
from fedray.training.stacked import StackedTrainer
from tests.privacy.mutants.patching import Patch, replace_everywhere


def no_clipping(patch: Patch, engine: str) -> None:
    """Every factor is 1 (non-finite vectors are still selected out)."""
    replace_everywhere(patch, clipping.clip_factors, lambda norms, clip_norm, **_: torch.isfinite(norms).float())


def non_finite_let_through(patch: Patch, engine: str) -> None:
    """A NaN norm is clipped like any other, and nothing is selected out; the check before training would refuse it first."""
    patch.setattr(program_check, "check_gradients", lambda *_: None)
    replace_everywhere(
        patch,
        clipping.clip_factors,
        lambda norms, clip_norm, **_: (clip_norm / norms).clamp(max=1.0).float(),
    )
    replace_everywhere(patch, clipping.select_finite, lambda values, norms: values)
    for layer in (StackedLayer, StackedConv, record_parts.Made, record_parts.Product, record_parts.Rows):
        patch.setattr(layer, "select", lambda self, keep: None)


def per_layer_clipping(patch: Patch, engine: str) -> None:
    """Each layer's gradient is clipped to C on its own."""
    if engine in ("stacked", "alone"):

        def mutated_records(self: Any, gradient: torch.Tensor, batch: Any, step: int) -> None:
            if not batch.mask.shape[1]:
                return
            if isinstance(self._gradients, alone.AloneGradients):
                parts: list[Any] = [part for some, _ in self._gradients._parts(batch, step) for part in some]
            else:
                parts = self._gradients._differentiated(batch, batch.mask)
            for part in parts:
                norms = part.squared_norms().sqrt()
                part.select(torch.isfinite(norms))
                factors = clipping.clip_factors(norms, self._training.privacy.clip_norm)
                add = part.add_sums if isinstance(part, StackedLayer) else part.add_sum
                add(gradient, factors)

        patch.setattr(StackedTrainer, "_add_clipped_records", mutated_records)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import KeyedDPOptimizer

    def mutated(self: Any) -> None:
        for p in self.params:
            if p.grad_sample is None:
                p.summed_grad = torch.zeros_like(p)
                continue
            norms = p.grad_sample.flatten(1).norm(2, dim=1)
            factors = clipping.clip_factors(norms, self.max_grad_norm)
            p.summed_grad = torch.einsum("i,i...", factors, clipping.select_finite(p.grad_sample, norms))

    patch.setattr(KeyedDPOptimizer, "clip_and_accumulate", mutated)


def mean_clipped_then_multiplied(patch: Patch, engine: str) -> None:
    """The mean gradient is clipped and multiplied by the batch size."""
    if engine in ("stacked", "alone"):

        def mutated_records(self: Any, gradient: torch.Tensor, batch: Any, step: int) -> None:
            self._add_gradients(gradient, batch, step, 1.0 / np.maximum(batch.sizes, 1))
            clipped = clipping.clip_rows(gradient, self._training.privacy.clip_norm)
            gradient.copy_(clipped * torch.from_numpy(batch.sizes.astype(np.float32)).unsqueeze(1))

        patch.setattr(StackedTrainer, "_add_clipped_records", mutated_records)
        return
    assert engine == "opacus", f"write this mutant for engine {engine}"
    from fedray.training.reference import KeyedDPOptimizer

    def mutated(self: Any) -> None:
        samples = [torch.zeros_like(p).unsqueeze(0) if p.grad_sample is None else p.grad_sample for p in self.params]
        means = [torch.nan_to_num(sample).mean(dim=0) for sample in samples]
        norm = torch.stack([mean.norm() for mean in means]).norm()
        factor = clipping.clip_factors(norm, self.max_grad_norm) * len(samples[0])
        for p, mean in zip(self.params, means, strict=True):
            p.summed_grad = mean * factor

    patch.setattr(KeyedDPOptimizer, "clip_and_accumulate", mutated)
