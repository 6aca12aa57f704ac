"""The privacy ledger: what was charged, written before the work, never taken back.

One JSON line an event, appended and fsynced before what it speaks of happens. Each line carries the hash of the one before
it, so that a changed or missing line is found. Epsilon is derived from the ledger and never stored in it.

Events: "charge" (an attempt at a round is about to start), "arrival" (not the whole cohort arrived; written before the
noise of the `gateway` level is drawn), "extension" (a finished run gets more rounds under a fresh root key) and
"incarnation" (the charges that follow are another process', whose noise has keys of its own).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedray.errors import DamagedRunError
from fedray.privacy.accounting import Charges
from fedray.privacy.durable import append_durably, parse_json, read_regular, truncate_durably
from fedray.privacy.tally import Ranges, Tally

GENESIS = hashlib.sha256(b"fedray ledger").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: an event.

    Args:
        event: What happened; the other fields mean the charged attempt unless said otherwise.
        round: From 1. Of an extension: the last finished round.
        attempt: From 0; one more each time the round is repeated with other inputs. Of an extension or incarnation: its
            number, from 1.
        gateways: Inclusive ranges of the gateways that are charged. Of an arrival: of those that arrived, empty when secret.
        steps: Local steps that each of them is charged; 0 for other events.
        level: The noise level.
        inputs: SHA-256 of all public inputs of the round (params, engine, device kind, groups, constants). Of an arrival:
            a MAC of who arrived. Of an extension: a commitment to the new root key. Of an incarnation: its value.
        rounds: Of an extension: how many rounds the run has from now on; else 0.
    """

    event: Literal["charge", "arrival", "extension", "incarnation"] = "charge"
    round: int
    attempt: int
    gateways: Ranges
    steps: int
    level: str
    inputs: str
    rounds: int = 0

    def line(self, previous: str) -> str:
        """Return the entry as its JSON line, chained to the hash of the line before."""
        fields = {**asdict(self), "gateways": [list(pair) for pair in self.gateways], "previous": previous}
        return json.dumps(fields, allow_nan=False)


def _always() -> None:
    """Allow any charge."""


