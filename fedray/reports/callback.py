"""The seam of callbacks: who is told what happens in a run, and may ask it to stop. Trackers are callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedray.config.seams import check_is, find
from fedray.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Start:
    """What there is to tell before the first round.

    Args:
        path: The run directory.
        rounds: That are planned, of which `done` are done.
        done: Rounds that a resumed run had finished.
        rows: What runs where and at which privacy, as (name, text).
        warnings: Sentences.
        settings: By name, as in config.json.
    """

    path: Path
    rounds: int
    done: int
    rows: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RoundDone:
    """A finished round, written already.

    Args:
        record: As in metrics.jsonl.
        rounds: That are planned.
        params: `[P]`, the parameters after it; read-only.
    """

    record: Mapping[str, Any]
    rounds: int
    params: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a run.

    Args:
        path: The run directory.
        sentences: What a reader should take home.
        stopped: Why it ended before its last round; None when it did not.
        privacy: As in privacy.json.
    """

    path: Path
    sentences: Sequence[str]
    stopped: str | None
    privacy: Mapping[str, Any]


@runtime_checkable
class Callback(Protocol):
    """Follows a run in the driver; what it is given must not be changed. Whoever derives from it defines what it needs."""

    def on_start(self, start: Start) -> None:
        """The run is about to train."""
        return None

    def on_round(self, done: RoundDone) -> str | None:
        """A round is done. Return a sentence to stop the run, and it becomes `stopped`; None to go on.

        The next round trains by then and is charged: it is finished, and the run ends after it.
        """
        return None

    def on_end(self, end: End) -> None:
        """The run is over; not called when it failed."""
        return None


def trackers(track: str) -> list[Callback]:
    """Return the callbacks that --track names.

    Raises:
        InputError: One is not known, or what it needs is not installed.
    """
    names = [name.strip() for name in track.split(",")]
    if names == ["none"]:
        return []
    found = []
    for name in names:
        if name == "none":
            raise InputError(f"--track is {track!r}; none stands alone: leave it out.")
        callback = find("callback", name)
        check_is(callback, Callback, "callback", name)
        found.append(callback)
    return found
