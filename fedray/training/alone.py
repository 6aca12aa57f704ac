"""Gradients of records each of which was seen alone: a traced program, run on many records and clipped record by record.

What a record adds depends on its own values, its own draws and its gateway's parameters, by construction: the program was
made from code that saw one record, and is repeated by rules that keep records apart.

One gateway's records run with parameters that are the same for all (fewest operations for large models); several gateways
run together, padded to the largest batch, where their records are so small that calls would cost more than the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import leaves
from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.privacy.clipping import clip_factors, usable
from fedray.privacy.shapes import Clipping
from fedray.training.batching import Batched
from fedray.training.draws import Batch
from fedray.training.program import Program, Site
from fedray.training.record_draws import RecordDraws
from fedray.training.record_gradients import Identity
from fedray.training.record_parts import Made, Part, Product, Rows, Scattered

_JOINED = 2**11  # values of a record's gradient in one parameter, past which it is clipped where it lies


class AloneGradients:
    """Clipped and weighted sums of record gradients by a program.

    Args:
        program_of: Gives the program of the model and loss, from a shard that shows what records look like.
        layout: Of the trainable parameters.
        device: Where it runs.
        memory_limit: Bytes that records may take at once.
    """

    cache_bytes = 16 * 2**20
    fewest_together = 1

    def __init__(
        self, program_of: Callable[[Shard], Program], layout: Layout, device: torch.device, memory_limit: int
    ) -> None:
        self.num_params = layout.num_params
        self._program_of = program_of
        self._memory_limit = memory_limit
        self._device = device
        self._slices = [where for _, _, where in layout.slices()]
        self._program: Program | None = None

    def bytes_per_record(self, shard: Shard) -> int:
        """See `RecordGradients.bytes_per_record`."""
        if self._program is None:
            with torch.inference_mode(False):
                self._prepare(self._program_of(shard))
        return 4 * self._values

    def bind(self, params: torch.Tensor, identity: Identity) -> None:
        """See `RecordGradients.bind`."""
        assert self._program is not None, "bytes_per_record comes first"
        keys, gateways = identity
        self._many = len(gateways) > 1
        shapes = self._program.params
        self._params = [
            params[:, where].view(len(gateways), *shape) for where, shape in zip(self._slices, shapes, strict=True)
        ]
        if not self._many:
            self._params = [value[0] for value in self._params]
        self._draws = RecordDraws(self._program.draws, keys, gateways, self._device)

    def add_clipped(self, out: torch.Tensor, batch: Batch, step: int, clip_norm: float, rule: Clipping) -> None:
        """See `RecordGradients.add_clipped`."""
        for parts, mask in self._parts(batch, step):
            squares = [part.squared_norms() for part in parts]
            norms = functools.reduce(torch.Tensor.add_, squares[1:], squares[0]).sqrt_()
            if not bool(usable(norms.max())):
                for part in parts:
                    part.select(usable(norms))
            factors = clip_factors(norms, clip_norm, rule=rule) * mask
            for part in parts:
                part.add_sum(out, factors)

    def add_weighted(self, out: torch.Tensor, batch: Batch, step: int, scales: npt.NDArray[np.float64]) -> None:
        """See `RecordGradients.add_weighted`."""
        weights = torch.from_numpy(scales.astype(np.float32)).to(self._device).unsqueeze(1)
        for parts, mask in self._parts(batch, step):
            padded = self._many and not bool(mask.all())
            for part in parts:
                if padded:  # what was not drawn counts for nothing, but 0 · NaN is NaN
                    part.select(mask.bool())
                part.add_sum(out, mask * weights)

    def _prepare(self, program: Program) -> None:
        self._program = program
        self._one, self._several = Batched(program), Batched(program, "gateways")
        self._constants = [constant.to(self._device) for constant in program.constants]
        self._tokens = {
            site.param: torch.cat([self._constants[index - program.first_constant].flatten() for index in site.inputs])
            for site in program.sites
            if site.kind == "rows" and all(program.first_constant <= i < program.first_draw for i in site.inputs)
        }
        self._made = {index: value for index, value in enumerate(program.gradients) if value is not None}
        self._small = [index for index in self._made if self._size(index) <= _JOINED]
        self._large = [index for index in self._made if self._size(index) > _JOINED]
        columns = [torch.arange(self._slices[index].start, self._slices[index].stop) for index in self._small]
        self._columns = torch.cat(columns).to(self._device) if columns else None
        weights = [*self._made, *(site.param for site in program.sites if self._is_made(site))]
        self._values = self._one.most_values + 2 * sum(map(self._size, weights))
        self._together = max(1, self._memory_limit // (4 * max(1, self._values)))  # records

    def _is_made(self, site: Site) -> bool:
        """Tell whether a site's gradients are made in full."""
        assert self._program is not None, "it has sites"
        inner = self._program.params[site.param][1 if site.kind == "matrix" else 0]
        positions = sum(math.prod(self._program.specs[index].shape) // inner for index in site.inputs)
        return site.kind != "rows" and positions > 1

    def _size(self, param: int) -> int:
        where = self._slices[param]
        return int(where.stop - where.start)

    def _parts(self, batch: Batch, step: int) -> Iterator[tuple[list[Part], torch.Tensor]]:
        """Yield the parts of the gradients of as many records at a time as memory allows, and which records are drawn."""
        assert self._program is not None, "bytes_per_record comes first"
        inputs, width = leaves(batch.x), batch.mask.shape[1]
        together = width if self._many else self._together
        for first in range(0, width, together):
            some = slice(first, first + together)
            rows = [leaf[:, some].flatten(0, 1).unsqueeze(1) for leaf in inputs]
            mask = batch.mask[:, some]
            draws = self._draws.of(step, _records(batch)[:, some]) if self._program.draws else ()
            parts = self._run(rows, batch.y[:, some].flatten(0, 1).unsqueeze(1), draws, *mask.shape)
            if parts:
                yield parts, mask

    def _run(
        self, inputs: Sequence[torch.Tensor], target: torch.Tensor, draws: Sequence[torch.Tensor], m: int, b: int
    ) -> list[Part]:
        """Run the program on records `[m·b, 1, …]`; return the parts of their gradients."""
        assert self._program is not None, "bytes_per_record comes first"
        batched = self._several if self._many else self._one
        found = batched.run(self._params, self._constants, draws, inputs, target, m * b, m, b)
        values = dict(zip(batched.wanted, found, strict=True))

        def of(index: int, *shape: int) -> torch.Tensor:
            return batched.expanded(values, index, m, b).reshape(m, b, *shape)

        parts = [self._site_part(site, of) for site in self._program.sites]
        if self._columns is not None:
            small = [of(self._made[index], -1) for index in self._small]
            parts.append(Scattered(torch.cat(small, 2) if len(small) > 1 else small[0], self._columns))
        return parts + [Made(of(self._made[index], -1), self._slices[index]) for index in self._large]

    def _site_part(self, site: Site, of: Callable[..., torch.Tensor]) -> Part:
        assert self._program is not None, "it has sites"
        where, (first, second) = self._slices[site.param], self._program.params[site.param]
        if site.kind == "rows":
            same = self._tokens.get(site.param)
            tokens = same if same is not None else _joined([of(index, -1) for index in site.inputs])
            e = _joined([of(index, -1, second) for index in site.gradients])
            if site.padding is not None:
                e = e.masked_fill((tokens == site.padding).unsqueeze(-1), 0.0)
            return Rows(tokens, e, first, where)
        sources = (site.gradients, site.inputs) if site.kind == "matrix" else (site.inputs, site.gradients)
        rows, columns = (
            _joined([of(index, -1, size) for index in own]) for own, size in zip(sources, (first, second), strict=True)
        )
        if rows.shape[2] == 1:
            return Product(rows.squeeze(2), columns.squeeze(2), where)
        product = torch.bmm(rows.flatten(0, 1).transpose(1, 2), columns.flatten(0, 1))
        return Made(product.view(*rows.shape[:2], first * second), where)


def _records(batch: Batch) -> npt.NDArray[np.int64]:
    """Return the indices of a batch's records `[m, b]`; padding is record 0, and counts for nothing."""
    found = np.zeros(batch.mask.shape, np.int64)
    for row, padded in enumerate(found):
        own = batch.indices(row)
        padded[: len(own)] = own
    return found


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return several uses' values side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)
