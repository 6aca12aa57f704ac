"""Settings of the data: where records come from and who holds which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedray.config.rules import Records, check, text


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where records come from, and who holds which."""

    dataset: Annotated[str, text("toy, digits or module:function")] = "toy"
    """toy, digits, or module:function; function(gateways) returns (train, test), or a class has a method load."""
    partition: Annotated[str, text("iid, dirichlet:ALPHA or module:name")] = "iid"
    """How one data set is split over gateways: iid, dirichlet:ALPHA (label skew; smaller ALPHA, more), or module:name."""
    samples_per_gateway: Records | None = None
    """Public nominal shard size, in records: 4096 on toy; needed where shards are loaded lazily."""

    def __post_init__(self) -> None:
        """Check every field on its own."""
        check(self)
