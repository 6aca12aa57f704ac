"""Small runs to audit."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedray.audit.audit import Audit, run_audit
from fedray.audit.lab import Effort
from fedray.config.settings import RunConfig
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare

LEVELS = ("sample", "batch", "gateway")
QUICK = Effort(runs=800, game_seconds=0.6, training_seconds=0.5, trials=8)


def plan_of(level: str, parts: UserParts | None = None, **changes: Any) -> Plan:
    """Return the plan of a small run on toy."""
    settings: dict[str, Any] = {
        "noise_level": level,
        "gateways": 4,
        "rounds": 2,
        "local_steps": 4,
        "batch_size": 16,
        "samples_per_gateway": 256,
        "seed": 11,
        "pool": "inline",
        "device": "cpu",
    }
    return prepare(RunConfig().resolve(**{**settings, **changes}), UserParts() if parts is None else parts)


def audit_of(level: str, parts: UserParts | None = None, **changes: Any) -> Audit:
    """Audit a small run with little effort."""
    return run_audit(plan_of(level, parts, **changes), effort=QUICK)


def flagged(audit: Audit) -> set[str]:
    """Return the names of the attacks that refuted a claim."""
    return {finding.name for finding in audit.findings if finding.violated}


class Tokens(nn.Module):
    """A user's own model on token sequences: the mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores."""
        return cast(torch.Tensor, self.head(self.embed(x).mean(dim=1)))


def token_shards(number: int = 3) -> list[tuple[Any, Any]]:
    """Return a user's own shards of token sequences."""
    rng = np.random.default_rng(5)
    return [(rng.integers(0, 12, (80, 7)), rng.integers(0, 3, 80)) for _ in range(number)]
