"""fedray: differentially private federated learning, simulated on Ray.

Public names are imported on first use, so that `python -m fedray --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.config.settings import RunConfig
    from fedray.data.gateway import Gateway
    from fedray.errors import FedrayError
    from fedray.models.loading import load_model
    from fedray.orchestrator.rounds import Orchestrator, Run

__version__ = "0.1.0"
__all__ = ["FedrayError", "Gateway", "Orchestrator", "Run", "RunConfig", "load_model"]

_HOMES = {
    "FedrayError": "fedray.errors",
    "Gateway": "fedray.data.gateway",
    "Orchestrator": "fedray.orchestrator.rounds",
    "Run": "fedray.orchestrator.rounds",
    "RunConfig": "fedray.config.settings",
    "load_model": "fedray.models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
