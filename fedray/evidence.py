"""What the files of a run directory say, each on its own: read without changing them, and checked for form.

Knows the files' formats, not whether they agree with each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedray import manifest
from fedray.config import RunConfig
from fedray.errors import InputError
from fedray.privacy.accounting import Charges
from fedray.privacy.ledger import GENESIS
from fedray.privacy.spec import PrivacySpec

_LEFT_OUT = (
    "target_epsilon",
    "max_epsilon",
    "out",
    "resume",
)  # of no matter once sigma is known; the paths exist by now
_ESSENTIAL = {
    "noise_level",
    "noise_multiplier",
    "clip_norm",
    "delta",
    "batch_size",
    "local_steps",
    "gateways",
    "weights",
}


class UntrueError(Exception):
    """A file is damaged or says what cannot be; the message goes on after the file's name."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """config.json: the settings by name, and the public constants that follow from them."""

    values: Mapping[str, Any]
    card: Mapping[str, Any]
    spec: PrivacySpec

    @property
    def summary(self) -> str:
        """The settings that decide about privacy, in a sentence."""
        spec = self.spec
        if spec.noise_level == "none":
            return "none level, no noise."
        return (
            f"{spec.noise_level} level, sigma = {spec.noise_multiplier:.6g}, q = {spec.sample_rate:.6g}, "
            f"{spec.local_steps} local steps a round, delta = {spec.delta:g}."
        )


@dataclass(frozen=True, kw_only=True)
class History:
    """The ledger, line by line.

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


def is_finished(path: Path) -> bool:
    """Return whether a run ended: it has a manifest, or had one (a card, and no key to go on with).

    Raises:
        InputError: The path is no run directory.
    """
    if not any((path / name).is_file() for name in manifest.FILES):
        raise InputError(f"{path} is no run directory (it holds none of {', '.join(manifest.FILES)}); name one.")
    if (path / manifest.NAME).exists():
        return True
    return (path / "privacy.json").exists() and not list((path / "checkpoint").glob("*/*key"))


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of the run directory.

    Raises:
        UntrueError: It is missing or none.
    """
    found = _parsed(_bytes(path, name), "")
    if not isinstance(found, dict):
        raise UntrueError("is no JSON object.")
    return found


def read_manifest(path: Path) -> dict[str, str]:
    """Return the digests that the manifest lists.

    Raises:
        UntrueError: It is missing, or was not written by fedray like this.
    """
    found = read_object(path, manifest.NAME)
    digests = found.get("sha256")
    if not isinstance(digests, dict) or sorted(digests) != sorted(manifest.FILES):
        raise UntrueError(f"must list the digests of {', '.join(manifest.FILES)}.")
    if manifest.as_bytes(found) != _bytes(path, manifest.NAME):
        raise UntrueError("was changed after it was written.")
    return {str(name): str(value) for name, value in digests.items()}


def read_settings(path: Path) -> RunSettings:
    """Return the settings in config.json.

    Raises:
        UntrueError: It is missing, or a setting is missing or breaks a rule.
    """
    card = read_object(path, "config.json")
    values, records = card.get("config"), card.get("nominal_records")
    if not isinstance(values, dict):
        raise UntrueError("has no config.")
    known = {field.name for field in fields(RunConfig)}
    if set(values) - known or _ESSENTIAL - set(values):
        name = sorted((set(values) - known) | (_ESSENTIAL - set(values)))[0]
        raise UntrueError(f"{name!r} is missing, or is no setting of this version of fedray.")
    if type(records) is not int or records < 1:
        raise UntrueError(f"nominal_records is {records!r}; it must be a whole number of at least 1.")
    try:
        config = RunConfig(**{name: value for name, value in values.items() if name not in _LEFT_OUT})
    except (InputError, TypeError) as error:
        raise UntrueError(f"holds a setting that no run has: {error}") from error
    if config.batch_size > records:
        raise UntrueError(f"batch_size is {config.batch_size} but nominal_records is {records}.")
    spec = PrivacySpec(
        noise_level=config.noise_level,
        noise_multiplier=1.0 if config.noise_multiplier is None else config.noise_multiplier,
        clip_norm=config.clip_norm,
        delta=config.delta,
        batch_size=config.batch_size,
        sample_rate=config.batch_size / records,
        local_steps=config.local_steps,
        expected_cohort=config.gateways * config.participation,
        weights=config.weights,
        participation=config.participation,
        arrival_may_depend_on_data=config.on_failure == "drop",
    )
    return RunSettings(values=values, card=card, spec=spec)


