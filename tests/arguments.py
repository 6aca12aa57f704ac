"""Arguments of a job with some of them changed: the command line refuses a flag that is given twice."""

from __future__ import annotations

from collections.abc import Sequence


def changed(base: Sequence[str], *more: str) -> list[str]:
    """Return arguments `--name value …` with others in place of, or after, those of the same name."""
    names = {flag for flag in more if flag.startswith("--")}
    kept: list[str] = []
    dropping = False
    for argument in base:
        if argument.startswith("--"):
            dropping = argument in names
        if not dropping:
            kept.append(argument)
    return [*kept, *more]