class Ledger:
    """The ledger of one run; appends durably when it has a file.

    Args:
        path: ledger.jsonl, or None for a run that keeps no files.
        entries: What the file holds already, see `read`.
    """

    def __init__(self, path: Path | None, entries: Iterable[Entry] = ()) -> None:
        self._path = path
        self._incarnation = ""  # the last one in the file
        self._wanted_incarnation: str | None = None  # None: go on under that one
        self._incarnation_of: dict[tuple[int, int], str] = {}  # by round and attempt
        self._forgotten = 0  # entries that are no longer held
        self._entries: list[Entry] = []
        self._of_round: defaultdict[int, list[Entry]] = defaultdict(list)
        self._most = [Charges(steps=0, rounds=0)]  # after each entry
        self._heads = [GENESIS]
        self._tally = Tally()
        self._numbers: Counter[str] = Counter()  # of extensions and incarnations
        self._incomplete: set[int] = set()
        for entry in entries:
            self._remember(entry)
        self._read = len(self)  # what another process may have acted upon

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All events that are held, in order."""
        return tuple(self._entries)

    @property
    def head(self) -> str:
        """The chained hash of all lines, which stands for the whole ledger."""
        return self._heads[-1]

    def __len__(self) -> int:
        return self._forgotten + len(self._entries)

    def forget(self, before: int) -> None:
        """Hold no longer what no later round asks for, so that a long run needs no more memory than a short one.

        Args:
            before: A round that is done and in a checkpoint, as are all before it.
        """
        number = 0
        while number < len(self._entries) and self._entries[number].round < before:
            entry = self._entries[number]
            self._of_round.pop(entry.round, None)
            self._incarnation_of.pop((entry.round, entry.attempt), None)
            number += 1
        del self._entries[:number], self._most[:number], self._heads[:number]
        self._forgotten += number

    def holds(self, length: int, head: str) -> bool:
        """Tell whether the first `length` lines have this chained hash."""
        place = length - self._forgotten
        return 0 <= place < len(self._heads) and self._heads[place] == head

    def charge_under(self, incarnation: str) -> None:
        """Charge from now on under this process' own incarnation; the first new charge writes it to the ledger.

        Args:
            incarnation: See `fedray.privacy.streams.new_incarnation`.

        Guarantee:
            The incarnation is on disk before the first charge under it, and what was charged before keeps its own. So
            two processes that go on from equal files repeat what both find charged under equal keys, and share no other.

        Edge cases:
            A process that charges nothing new, or has no incarnation (a seeded run), writes none.
        """
        self._wanted_incarnation = incarnation

    def incarnation(self, round_index: int, attempt: int) -> str:
        """Return the incarnation under which an attempt was charged; "" for none."""
        return self._incarnation_of[round_index, attempt]

    def charge(
        self,
        *,
        round_index: int,
        gateways: Ranges,
        steps: int,
        level: str,
        inputs: str,
        afford: Callable[[], None] = _always,
    ) -> int:
        """Charge an attempt at a round before it runs and return the attempt's number.

        Args:
            round_index: From 1.
            gateways: Ranges of those who are charged.
            steps: Local steps that each is charged.
            level: The noise level.
            inputs: Digest of all public inputs.
            afford: Called before a new charge is written; raises when the budget does not allow it.

        Guarantee:
            The charge is on disk when this returns. The same round with the same inputs is the same attempt: its noise
            is the same, so nothing more is released and nothing more is charged. Other inputs make a new attempt with
            fresh noise and a new charge, under this process' incarnation.
        """
        attempts = self._events("charge", round_index)
        for entry in attempts:
            if (entry.inputs, entry.gateways) == (inputs, gateways):
                return entry.attempt
        afford()
        self._record_incarnation(round_index, level)
        entry = Entry(
            round=round_index, attempt=len(attempts), gateways=gateways, steps=steps, level=level, inputs=inputs
        )
        self._append(entry)
        return entry.attempt

    def record_arrivals(
        self,
        *,
        round_index: int,
        attempt: int,
        arrived: Ranges,
        label: str,
        everybody: bool,
        central_noise: bool,
        afford: Callable[[], None] = _always,
    ) -> int:
        """Record who arrived before the aggregate noise is drawn; return the attempt whose noise may be used.

        Args:
            round_index: The round.
            attempt: The charged attempt.
            arrived: Ranges of those who arrived; empty when the cohort is secret.
            label: A MAC of who arrived.
            everybody: Whether the whole cohort did.
            central_noise: Whether the orchestrator adds noise; otherwise who arrived changes no release.
            afford: See `charge`.

        Guarantee:
            With central noise two different sets never share an attempt: when an attempt that may have been released
            meets another set than before, a new attempt is charged. Nor do two inputs: a set that arrived in an attempt
            with other inputs counts for nothing here.

        Edge cases:
            An attempt whose whole cohort arrived leaves no line, so nothing is written in a round without failures.
        """
        charged = self._events("charge", round_index)[attempt]
        before = [entry.inputs for entry in self._events("arrival", round_index) if entry.attempt == attempt]
        if everybody and not before:
            return attempt
        perhaps_released = (
            set(before) != {label} if before else charged in self._entries[: max(0, self._read - self._forgotten)]
        )
        if central_noise and perhaps_released:
            attempt = self.charge(
                round_index=round_index,
                gateways=charged.gateways,
                steps=charged.steps,
                level=charged.level,
                inputs=hashlib.sha256(f"{charged.inputs} {label}".encode()).hexdigest(),
                afford=afford,
            )
        arrival = replace(charged, event="arrival", attempt=attempt, gateways=arrived, steps=0, inputs=label)
        if arrival not in self._events("arrival", round_index):
            self._append(arrival)
        return attempt

    def extend(self, *, finished: int, rounds: int, level: str, root_commitment: str) -> int:
        """Record that a finished run gets more rounds under a fresh root; return the extension's number."""
        number = self.extensions + 1
        entry = Entry(
            event="extension",
            round=finished,
            attempt=number,
            gateways=(),
            steps=0,
            level=level,
            inputs=root_commitment,
            rounds=rounds,
        )
        if self._entries and replace(self._entries[-1], attempt=number) == entry:
            return self._entries[-1].attempt  # a crash came before anything else was done
        self._append(entry)
        return number

    @property
    def extensions(self) -> int:
        """How often the run was extended."""
        return self._numbers["extension"]

    @property
    def incomplete_rounds(self) -> list[int]:
        """Rounds in which not the whole cohort arrived, at some attempt."""
        return sorted(self._incomplete)

    def charges(self, through: int | None = None) -> Charges:
        """Return what the most charged gateway was charged (the maximum over gateways, as shards are disjoint).

        Args:
            through: Leave out what was charged after the last attempt at this round: a later round that had started
                when a run was cut off is in the ledger before the earlier one is repeated.
        """
        last = len(self._entries)
        while through is not None and last and self._entries[last - 1].round > through:
            last -= 1
        return self._most[last]

    def _record_incarnation(self, round_index: int, level: str) -> None:
        wanted = self._wanted_incarnation
        if wanted is not None and wanted != self._incarnation:
            number = 1 + self._numbers["incarnation"]
            self._append(
                Entry(
                    event="incarnation",
                    round=round_index,
                    attempt=number,
                    gateways=(),
                    steps=0,
                    level=level,
                    inputs=wanted,
                )
            )

    def _events(self, event: str, round_index: int) -> list[Entry]:
        return [entry for entry in self._of_round[round_index] if entry.event == event]

    def _append(self, entry: Entry) -> None:
        if self._path is not None:
            if len(self) == self._read:
                drop_torn_line(self._path)
            append_durably(self._path, entry.line(self.head).encode() + b"\n")
        self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._heads.append(hashlib.sha256(entry.line(self.head).encode()).hexdigest())
        self._of_round[entry.round].append(entry)
        if entry.event == "charge":
            self._tally.add(entry.gateways, entry.steps)
            self._incarnation_of[entry.round, entry.attempt] = self._incarnation
        elif entry.event == "arrival":
            self._incomplete.add(entry.round)
        else:
            self._numbers[entry.event] += 1
        if entry.event == "incarnation":
            self._incarnation = entry.inputs
        self._most.append(self._tally.most())


