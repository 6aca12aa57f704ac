"""What the files of a run directory say, each on its own: read without changing them, and checked for form.

Knows the files' formats, not whether they agree with each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedray.config.files import check_format
from fedray.config.settings import SETTINGS, RunConfig
from fedray.errors import InputError
from fedray.privacy.durable import open_regular, parse_json, read_regular
from fedray.privacy.levels import level_of
from fedray.privacy.shapes import IndependentNoise
from fedray.privacy.spec import PrivacySpec
from fedray.rundir import manifest

_LEFT_OUT = (
    "target_epsilon",
    "max_epsilon",
    "out",
    "resume",
)  # of no matter once sigma is known; the paths exist by now
_LARGEST_HEADER = 2**26  # bytes, of a safetensors file
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
    def tolerance(self) -> float:
        """By how much, relatively, a recorded epsilon may differ from the one that is computed now.

        0.1.0 had another accountant, also never below the truth, and some 1e-4 apart from this one.
        """
        formats = [self.card.get("format", 1), *self.card.get("earlier_formats", [])]
        return 1e-3 if 1 in formats else 1e-6

    @property
    def summary(self) -> str:
        """The settings that decide about privacy, in a sentence."""
        spec = self.spec
        if not level_of(spec).is_private:
            return "none level, no noise."
        return (
            f"{spec.noise_level} level, sigma = {spec.noise_multiplier:.6g}, q = {spec.sample_rate:.6g}, "
            f"{spec.local_steps} local steps a round, delta = {spec.delta:g}."
        )


def is_finished(path: Path) -> bool:
    """Return whether a run ended: it has a manifest, or had one (a card, and no key to go on with).

    Raises:
        InputError: The path is no run directory.
    """
    if not any((path / name).is_file() for name in manifest.FILES):
        raise InputError(f"{path} is no run directory (it holds none of {', '.join(manifest.FILES)}); name one.")
    if (path / manifest.NAME).exists():
        return True
    texts = [checkpoint_texts(file) for file in checkpoints(path)]
    return (path / "privacy.json").exists() and all(found is not None and "round_key" not in found for found in texts)


def checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run directory, oldest first."""
    return sorted((path / "checkpoint").glob("0*.safetensors"))


def checkpoint_texts(file: Path) -> dict[str, str] | None:
    """Return the texts that a checkpoint holds beside the parameters; None when it is damaged."""
    try:
        with open_regular(file, os.O_RDONLY) as opened:
            header = parse_json(opened.read(min(int.from_bytes(opened.read(8), "little"), _LARGEST_HEADER)))
        texts = header.get("__metadata__") or {}
    except (OSError, ValueError, AttributeError):
        return None
    return texts if isinstance(texts, dict) else None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of the run directory.

    Raises:
        UntrueError: It is missing or none.
    """
    found = parsed(bytes_of(path, name), "")
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
    if manifest.as_bytes(found) != bytes_of(path, manifest.NAME):
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
    check_format(card, f"{path}")
    known = set(SETTINGS)
    if set(values) - known or _ESSENTIAL - set(values):
        name = sorted((set(values) - known) | (_ESSENTIAL - set(values)))[0]
        raise UntrueError(f"{name!r} is missing, or is no setting of this version of fedray.")
    if type(records) is not int or records < 1:
        raise UntrueError(f"nominal_records is {records!r}; it must be a whole number of at least 1.")
    try:
        config = RunConfig().resolve(**{name: value for name, value in values.items() if name not in _LEFT_OUT})
    except (InputError, TypeError) as error:
        raise UntrueError(f"holds a setting that no run has: {error}") from error
    if config.training.batch_size > records:
        raise UntrueError(f"batch_size is {config.training.batch_size} but nominal_records is {records}.")
    least = card.get("least_noise_scale", 1.0)
    if not is_number(least) or least <= 0 or (least != 1 and config.privacy.noise_shape == "independent"):
        raise UntrueError(f"least_noise_scale is {least!r}, which {config.privacy.noise_shape} noise does not have.")
    spec = config.spec(records, noise_shape=IndependentNoise(least=float(least)))
    return RunSettings(values=values, card=card, spec=spec)


def read_metrics(path: Path, *, finished: bool) -> list[dict[str, Any]]:
    """Return the rounds' records.

    Raises:
        UntrueError: A record is damaged, or rounds are not consecutive.
    """
    lines, _ = lines_of(path, "metrics.jsonl", finished)
    records = []
    for number, line in enumerate(lines, start=1):
        record = parsed(line, f"line {number} ")
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
    file = path / "model.safetensors"
    try:
        with (
            open_regular(file, os.O_RDONLY),
            safe_open(file, "numpy") as opened,
        ):  # which reads what it is asked for alone
            shapes = [opened.get_slice(name).get_shape() for name in list(opened.keys())]
    except OSError as error:
        raise UntrueError(f"is missing or cannot be read ({error.strerror or error}).") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UntrueError(f"cannot be read ({error}).") from error
    return f"can be read: {len(shapes)} tensors, {sum(map(math.prod, shapes)):,} values."


def lines_of(path: Path, name: str, finished: bool) -> tuple[list[bytes], bool]:
    """Return the complete lines of a file, and whether a torn one follows, which only an unfinished run may have.

    Raises:
        UntrueError: The file is missing, or a finished run's ends in the middle of a line.
    """
    complete, _, torn = bytes_of(path, name).rpartition(b"\n")
    if torn and finished:
        raise UntrueError("ends in the middle of a line.")
    return complete.split(b"\n") if complete else [], bool(torn)


def bytes_of(path: Path, name: str) -> bytes:
    """Return a file's bytes.

    Raises:
        UntrueError: It is missing or cannot be read.
    """
    try:
        return read_regular(path / name)
    except OSError as error:
        raise UntrueError(f"is missing or cannot be read ({error.strerror or error}).") from error


def parsed(data: bytes, where: str) -> Any:
    """Return a JSON value.

    Args:
        data: Its text.
        where: What the message names, such as "line 3 ".

    Raises:
        UntrueError: It is no JSON.
    """
    try:
        return parse_json(data)
    except ValueError as error:
        raise UntrueError(f"{where}is not JSON ({error}).") from error
