"""A gateway: one participant of the federation, with its own records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Gateway:
    """One participant with its own records.

    Args:
        name: Shown in errors and reports.
        data: The shard, an `(x, y)` pair of numpy arrays or torch tensors of equal length, or a function of no arguments
            that returns it (then it is called only where the gateway trains). x may be several inputs: a tuple of arrays
            (the model's arguments) or a dict of them (its named arguments).
    """

    name: str
    data: Pair | Callable[[], Pair]

    def load(self) -> Pair:
        """Return the shard's `(x, y)`."""
        return self.data() if callable(self.data) else self.data
