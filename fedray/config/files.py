"""--config: settings from a TOML file, or from the config.json of a run."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedray.config.rules import flag
from fedray.config.settings import GROUP_OF, GROUPS, SETTINGS
from fedray.errors import InputError
from fedray.privacy.durable import parse_json, read_regular

_LARGEST = 2**20  # bytes
_OF_ONE_RUN = ("out", "resume", "dry_run")  # a run like another one has a directory of its own


def settings_in(path: Path) -> dict[str, Any]:
    """Return the settings of a file, by name, their kinds checked.

    TOML takes settings by themselves (`gateways = 4`) and in their groups (`[federation]`). Of a run's config.json come the
    settings that a run like it would be started with: without its directory, and with its target epsilon where it had one.

    Raises:
        InputError: The file cannot be read, or holds what is no setting.
    """
    try:
        text = read_regular(path, _LARGEST, follow=True).decode()
        values = parse_json(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, tomllib.TOMLDecodeError):
            raise InputError(f"--config {path} is not TOML ({error}); write one `name = value` a line.") from error
        raise InputError(
            f"--config {path} cannot be read ({error}); name a readable TOML file, or a run's config.json."
        ) from error
    if isinstance(values.get("config"), Mapping):
        check_format(values, f"--config {path}")
        values = _repeatable(values["config"])
    return _flat(values, path)


FORMAT = 2
"""Of run directories. 1 (without a number): 0.1.0. 2: settings of the seams, state of the server in checkpoints."""


def check_format(card: Mapping[str, Any], name: str) -> None:
    """Refuse a run directory that a newer fedray wrote.

    Args:
        card: Content of its config.json.
        name: What the message calls it.

    Raises:
        InputError: It is newer, or its number is none.
    """
    number = card.get("format", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(
            f"{name} has the format {number!r}; it must be a whole number of at least 1: restore the file."
        )
    if number > FORMAT:
        versions = card.get("versions")
        writer = f" by fedray {versions.get('fedray')}" if isinstance(versions, Mapping) else ""
        raise InputError(
            f"{name} was written{writer} in format {number}, and this fedray reads formats up to {FORMAT}: use a newer fedray."
        )


def upgraded(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a run that goes on in this version's format; it tells which ones it was written in before."""
    before = card.get("format", 1)
    if before == FORMAT:
        return dict(card)
    return {**card, "format": FORMAT, "earlier_formats": [*card.get("earlier_formats", []), before]}


def _repeatable(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if value is not None and name not in _OF_ONE_RUN}
    if "target_epsilon" in found:
        found.pop("noise_multiplier", None)  # follows from it
    return found


def _flat(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        inner = {name: value}
        if name in GROUPS and isinstance(value, Mapping):
            inner = {one.replace("-", "_"): item for one, item in value.items()}
        for setting, item in inner.items():
            if setting not in SETTINGS:
                raise InputError(
                    f"--config {path}: {setting} is no setting{nearest(setting)}; see --help for the names."
                )
            if name in GROUPS and GROUP_OF[setting] != name:
                raise InputError(
                    f"--config {path}: {setting} stands under [{name}]; it belongs under [{GROUP_OF[setting]}], or above all."
                )
            if setting in found:
                raise InputError(f"--config {path} gives {setting} twice; leave one out.")
            if not SETTINGS[setting].fits(item):
                raise InputError(f"--config {path}: {setting} is {item!r}; it must be {SETTINGS[setting].words}.")
            found[setting] = item
    return found


def nearest(name: str) -> str:
    """Return a hint at the flag that a misspelt one resembles, or nothing."""
    found = difflib.get_close_matches(name.removeprefix("--").replace("-", "_"), ["config", *SETTINGS], n=1)
    return f" (did you mean {flag(found[0])}?)" if found else ""
