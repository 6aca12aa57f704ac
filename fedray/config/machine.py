"""Settings of the machines: where gateways run, and what is done when something fails or is slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedray.config.rules import Address, Count, CountFromZero, Mebibytes, Positive, check


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Where gateways run, and what is done when something fails or is slow."""

    pool: Literal["ray", "inline"] = "ray"
    """Where gateways run: Ray actors, or this process (debugging)."""
    ray_address: Address | None = None
    """Address of a Ray cluster (default: RAY_ADDRESS if set, else a local Ray of this machine)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where gateways train; auto takes GPUs where there are any."""
    gateways_per_actor: Literal["auto"] | Count = "auto"
    """Gateways that one actor hosts; auto gives each gateway its own actor while there is a slot for it."""
    memory_limit: Mebibytes | None = None
    """Memory that one actor's training may take, in MiB (default: its share of half the machine's or GPU's memory)."""
    max_failures: CountFromZero = 10
    """How many lost actors a run replaces before it gives up; 0: none."""
    round_timeout: Positive = 3600.0
    """Seconds that a round may take; what has not answered by then counts as failed."""
    placement_timeout: Positive = 30.0
    """Seconds to wait for GPUs that the cluster has but somebody else holds."""

    def __post_init__(self) -> None:
        """Check every field on its own."""
        check(self)