def read(path: Path) -> Ledger:
    """Read a ledger file; a torn last line (a crash while writing: its round never started) is not counted.

    The file is left as it is, so that what is damaged can still be repaired; see `drop_torn_line`.

    Raises:
        DamagedRunError: A line is not what was written, or one is missing in the middle.
    """
    try:
        complete, newline, _torn = read_regular(path).rpartition(b"\n")
    except OSError as error:
        raise DamagedRunError(f"{path} cannot be read ({error}); restore the file.") from error
    entries: list[Entry] = []
    head = GENESIS
    for number, line in enumerate((complete + newline).split(b"\n")[:-1], start=1):
        try:
            fields: dict[str, Any] = parse_json(line)
            previous = fields.pop("previous")
            entry = Entry(**{**fields, "gateways": tuple(tuple(pair) for pair in fields["gateways"])})
            unchanged = previous == head and entry.line(previous).encode() == line
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedRunError(f"{path}: line {number} is not a ledger line ({error}); restore the file.") from error
        if not unchanged:
            raise DamagedRunError(
                f"{path}: line {number} does not follow from the line before it; lines were changed or lost: "
                "restore the file."
            )
        entries.append(entry)
        head = hashlib.sha256(line).hexdigest()
    return Ledger(path, entries)


def drop_torn_line(path: Path) -> None:
    """Cut a ledger file after its last complete line, before more lines follow."""
    raw = read_regular(path) if path.exists() else b""
    complete = raw.rfind(b"\n") + 1
    if complete < len(raw):
        truncate_durably(path, complete)
