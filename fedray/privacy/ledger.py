"""The privacy ledger: what was charged, written before the work, never taken back.

One JSON line an attempt at a round, appended and fsynced before the round starts. Each line carries the hash of the one
before it, so that a changed or missing line is found. Epsilon is derived from the ledger and never stored in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedray.errors import DamagedRunError
from fedray.privacy.accounting import Charges

Ranges = tuple[tuple[int, int], ...]
GENESIS = hashlib.sha256(b"fedray ledger").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One charged attempt.

    Args:
        round: From 1.
        attempt: From 0; one more each time the round is repeated with other inputs.
        gateways: Inclusive ranges of the gateways that are charged.
        steps: Local steps that each of them is charged.
        level: The noise level.
        inputs: SHA-256 of all public inputs of the round (params, engine, device kind, groups, constants).
    """

    round: int
    attempt: int
    gateways: Ranges
    steps: int
    level: str
    inputs: str

    def line(self, previous: str) -> str:
        """Return the entry as its JSON line, chained to the hash of the line before."""
        fields = {**asdict(self), "gateways": [list(pair) for pair in self.gateways], "previous": previous}
        return json.dumps(fields, allow_nan=False)


def ranges_of(gateways: Sequence[int]) -> Ranges:
    """Return sorted ids as inclusive ranges."""
    ranges: list[tuple[int, int]] = []
    for gateway in gateways:
        if ranges and gateway == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], gateway)
        else:
            ranges.append((gateway, gateway))
    return tuple(ranges)


class Ledger:
    """The ledger of one run; appends durably when it has a file.

    Args:
        path: ledger.jsonl, or None for a run that keeps no files.
        entries: What the file holds already, see `read`.
    """

    def __init__(self, path: Path | None, entries: Iterable[Entry] = ()) -> None:
        self._path = path
        self._entries: list[Entry] = []
        self._head = GENESIS
        for entry in entries:
            self._remember(entry)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All charged attempts, in order."""
        return tuple(self._entries)

    @property
    def head(self) -> str:
        """The chained hash of all lines."""
        return self._head

    def __len__(self) -> int:
        return len(self._entries)

    def charge(self, *, round_index: int, gateways: Ranges, steps: int, level: str, inputs: str) -> int:
        """Charge an attempt at a round before it runs and return the attempt's number.

        Guarantee:
            The charge is on disk when this returns. The same round with the same inputs is the same attempt: its noise
            is the same, so nothing more is released and nothing more is charged. Other inputs make a new attempt with
            fresh noise and a new charge.
        """
        repeated = [entry for entry in self._entries if entry.round == round_index]
        for entry in repeated:
            if (entry.inputs, entry.gateways) == (inputs, gateways):
                return entry.attempt
        entry = Entry(
            round=round_index, attempt=len(repeated), gateways=gateways, steps=steps, level=level, inputs=inputs
        )
        if self._path is not None:
            _append(self._path, entry.line(self._head))
        self._remember(entry)
        return entry.attempt

    def charges(self) -> Charges:
        """Return what the most charged gateway was charged (the maximum over gateways, as shards are disjoint)."""
        changes: dict[int, tuple[int, int]] = {}
        for entry in self._entries:
            for first, last in entry.gateways:
                for where, sign in ((first, 1), (last + 1, -1)):
                    steps, rounds = changes.get(where, (0, 0))
                    changes[where] = (steps + sign * entry.steps, rounds + sign)
        steps = rounds = most_steps = most_rounds = 0
        for where in sorted(changes):
            steps, rounds = steps + changes[where][0], rounds + changes[where][1]
            most_steps, most_rounds = max(most_steps, steps), max(most_rounds, rounds)
        return Charges(steps=most_steps, rounds=most_rounds)

    def _remember(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._head = hashlib.sha256(entry.line(self._head).encode()).hexdigest()


def read(path: Path) -> Ledger:
    """Read a ledger file; a torn last line (a crash while writing: its round never started) is dropped.

    Raises:
        DamagedRunError: A line is not what was written, or one is missing in the middle.
    """
    raw = path.read_bytes()
    complete, newline, torn = raw.rpartition(b"\n")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(raw) - len(torn))
            os.fsync(file.fileno())
    ledger = Ledger(path)
    for number, line in enumerate((complete + newline).splitlines(), start=1):
        try:
            fields: dict[str, Any] = json.loads(line)
            previous = fields.pop("previous")
            entry = Entry(**{**fields, "gateways": tuple(tuple(pair) for pair in fields["gateways"])})
            unchanged = previous == ledger.head and entry.line(previous).encode() == line
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedRunError(f"{path}: line {number} is not a ledger line ({error}); restore the file.") from error
        if not unchanged:
            raise DamagedRunError(
                f"{path}: line {number} does not follow from the line before it; lines were changed or lost: "
                "restore the file."
            )
        ledger._remember(entry)
    return ledger


def _append(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
