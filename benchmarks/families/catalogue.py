"""All families of the zoo by key, in the order of its tables."""

from __future__ import annotations

from families.dense import DENSE
from families.images import IMAGES
from families.language import LANGUAGE
from families.sequences import SEQUENCES

FAMILIES = {**DENSE, **SEQUENCES, **IMAGES, **LANGUAGE}
