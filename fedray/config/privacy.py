"""Settings of privacy: what is clipped and noised, and how much it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedray.config.rules import Delta, NoiseMultiplier, Positive, Scale, check, text
from fedray.privacy.spec import NoiseLevelName

DEFAULT_NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """What is clipped and noised, and how much it may cost."""

    noise_level: NoiseLevelName = "sample"
    """What is clipped and noised: nothing, each batch's gradient, each record's gradient, or each gateway's update."""
    noise_multiplier: NoiseMultiplier | None = None
    """sigma: noise standard deviation over the clip norm (1.0 when neither it nor --target-epsilon is given)."""
    clip_norm: Scale = 1.0
    """C, the L2 norm that gradients or updates are clipped to."""
    clip: Annotated[str, text("fixed or module:name")] = "fixed"
    """How a vector is brought into the ball of radius C: fixed (scaled down when it is longer), or module:name."""
    noise_shape: Annotated[str, text("independent or module:name")] = "independent"
    """How noise varies over rounds and steps: independent (the same everywhere), or module:name."""
    delta: Delta = 1e-5
    """delta of every (epsilon, delta) guarantee."""
    target_epsilon: Positive | None = None
    """Find the noise multiplier with which the planned run ends at this epsilon (the level's first guarantee)."""
    max_epsilon: Positive | None = None
    """Stop before the round that would pass this epsilon (the level's first guarantee)."""

    def __post_init__(self) -> None:
        """Check every field on its own."""
        check(self)
