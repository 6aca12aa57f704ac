"""Reads a run's ledger without changing it and counts its charges without the code that wrote it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedray.privacy.accounting import Charges
from fedray.privacy.durable import parse_json, read_regular
from fedray.privacy.ledger import GENESIS
from fedray.rundir.evidence import RunSettings, UntrueError, checkpoint_texts, checkpoints, lines_of, parsed


@dataclass(frozen=True, kw_only=True)
class History:
    """What a ledger charged, line by line.

    Args:
        rounds: The round of each charge.
        sizes: How many gateways each charge names.
        after: What the most charged gateway had been charged after each line.
        torn: Whether a line that a crash cut short follows; its round never started.
        extended: Whether rounds were added to a finished run.
    """

    rounds: tuple[int, ...]
    sizes: tuple[int, ...]
    after: tuple[Charges, ...]
    torn: bool
    extended: bool

    @property
    def charges(self) -> Charges:
        """What the most charged gateway was charged in the whole run."""
        return self.after[-1] if self.after else Charges(steps=0, rounds=0)

    @property
    def summary(self) -> str:
        """The charges in a sentence."""
        torn = " A last line was cut short by a crash: its round never started." if self.torn else ""
        return (
            f"{len(self.rounds)} charges, an unbroken chain; the most charged gateway started {self.charges.steps} local "
            f"steps in {self.charges.rounds} rounds.{torn}"
        )

    def charges_after(self, round_index: int) -> list[Charges]:
        """Return what may have been charged when a round was done: several values when it, or one before, was repeated."""
        if round_index not in self.rounds:
            return []
        first = self.rounds.index(round_index)
        last = max(index for index, number in enumerate(self.rounds) if number <= round_index)
        return list(dict.fromkeys(self.after[first : last + 1]))

    def cohort_sizes(self, round_index: int) -> list[int]:
        """Return how many gateways each attempt at a round was charged to."""
        return [size for number, size in zip(self.rounds, self.sizes, strict=True) if number == round_index]


def read_ledger(path: Path, settings: RunSettings, *, finished: bool) -> History:
    """Return the ledger's charges, counted gateway by gateway.

    Raises:
        UntrueError: A line is damaged, does not follow from the one before, or a checkpoint has seen other lines.
    """
    lines, torn = lines_of(path, "ledger.jsonl", finished)
    num_gateways = int(settings.values["gateways"])
    steps, rounds = np.zeros(num_gateways, np.int64), np.zeros(num_gateways, np.int64)
    heads, numbers, sizes, after = [GENESIS], [], [], []
    incarnations: set[str] = set()
    most, extended = Charges(steps=0, rounds=0), False
    for number, line in enumerate(lines, start=1):
        entry = parsed(line, f"line {number} ")
        if not isinstance(entry, dict) or json.dumps(entry).encode() != line:
            raise UntrueError(f"line {number} is not a ledger line as fedray writes it.")
        if entry.get("previous") != heads[-1]:
            raise UntrueError(f"line {number} does not follow from the line before it: lines were changed or lost.")
        heads.append(hashlib.sha256(line).hexdigest())
        extended |= entry.get("event") == "extension"
        if entry.get("event") == "incarnation":
            _check_incarnation(entry.get("inputs"), number, incarnations, settings)
            incarnations.add(entry["inputs"])
        if entry.get("event") in ("arrival", "extension", "incarnation"):
            continue  # charges nothing
        _check_charge(entry, number, settings)
        for first, last in entry["gateways"]:
            steps[first : last + 1] += entry["steps"]
            rounds[first : last + 1] += 1
            most = Charges(
                steps=max(most.steps, int(steps[first : last + 1].max())),
                rounds=max(most.rounds, int(rounds[first : last + 1].max())),
            )
        numbers.append(entry["round"])
        sizes.append(sum(last - first + 1 for first, last in entry["gateways"]))
        after.append(most)
    _check_checkpoints(path, heads)
    return History(rounds=tuple(numbers), sizes=tuple(sizes), after=tuple(after), torn=torn, extended=extended)


def _check_incarnation(value: Any, number: int, before: set[str], settings: RunSettings) -> None:
    if not isinstance(value, str) or not value or value in before:
        raise UntrueError(f"line {number} must hold an incarnation that no line before it has.")
    if settings.values.get("seed") is not None:
        raise UntrueError(f"line {number} is an incarnation, which a run with a seed has none of; config.json has one.")


def _check_charge(entry: Mapping[str, Any], number: int, settings: RunSettings) -> None:
    if not all(type(entry.get(name)) is int and entry[name] >= 0 for name in ("round", "attempt", "steps")):
        raise UntrueError(f"line {number} must count round, attempt and steps in whole numbers.")
    if entry.get("event", "charge") != "charge":
        raise UntrueError(f"line {number} is an event that this version of fedray does not know: {entry['event']!r}.")
    if entry.get("level") != settings.spec.noise_level:
        raise UntrueError(f"line {number} was charged at level {entry.get('level')!r}; config.json says otherwise.")
    if entry["steps"] != settings.spec.local_steps:
        raise UntrueError(f"line {number} charges {entry['steps']} steps; a round has {settings.spec.local_steps}.")
    ranges, num_gateways, previous = entry.get("gateways"), int(settings.values["gateways"]), -1
    for pair in ranges if isinstance(ranges, list) else ["nonsense"]:
        first, last = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if type(first) is not int or type(last) is not int or not previous < first <= last < num_gateways:
            raise UntrueError(f"line {number} charges {ranges}; these are no ranges of the {num_gateways} gateways.")
        previous = last


def _check_checkpoints(path: Path, heads: list[str]) -> None:
    note = path / "checkpoint" / "ledger.json"
    notes = {file: (checkpoint_texts(file) or {}).get("description", "") for file in checkpoints(path)}
    with contextlib.suppress(OSError):
        notes[note] = read_regular(note).decode(errors="replace")
    for file, text in notes.items():
        try:
            seen = parse_json(text.partition("\n")[0])  # a seal follows
            length, head = seen["length"], seen["head"]
        except (ValueError, TypeError, KeyError):
            continue  # what is damaged there is no evidence; a run goes on from the checkpoint before
        if type(length) is not int or not 0 <= length < len(heads) or heads[length] != head:
            raise UntrueError(f"is not what {file.relative_to(path)} counted: lines were changed or lost.")
