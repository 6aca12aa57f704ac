"""Kills actors of this process' Ray at random; for tests and for benchmarks/chaos.py."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path


def actor_pids() -> list[int]:
    """Return the processes that host this process' actors."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            hosts = folder.name.isdigit() and b"ray::_Actor" in (folder / "cmdline").read_bytes()
            if hosts and _descends_from(int(folder.name), os.getpid()):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def _descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


class Assassin(threading.Thread):
    """Kills a random actor (SIGKILL) at random times.

    Args:
        rng: Chooses victims and times.
        shots: How many it kills at most.
        longest_s: The longest time between two shots.
    """

    def __init__(self, rng: random.Random, shots: int, longest_s: float) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._rng, self._shots, self._longest_s = rng, shots, longest_s
        self._over = threading.Event()

    def run(self) -> None:
        """Kill until `stop`."""
        while self.kills < self._shots and not self._over.wait(self._rng.uniform(0, self._longest_s)):
            pids = actor_pids()
            if pids:
                try:
                    os.kill(self._rng.choice(pids), signal.SIGKILL)
                    self.kills += 1
                except ProcessLookupError:
                    continue

    def stop(self) -> None:
        """Kill no more."""
        self._over.set()
        self.join()
