"""Runs whose actors are killed at random times while they train; for tests and for benchmarks/chaos.py."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedray
from fedray.reports.callback import Callback, End, RoundDone, Start

JOB: dict[str, Any] = {
    "gateways": 4,
    "gateways_per_actor": 2,
    "rounds": 10,
    "local_steps": 16,
    "batch_size": 32,
    "samples_per_gateway": 256,
    "noise_level": "gateway",
    "seed": 5,
    "max_failures": 50,
}


def train(out: Path, callbacks: Sequence[Callback] = (), **changes: Any) -> fedray.Run:
    """Run the job that is disturbed, with changes."""
    return fedray.Orchestrator(
        config=fedray.RunConfig().resolve(**{**JOB, "out": out, **changes}), callbacks=callbacks
    ).run()


class Clock(Callback):
    """Notes how long the rounds of a run take, the start of its actors left out."""

    seconds = 0.0

    def on_start(self, start: Start) -> None:
        """Note that the actors are ready."""
        self._began = time.monotonic()

    def on_end(self, end: End) -> None:
        """Note the end."""
        self.seconds = time.monotonic() - self._began


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


class Losses(logging.Handler):
    """Collects the rounds in which fedray saw that an actor was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a log line."""
        words = dict(word.partition("=")[::2] for word in record.getMessage().split() if "=" in word)
        if words.get("event") == "actor_lost":
            self.rounds.append(int(words["round"]))


class Assassin(threading.Thread):
    """Kills a random actor (SIGKILL) at random instants of a run, counted in rounds, so that none comes after its end.

    Args:
        rng: Chooses victims and instants.
        shots: How many it kills.
        rounds: Of the run; no shot waits for the last of them to end.
        round_s: About how long a round takes, in seconds.
    """

    def __init__(self, rng: random.Random, shots: int, rounds: int, round_s: float) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._rng, self._round_s = rng, round_s
        self._instants = sorted(rng.uniform(0, rounds - 1) for _ in range(shots))
        self._done = [threading.Event() for _ in range(rounds + 1)]
        self._done[0].set()
        self._over = False

    def round_is_over(self, round_index: int) -> None:
        """Note that this round (from 1) has ended."""
        self._done[round_index].set()

    def run(self) -> None:
        """Kill, until `stop`."""
        for instant in self._instants:
            self._done[int(instant)].wait()
            time.sleep(instant % 1 * self._round_s)
            while not self._over and not self._kill():
                time.sleep(0.001)  # the last victim's successor is still to come

    def _kill(self) -> bool:
        pids = actor_pids()
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(pids), signal.SIGKILL)
                self.kills += 1
                return True
        return False

    def stop(self) -> None:
        """Kill no more."""
        self._over = True
        for event in self._done:
            event.set()
        self.join()


class _Opening(Clock):
    """Lets the assassin loose when the actors are ready, and tells it of the rounds."""

    def __init__(self, assassin: Assassin) -> None:
        self._assassin = assassin

    def on_start(self, start: Start) -> None:
        """Start the clock and the assassin."""
        super().on_start(start)
        self._assassin.start()

    def on_round(self, done: RoundDone) -> None:
        """Tell that a round is over."""
        self._assassin.round_is_over(done.record["round"])


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What happened to a run under fire.

    Args:
        kills: How many actors were killed.
        lost_in_rounds: The rounds in which fedray found one lost.
        seconds: That its rounds took.
    """

    kills: int
    lost_in_rounds: list[int]
    seconds: float


def attack(out: Path, seed: int, span_s: float, shots: int = 1, **changes: Any) -> Attack:
    """Run the job while actors are killed at random times.

    Args:
        out: The run directory.
        seed: Chooses victims and times.
        span_s: Seconds that the rounds take when nothing happens.
        shots: How many.
        changes: To the job.
    """
    losses, log = Losses(), logging.getLogger("fedray")
    rounds = changes.get("rounds", JOB["rounds"])
    assassin = Assassin(random.Random(seed), shots, rounds, span_s / rounds)
    opening = _Opening(assassin)
    log.addHandler(losses)
    try:
        train(out, [opening], **changes)
    finally:
        log.removeHandler(losses)
        if assassin.ident is not None:
            assassin.stop()
    return Attack(kills=assassin.kills, lost_in_rounds=losses.rounds, seconds=opening.seconds)
