"""Keeps keys out of files that nobody asked for."""

from __future__ import annotations

import resource


def without_core_dumps() -> None:
    """Let this process leave no core dump, in which its keys would lie."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
