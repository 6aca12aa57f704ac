"""Settings of the federation: who takes part, and what becomes of their updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedray.config.rules import Count, Gateways, Positive, Share, check, text


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """Who takes part, and what becomes of their updates."""

    gateways: Gateways = 16
    """How many gateways (FL clients) take part."""
    rounds: Count = 10
    """Rounds of broadcast, local training, gather and average."""
    participation: Share = 1.0
    """Chance of each gateway to take part in a round, independently (Poisson)."""
    algorithm: Annotated[str, text("fedavg or module:name")] = "fedavg"
    """What gateways do with gradients and upload, and what the orchestrator does with it: fedavg, or module:name."""
    aggregator: Annotated[str, text("mean or module:name")] = "mean"
    """How uploads become one: mean, or module:name."""
    server_optimizer: Annotated[str, text("sgd or module:name")] = "sgd"
    """How the average update moves the model: sgd (at rate 1: it is added), or module:name."""
    weights: Literal["uniform", "records"] = "uniform"
    """Average updates uniformly, or by record counts (reveals the counts; adjacency becomes zero-out)."""
    on_failure: Literal["fail", "drop"] = "fail"
    """What a failed gateway means: the end of the run, or a round without it (charged all the same)."""
    max_update_norm: Positive | None = None
    """Refuse updates whose L2 norm is larger (default: any finite update is taken)."""

    def __post_init__(self) -> None:
        """Check every field on its own."""
        check(self)
