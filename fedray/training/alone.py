"""Gradients of records each of which was seen alone: a traced program, run on many records and clipped record by record.

One gateway at a time. What a record adds depends on its own values, its own draws and the parameters, by construction:
the program was made from code that saw one record, and is repeated by rules that keep records apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.data.inputs import leaves
from fedray.data.shards import Shard
from fedray.params import Layout
from fedray.privacy.clipping import clip_factors, row_norms, usable
from fedray.training.batching import Batched
from fedray.training.draws import Batch
from fedray.training.embedding_rows import added_rows
from fedray.training.program import Program, Site
from fedray.training.record_draws import RecordDraws
from fedray.training.record_gradients import Identity

_JOINED = 2**16  # values of a record's gradient in one parameter, past which it is clipped where it lies
_EXACT = torch.float64


class AloneGradients:
    """Clipped and weighted sums of record gradients by a program, one gateway at a time.

    Args:
        program_of: Gives the program of the model and loss, from a shard that shows what records look like.
        layout: Of the trainable parameters.
        device: Where it runs.
        memory_limit: Bytes that records may take at once.
    """

    def __init__(
        self, program_of: Callable[[Shard], Program], layout: Layout, device: torch.device, memory_limit: int
    ) -> None:
        self.num_params = layout.num_params
        self._program_of = program_of
        self._memory_limit = memory_limit
        self._device = device
        self._slices = [where for _, _, where in layout.slices()]
        self._params: list[torch.Tensor] = []
        self._program: Program | None = None

    def _prepare(self, program: Program) -> None:
        self._program = program
        self._batched = Batched(program)
        self._constants = [constant.to(self._device) for constant in program.constants]
        self._sites = [_site(site, program) for site in program.sites]
        self._made = {index: value for index, value in enumerate(program.gradients) if value is not None}
        self._small = [index for index in self._made if self._size(index) <= _JOINED]
        self._large = [index for index in self._made if self._size(index) > _JOINED]
        columns = [torch.arange(self._slices[index].start, self._slices[index].stop) for index in self._small]
        self._columns = torch.cat(columns).to(self._device) if columns else None
        sizes = [i.spec.shape for i in program.instructions if i.spec is not None and self._batched.is_batched(i.out)]
        weights = [*self._made, *(site.param for site in program.sites)]
        self._values = sum(map(math.prod, sizes)) + 2 * sum(map(self._size, weights))
        self._together = max(1, self._memory_limit // (4 * self._values))  # records

    @property
    def most_together(self) -> int:
        """See `RecordGradients.most_together`."""
        return 1

    def values_per_record(self, shard: Shard) -> int:
        """See `RecordGradients.values_per_record`."""
        if self._program is None:
            with torch.inference_mode(False):
                self._prepare(self._program_of(shard))
        return self._values

    def bind(self, params: torch.Tensor, identity: Identity) -> None:
        """See `RecordGradients.bind`."""
        assert self._program is not None, "values_per_record comes first"
        keys, (gateway,) = identity
        self._params = [
            params[0, where].view(shape) for where, shape in zip(self._slices, self._program.params, strict=True)
        ]
        self._draws = RecordDraws(self._program.draws, keys, gateway, self._device)

    def add_clipped(self, out: torch.Tensor, batch: Batch, step: int, clip_norm: float) -> None:
        """See `RecordGradients.add_clipped`."""
        for parts, _ in self._parts(batch, step):
            squares = [part.squared_norms() for part in parts]
            norms = functools.reduce(torch.Tensor.add_, squares[1:], squares[0]).sqrt_()
            if not bool(usable(norms.max())):
                for part in parts:
                    part.select(usable(norms))
            factors = clip_factors(norms, clip_norm)
            for part in parts:
                part.add_sum(out[0], factors)

    def add_weighted(self, out: torch.Tensor, batch: Batch, step: int, scales: npt.NDArray[np.float64]) -> None:
        """See `RecordGradients.add_weighted`."""
        for parts, n in self._parts(batch, step):
            factors = torch.full((n,), float(scales[0]), device=self._device)
            for part in parts:
                part.add_sum(out[0], factors)

    def _size(self, param: int) -> int:
        where = self._slices[param]
        return int(where.stop - where.start)

    def _parts(self, batch: Batch, step: int) -> Iterator[tuple[list[_Part], int]]:
        """Yield the parts of the gradients of as many records at a time as memory allows, and how many these are."""
        records = batch.indices(0)
        for first in range(0, len(records), self._together):
            some = slice(first, first + self._together)
            inputs = [leaf[0, some].unsqueeze(1) for leaf in leaves(batch.x)]
            parts = self._run(inputs, batch.y[0, some].unsqueeze(1), self._draws.of(step, records[some]))
            if parts:
                yield parts, len(records[some])

    def _run(self, inputs: Sequence[torch.Tensor], target: torch.Tensor, draws: Sequence[torch.Tensor]) -> list[_Part]:
        """Run the program on records `[n, 1, …]`; return the parts of their gradients."""
        n = len(target)
        found = self._batched.run(self._params, self._constants, draws, inputs, target, n)
        values = dict(zip(self._batched.wanted, found, strict=True))

        def of(index: int) -> torch.Tensor:
            value: torch.Tensor = values[index]
            return value if self._batched.is_batched(index) else value.expand(n, *value.shape)

        made = {param: of(value).reshape(n, -1) for param, value in self._made.items()}
        parts: list[_Part] = [site.part(of, n, self._slices[site.param]) for site in self._sites]
        if self._columns is not None:
            small = [made[index] for index in self._small]
            parts.append(_Scattered(torch.cat(small, 1) if len(small) > 1 else small[0], self._columns))
        return parts + [_Made(made[index], self._slices[index]) for index in self._large]


class _Part:
    """The records' gradients in some parameters."""

    def squared_norms(self) -> torch.Tensor:
        """Return `[n]`."""
        raise NotImplementedError

    def select(self, keep: torch.Tensor) -> None:
        """Replace records outside `keep` `[n]` by zeros (a factor of 0 would leave NaN)."""
        raise NotImplementedError

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """Add the sum of factor · gradient to `out` `[P]`."""
        raise NotImplementedError


