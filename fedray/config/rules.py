"""What a setting may be, declared once where the setting is: its kind, its rule, and the words for both.

A field's annotation says all of it (`lr: Positive = 0.02`); flags, TOML, config.json and Python values are held against it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fedray.errors import InputError


@dataclass(frozen=True)
class Rule:
    """What the values of a setting have in common.

    Args:
        words: Goes on after "it must be".
        holds: Tells whether a value keeps the rule; a TypeError counts as no.
    """

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int, below: float = math.inf) -> bool:
    """Tell whether a value is a whole number of at least `least` and below `below`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def count(largest: int, least: int = 1) -> Rule:
    """Return the rule of a number of things; what is larger than any run would otherwise fail late, in other words."""
    return Rule(
        f"a whole number of at least {least} and at most {largest:,}", lambda v: is_whole(v, least, largest + 1)
    )


Count = Annotated[int, count(10**6)]
CountFromZero = Annotated[int, count(10**6, least=0)]
Gateways = Annotated[int, count(10**7)]
Records = Annotated[int, count(10**9)]
Mebibytes = Annotated[int, count(10**9)]
Positive = Annotated[float, Rule("a positive, finite number", lambda value: is_number(value) and value > 0)]
Share = Annotated[
    float, Rule("a number above 0 and at most 1", lambda value: is_number(value) and 2.0**-32 <= value <= 1)
]
Scale = Annotated[
    float, Rule("a number between 1e-15 and 1e15", lambda value: is_number(value) and 1e-15 <= value <= 1e15)
]
Delta = Annotated[
    float, Rule("a number between 1e-15 and 1 (exclusive)", lambda value: is_number(value) and 1e-15 < value < 1)
]
NoiseMultiplier = Annotated[
    float,
    Rule(
        "a number between 0.001 and 1e6 (for no noise at all use --noise-level none)",
        lambda value: is_number(value) and 1e-3 <= value <= 1e6,
    ),
]
Seed = Annotated[int, Rule("a whole number between 0 and 2^63 - 1", lambda value: is_whole(value, 0, below=2**63))]


def _is_path(value: Any) -> bool:
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return isinstance(value, Path) and "\0" not in text and not text.startswith("~") and value.name not in ("", "..")


RunPath = Annotated[Path, Rule("a path with a name, of Unicode text and without ~, which no shell replaced", _is_path)]


Address = Annotated[str, Rule("an address such as host:port", lambda value: isinstance(value, str) and value != "")]


def text(words: str) -> Rule:
    """Return the rule of a setting that is text of a certain form; whoever reads it checks the form."""
    return Rule(words, lambda value: isinstance(value, str))


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One setting as it was declared.

    Args:
        kind: bool, int, float, str or Path.
        choices: Words that it may be beside, or instead of, a value of its kind.
        rule: That a value of its kind keeps; None where any value of the kind will do.
        optional: Whether it may be None.
    """

    kind: type
    choices: tuple[str, ...]
    rule: Rule | None
    optional: bool

    @property
    def words(self) -> str:
        """What a value must be."""
        if self.kind is bool:
            return "true or false"
        if self.rule is None:
            return "a path" if self.kind is Path else "one of " + ", ".join(self.choices)
        return " or ".join([*self.choices, self.rule.words])

    def holds(self, value: Any) -> bool:
        """Tell whether a value from Python keeps the declaration."""
        if value is None:
            return self.optional
        if isinstance(value, str) and value in self.choices:
            return True
        if self.rule is None:
            return not self.choices and isinstance(value, self.kind)
        try:
            return self.rule.holds(value)
        except TypeError:
            return False

    def fits(self, value: object, *, from_text: bool = False) -> bool:
        """Tell whether a value of a file, or text of the command line, is of the declared kind; rules come later.

        Args:
            value: As the file's format or the command line gave it.
            from_text: Whether it is text that stands for a number.
        """
        if value in self.choices or self.kind is bool:
            return isinstance(value, str | bool) and (value in self.choices or isinstance(value, bool))
        if self.kind not in (int, float):
            return isinstance(value, str) and not (self.rule is None and self.choices)
        if from_text:
            try:
                self.kind(str(value))
            except ValueError:
                return False
            return str(value).isascii()  # other scripts have digits, too
        return isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)


@cache
def declarations(group: Any) -> dict[str, Declaration]:
    """Return the declarations of the fields of a dataclass, by name."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: _declaration(hints[field.name]) for field in dataclasses.fields(group)}


def _declaration(hint: Any) -> Declaration:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind, rule, choices = str, None, ()
    for part in parts:
        if get_origin(part) is Literal:
            choices = get_args(part)
        elif get_origin(part) is Annotated:
            kind, rule = get_args(part)
        elif part is not NoneType:
            kind = part
    return Declaration(kind=kind, choices=choices, rule=rule, optional=NoneType in parts)


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def check(settings: Any) -> None:
    """Check the fields of a group of settings, each on its own.

    Raises:
        InputError: A value breaks its rule.
    """
    group: Any = type(settings)
    for name, declared in declarations(group).items():
        value = getattr(settings, name)
        if not declared.holds(value):
            objects = (
                ": objects go to Orchestrator itself" if declared.kind is str and not isinstance(value, str) else ""
            )
            raise InputError(f"{flag(name)} is {value!r}; it must be {declared.words}{objects}.")