def read_ledger(path: Path, settings: RunSettings, *, finished: bool) -> History:
    """Return the ledger's charges, counted gateway by gateway.

    Raises:
        UntrueError: A line is damaged, does not follow from the one before, or a checkpoint has seen other lines.
    """
    lines, torn = _lines(path, "ledger.jsonl", finished)
    num_gateways = int(settings.values["gateways"])
    steps, rounds = np.zeros(num_gateways, np.int64), np.zeros(num_gateways, np.int64)
    heads, numbers, sizes, after = [GENESIS], [], [], []
    most, extended = Charges(steps=0, rounds=0), False
    for number, line in enumerate(lines, start=1):
        entry = _parsed(line, f"line {number} ")
        if not isinstance(entry, dict) or json.dumps(entry).encode() != line:
            raise UntrueError(f"line {number} is not a ledger line as fedray writes it.")
        if entry.get("previous") != heads[-1]:
            raise UntrueError(f"line {number} does not follow from the line before it: lines were changed or lost.")
        heads.append(hashlib.sha256(line).hexdigest())
        extended |= entry.get("event") == "extension"
        if entry.get("event") in ("arrival", "extension"):
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
    for file in sorted((path / "checkpoint").glob("[0-9]*/state.json")):
        try:
            state = json.loads(file.read_bytes())
            length, head = state["ledger_length"], state["ledger_head"]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a damaged checkpoint is no evidence; a run goes on from the one before
        if not isinstance(length, int) or not 0 <= length < len(heads) or heads[length] != head:
            raise UntrueError(
                f"is not the ledger that checkpoint {file.parent.name} has seen: lines were changed or lost."
            )


def read_metrics(path: Path, *, finished: bool) -> list[dict[str, Any]]:
    """Return the rounds' records.

    Raises:
        UntrueError: A record is damaged, or rounds are not consecutive.
    """
    lines, _ = _lines(path, "metrics.jsonl", finished)
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line, f"line {number} ")
        if not isinstance(record, dict) or record.get("round") != number:
            raise UntrueError(f"line {number} is not round {number}: rounds must be consecutive.")
        if not isinstance(record.get("epsilon"), dict) or not is_number(record.get("samples_per_s")):
            raise UntrueError(f"line {number} has no epsilon or no samples_per_s.")
        accuracy, loss, seconds = record.get("accuracy"), record.get("loss"), record.get("seconds")
        if accuracy is not None and not (is_number(accuracy) and 0 <= accuracy <= 1):
            raise UntrueError(f"line {number}: accuracy is {accuracy!r}; it must lie between 0 and 1.")
        if loss is not None and not is_number(loss):
            raise UntrueError(f"line {number}: loss is {loss!r}; it must be a number.")
        if not isinstance(seconds, dict) or not all(is_number(value) and value >= 0 for value in seconds.values()):
            raise UntrueError(f"line {number}: seconds must be numbers.")
        # Scoring may lie beside the round, while gateways train the next one; all else adds up to the total.
        beside, total = seconds.get("evaluate", 0.0), seconds.get("total", 0.0)
        excess = sum(value for phase, value in seconds.items() if phase not in ("total", "evaluate")) - total
        if total <= 0 or min(abs(excess), abs(excess + beside)) > 1e-6 * len(seconds):
            raise UntrueError(f"line {number}: the seconds of the phases do not fit their total.")
        records.append(record)
    return records


def read_model(path: Path) -> str:
    """Return a sentence about the final model.

    Raises:
        UntrueError: It cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(_bytes(path, "model.safetensors"))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UntrueError(f"cannot be read ({error}).") from error
    return f"can be read: {len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values()):,} values."


def _lines(path: Path, name: str, finished: bool) -> tuple[list[bytes], bool]:
    """Return the complete lines of a file, and whether a torn one follows (which only an unfinished run may have)."""
    complete, _, torn = _bytes(path, name).rpartition(b"\n")
    if torn and finished:
        raise UntrueError("ends in the middle of a line.")
    return complete.split(b"\n") if complete else [], bool(torn)


def _bytes(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise UntrueError(f"is missing or cannot be read ({error.strerror}).") from error


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UntrueError(f"{where}is not JSON ({error}).") from error
