"""What the throughput benchmark writes down about one run: clock, memory, result file.

It must not know the systems; each script marks its rounds and hands over its final weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from workload import Workload

_IMPORTED = time.monotonic()


def process_age_s() -> float:
    """Return the seconds since this process was started (interpreter start and imports included)."""
    try:
        # Field 22 of /proc/self/stat, counted after the name in parentheses, which may itself hold blanks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        # Without /proc the start of the interpreter itself (some 20 ms) goes uncounted.
        return time.monotonic() - _IMPORTED


class TreeMemory:
    """Peak memory of this process and all its descendants, sampled on a thread.

    Sums proportional set sizes: pages that processes share, such as Ray's object store, count once. Where the kernel
    does not tell them, resident sizes are summed.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._peak_kb = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop sampling and return the peak in MB."""
        self._sample()
        self._done.set()
        self._thread.join()
        return self._peak_kb / 1024

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self._peak_kb = max(self._peak_kb, sum(_memory_kb(pid) for pid in _descendants(os.getpid())))


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended while we looked
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _memory_kb(pid: int) -> int:
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1])
        except OSError:
            continue
    return 0


class Measurement:
    """One run's record: `round_ended` after each round, then `write`.

    The cold start runs from the start of the process to the end of the first round, which `round_seconds` therefore
    leaves out: all of its entries are steady-state rounds.
    """

    def __init__(self, name: str, workload: Workload, *, packages: tuple[str, ...] = (), tree: bool = False) -> None:
        """Start recording.

        Args:
            name: what the table calls the system.
            workload: what it runs.
            packages: distributions whose versions belong into the report.
            tree: whether the system starts processes of its own, whose memory counts too.
        """
        self.name = name
        self._workload = workload
        self._packages = packages
        self._memory = TreeMemory() if tree else None
        self.cold_start_s: float | None = None
        self.round_seconds: list[float] = []
        self._last = time.perf_counter()

    def round_ended(self) -> None:
        """Mark the end of a round."""
        now = time.perf_counter()
        if self.cold_start_s is None:
            self.cold_start_s = process_age_s()
        else:
            self.round_seconds.append(now - self._last)
        self._last = now

    def count_first_round(self, seconds: float) -> None:
        """Count the first round of a one-round job, by its own clock: nothing steadier can be had of it."""
        self.round_seconds.append(seconds)

    def write(
        self, path: str, weights: Mapping[str, torch.Tensor], **extra: float | int | str | dict[str, float]
    ) -> None:
        """Write RESULT.json and, beside it, the final weights as .npz by state_dict name.

        Raises:
            ValueError: fewer than two rounds ran, so no steady-state round exists.
        """
        if self.cold_start_s is None or not self.round_seconds:
            raise ValueError(f"{self.name} ran fewer than two rounds: a steady-state round takes rounds >= 2")
        final = Path(path).resolve().with_suffix(".npz")
        np.savez(final, **{name: tensor.detach().numpy() for name, tensor in weights.items()})
        median_s = statistics.median(self.round_seconds)
        result = {
            "name": self.name,
            "versions": self._versions(),
            "threads": torch.get_num_threads(),
            "cold_start_s": self.cold_start_s,
            "round_seconds": self.round_seconds,
            "samples_per_s": self._workload.samples_per_round / median_s,
            "gateways_per_s": self._workload.gateways / median_s,
            "peak_rss_mb": self._peak_mb(),
            "own_peak_rss_mb": _own_peak_mb(),
            "total_s": process_age_s(),
            "final_weights": str(final),
            **extra,
        }
        Path(path).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")

    def _versions(self) -> dict[str, str]:
        names = ("torch", "numpy", *self._packages)
        return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}

    def _peak_mb(self) -> float:
        if self._memory is not None:
            return self._memory.stop()
        return _own_peak_mb()


def _own_peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 / (1024 if sys.platform == "darwin" else 1)


def weights_distance(first: str, second: str) -> float:
    """Return the relative L2 distance of two .npz of weights, over all parameters as one vector.

    Raises:
        ValueError: they hold different names or shapes.
    """
    with np.load(first) as ours, np.load(second) as theirs:
        shapes = [{name: arrays[name].shape for name in arrays.files} for arrays in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{first} and {second} hold different parameters: {shapes[0]} and {shapes[1]}")
        names = ours.files
        one, other = (np.concatenate([arrays[name].ravel() for name in names]) for arrays in (ours, theirs))
    # In float64: the distance is near float32's own rounding.
    difference = np.linalg.norm(one.astype(np.float64) - other.astype(np.float64))
    return float(difference / np.linalg.norm(one.astype(np.float64)))