class _Made(_Part):
    """Gradients `[n, D]` of one parameter, each made in full."""

    def __init__(self, gradient: torch.Tensor, where: slice) -> None:
        self.gradient = gradient
        self._where = where

    def squared_norms(self) -> torch.Tensor:
        return row_norms(self.gradient).double().square_()

    def select(self, keep: torch.Tensor) -> None:
        self.gradient = torch.where(keep.unsqueeze(1), self.gradient, 0.0)

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        out[self._where] += torch.mv(self.gradient.t(), factors)


class _Scattered(_Made):
    """Gradients `[n, D]` of several small parameters, whose places are `columns` `[D]`."""

    def __init__(self, gradient: torch.Tensor, columns: torch.Tensor) -> None:
        self.gradient = gradient
        self._columns = columns

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        out.index_add_(0, self._columns, torch.mv(self.gradient.t(), factors))


class _Product(_Part):
    """Gradients e aᵀ `[out, in]` of records that use a weight once: never made."""

    def __init__(self, a: torch.Tensor, e: torch.Tensor, where: slice) -> None:
        self._a, self._e, self._where = a, e, where

    def squared_norms(self) -> torch.Tensor:
        a, e = (torch.linalg.vector_norm(part, dim=1, dtype=_EXACT) for part in (self._a, self._e))
        squares: torch.Tensor = (a * e).square_()  # a tiny value times a huge one counts
        return squares

    def select(self, keep: torch.Tensor) -> None:
        self._a, self._e = (torch.where(keep.unsqueeze(1), part, 0.0) for part in (self._a, self._e))

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        found = torch.mm((self._e * factors.unsqueeze(1)).t(), self._a)
        out[self._where] += found.view(-1)


class _Rows(_Part):
    """Gradients of an embedding's rows: for each record distinct `rows` `[n, S]` and what is added to them `[n, S, D]`."""

    def __init__(self, rows: torch.Tensor, added: torch.Tensor, where: slice) -> None:
        self._rows, self._added, self._where = rows, added, where

    def squared_norms(self) -> torch.Tensor:
        return row_norms(self._added.flatten(1)).double().square_()

    def select(self, keep: torch.Tensor) -> None:
        self._added = torch.where(keep.view(-1, 1, 1), self._added, 0.0)

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        width = self._added.shape[2]
        weighted = (self._added * factors.view(-1, 1, 1)).view(-1, width)
        out[self._where].view(-1, width).index_add_(0, self._rows.reshape(-1), weighted)


class _SiteParts:
    """Makes the part of one site."""

    def __init__(self, site: Site, shape: tuple[int, ...]) -> None:
        self.param = site.param
        self._site = site
        out, inner = shape if site.kind == "matrix" else shape[::-1]
        self._out, self._in = out, inner

    def part(self, of: Any, n: int, where: slice) -> _Part:
        """Return the part.

        Args:
            of: Gives a value by its index, with records in front.
            n: How many records.
            where: The parameter's slice of the P columns.
        """
        a = [of(index).reshape(n, -1, self._in) for index in self._site.inputs]
        e = [of(index).reshape(n, -1, self._out) for index in self._site.gradients]
        rows, columns = (torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in (e, a))
        if self._site.kind == "transposed":
            rows, columns = columns, rows
        if rows.shape[1] == 1:
            return _Product(columns.squeeze(1), rows.squeeze(1), where)
        return _Made(torch.bmm(rows.transpose(1, 2), columns).flatten(1), where)


class _RowParts(_SiteParts):
    """Makes the part of an embedding."""

    def __init__(self, site: Site, shape: tuple[int, ...]) -> None:
        self.param = site.param
        self._site = site
        self._width = shape[1]

    def part(self, of: Any, n: int, where: slice) -> _Part:
        rows = torch.cat([of(index).reshape(n, -1) for index in self._site.inputs], 1)
        e = torch.cat([of(index).reshape(n, -1, self._width) for index in self._site.gradients], 1)
        if self._site.padding is not None:
            e = e.masked_fill((rows == self._site.padding).unsqueeze(2), 0.0)
        return _Rows(rows, added_rows(rows, e), where)


def _site(site: Site, program: Program) -> _SiteParts:
    return (_RowParts if site.kind == "rows" else _SiteParts)(site, program.params[site.param])
