"""How a mutant gets at a function: under every name by which a module of fedray knows it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

Patch = pytest.MonkeyPatch


def replace_everywhere(patch: Patch, original: Any, mutated: Any) -> None:
    """Replace a function or class under every name by which a module of fedray knows it."""
    import fedray.pool.worker
    import fedray.training.reference  # noqa: F401  # loaded on demand by fedray: it must be patched too

    found = 0
    for name, module in list(sys.modules.items()):
        if name == "fedray" or name.startswith("fedray."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, attribute, mutated)
                    found += 1
    assert found, f"nobody uses {original}"
