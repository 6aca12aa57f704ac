"""What must be the same when a run goes on: digests of its public parts, MACs of its private ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

_MOST_SHARDS = 1024  # whose MACs are kept one by one


def grouped(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity in which the MACs of very many shards are one for some hundred each."""
    shards = [name for name in identity if name.startswith("shard ")]
    if len(shards) <= _MOST_SHARDS:
        return dict(identity)
    found = {name: value for name, value in identity.items() if not name.startswith("shard ")}
    size = -(-len(shards) // _MOST_SHARDS)
    shards.sort(key=lambda name: int(name.removeprefix("shard ")))
    for first in range(0, len(shards), size):
        own = shards[first : first + size]
        name = f"shards {first}–{first + len(own) - 1}"
        found[name] = hashlib.sha256("".join(identity[shard] for shard in own).encode()).hexdigest()
    return found
