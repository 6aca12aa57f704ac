"""What a report must say about the machine: hardware, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

QUIET_LOAD = 0.5
PACKAGES = ("fedray", "ray", "torch", "numpy", "opacus", "dp-accounting", "cryptography")


def describe() -> dict[str, Any]:
    """Return hardware and versions, and how busy the machine is before anything is measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def busy_warning(machine: dict[str, Any]) -> str | None:
    """Return a warning for reports when others used the machine as the benchmark began; None when it was quiet."""
    if machine["load_before"] <= QUIET_LOAD:
        return None
    return (
        f"**The machine was busy** (load {machine['load_before']:g} before the start, quiet is {QUIET_LOAD:g} or less): "
        "do not quote these figures."
    )


def one_line(machine: dict[str, Any]) -> str:
    """Return the description in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']:g} GB, {machine['system']}, "
        f"Python {machine['python']}, {versions}; load before the start {machine['load_before']:g}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a machine that runs a checkout with torch alone
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
