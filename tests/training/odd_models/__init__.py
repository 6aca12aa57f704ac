"""Models that reach for what traces and rules of batches get wrong: memory, layouts, state by side doors, odd ranks.

Each was found by somebody who tried to break isolation, or stands next to one that was.
"""

from __future__ import annotations

from tests.training.odd_models import memory, side_doors, values  # noqa: F401  # each registers its models
from tests.training.odd_models.registry import CLASSES, MODELS, REFUSED, WIDTH, Odd

__all__ = ["CLASSES", "MODELS", "REFUSED", "WIDTH", "Odd"]
