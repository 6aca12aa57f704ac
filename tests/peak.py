"""The most memory that this process has held."""

from __future__ import annotations

from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the most memory that was resident since this program started.

    `ru_maxrss` will not do: a program that a larger one starts begins with that one's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")
