"""Norms and clipped sums of per-record gradients, part by part; some are stored in full, some only as factors.

All values have leading dimensions of gateways and their records, `[m, b, …]`; sums go to `[m, P]`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fedray.privacy.clipping import factors_of_products, row_norms, selected


class Part(Protocol):
    """The per-record gradients of one or several parameters."""

    def squared_norms(self) -> torch.Tensor:
        """Return the squared norms `[m, b]`, float64."""
        ...

    def select(self, keep: torch.Tensor) -> None:
        """Replace records outside `keep` `[m, b]` by zeros (a factor of 0 would leave NaN)."""
        ...

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """Add each gateway's sum of factor · gradient to `out` `[m, P]`; factors `[m, b]`."""
        ...


class Made:
    """Gradients `[m, b, D]` of one parameter, stored in full.

    Args:
        gradient: See above.
        where: The parameter's columns.
    """

    def __init__(self, gradient: torch.Tensor, where: slice) -> None:
        self.gradient = gradient.contiguous()
        self._where = where

    def squared_norms(self) -> torch.Tensor:
        """See `Part.squared_norms`."""
        return row_norms(self.gradient).double().square_()

    def select(self, keep: torch.Tensor) -> None:
        """See `Part.select`."""
        self.gradient = selected(self.gradient, keep)

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """See `Part.add_sum`."""
        out[:, self._where] += self.weighted(factors)

    def weighted(self, factors: torch.Tensor) -> torch.Tensor:
        """Return the sums `[m, D]`."""
        return torch.bmm(factors.unsqueeze(1), self.gradient).squeeze(1)


class Scattered(Made):
    """Gradients `[m, b, D]` of several small parameters, whose columns are `columns` `[D]`."""

    def __init__(self, gradient: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__(gradient, slice(0))
        self._columns = columns

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """See `Part.add_sum`."""
        out.index_add_(1, self._columns, self.weighted(factors))


class Product:
    """Gradients e aᵀ of a weight that each record uses once: never stored, only their factors e and a.

    Args:
        rows: e `[m, b, out]`.
        columns: a `[m, b, in]`.
        where: The weight's columns.
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, where: slice) -> None:
        self._rows, self._columns, self._where = rows.contiguous(), columns.contiguous(), where
        self._lengths: torch.Tensor | None = None

    def squared_norms(self) -> torch.Tensor:
        """See `Part.squared_norms`; in float64, as a tiny value times a huge one counts."""
        rows, columns = (
            torch.linalg.vector_norm(part, dim=2, dtype=torch.float64) for part in (self._rows, self._columns)
        )
        self._lengths = rows
        squares: torch.Tensor = (rows * columns).square_()
        return squares

    def select(self, keep: torch.Tensor) -> None:
        """See `Part.select`."""
        self._rows, self._columns = (selected(part, keep) for part in (self._rows, self._columns))

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """See `Part.add_sum`."""
        if self._lengths is not None:
            factors = factors_of_products(self._lengths, factors)
        weighted = self._rows * factors.unsqueeze(2)
        out[:, self._where] += torch.bmm(weighted.transpose(1, 2), self._columns).flatten(1)


class Rows:
    """Gradients of an embedding: for each token of a record, what is added to the token's row.

    Args:
        tokens: `[m, b, S]`, or `[S]` when all records have the same.
        e: `[m, b, S, D]`.
        num_rows: V.
        where: The embedding's columns.
    """

    def __init__(self, tokens: torch.Tensor, e: torch.Tensor, num_rows: int, where: slice) -> None:
        self._num_rows, self._where = num_rows, where
        e = e.contiguous()
        if tokens.dim() == 1:
            rows, place = torch.unique(tokens, return_inverse=True)
            if len(rows) < len(tokens):
                chosen = torch.nn.functional.one_hot(place, len(rows)).to(e.dtype)
                e = torch.matmul(chosen.t(), e)
                tokens = rows
            self._tokens, self._added = tokens.expand(*e.shape[:2], -1), e
        else:
            self._tokens, self._added = tokens, added_rows(tokens.flatten(0, 1), e.flatten(0, 1)).view_as(e)

    def squared_norms(self) -> torch.Tensor:
        """See `Part.squared_norms`."""
        return row_norms(self._added.flatten(2)).double().square_()

    def select(self, keep: torch.Tensor) -> None:
        """See `Part.select`."""
        self._added = selected(self._added, keep)

    def add_sum(self, out: torch.Tensor, factors: torch.Tensor) -> None:
        """See `Part.add_sum`."""
        width = self._added.shape[3]
        weighted = (self._added * factors.view(*factors.shape, 1, 1)).flatten(1, 2)
        index = self._tokens.flatten(1).unsqueeze(2).expand_as(weighted)
        table = out[:, self._where].view(len(out), self._num_rows, width)
        table.scatter_add_(1, index, weighted)


def added_rows(tokens: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Return the sum that each token adds to its row, at the token's first place, and zeros at later ones.

    Tokens that occur twice in a record are added up before the norm is taken: gradients that cancel would otherwise be
    small in the norm and large in what is released.

    Args:
        tokens: `[n, S]`.
        e: `[n, S, D]`.

    Returns:
        `[n, S, D]`.
    """
    if tokens.shape[1] == 1:
        return e
    same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
    repeats = same.tril(-1).any(2)
    return torch.bmm((same & ~repeats.unsqueeze(2)).to(e.dtype), e)
