"""Settings of local training: what is learned, with which model, how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedray.config.rules import Count, Positive, Records, check, text


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What is learned, with which model, and how a gateway trains it."""

    task: Annotated[str, text("classification or module:name")] = "classification"
    """What targets mean, the loss of a record and the metrics: classification, or module:name."""
    model: Annotated[str, text("mlp, cnn or module:function")] = "mlp"
    """mlp, cnn, or module:function; function() returns a torch module."""
    fix_model: bool = False
    """Replace layers that private training forbids (BatchNorm) by what Opacus puts in their place (GroupNorm)."""
    local_steps: Count = 16
    """Optimizer steps of each gateway in a round."""
    batch_size: Records = 64
    """B, the expected and public size of a Poisson batch, in records."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Local optimizer; it starts fresh each round."""
    lr: Positive = 0.02
    """Learning rate of the local optimizer."""
    engine: Literal["auto", "stacked", "sequence", "alone", "opacus"] = "auto"
    """Trainer: stacked (all gateways of an actor in one step), opacus (reference, one by one); auto: stacked if proven."""

    def __post_init__(self) -> None:
        """Check every field on its own."""
        check(self)
