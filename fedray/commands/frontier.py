"""`python -m fedray frontier [every flag of a run] --noise-multipliers 0.5,1,2 --seeds 0,1 --levels sample,gateway`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fedray.commands.arguments import Arguments
from fedray.commands.cli import parse
from fedray.commands.output import new_output, write_output
from fedray.config.rules import flag
from fedray.config.settings import RunConfig
from fedray.errors import InputError
from fedray.privacy.levels import LEVELS
from fedray.privacy.spec import NoiseLevelName

if TYPE_CHECKING:
    from fedray.commands.sweep import Outcome

Value = TypeVar("Value")
_DESCRIPTION = """Trains one run for each level, noise and seed, as Ray tasks (one after the other with --pool inline), draws
accuracy against epsilon with error bars, one curve a level, and writes frontier.json and sweep.png. Besides its own flags
it takes every flag of a run (python -m fedray --help); --out names the directory (default: runs/<UTC time>-frontier).
Tuning on private data is not covered by any run's epsilon.
Exit codes: 0 done, 1 a run failed, 2 bad input."""


def main(arguments: list[str]) -> int:
    """Sweep, print the table, write files and return the exit code.

    Raises:
        InputError: The arguments break a rule, a run would not start, or matplotlib is missing.
        FedrayError: A run failed.
    """
    parser = Arguments(prog="python -m fedray frontier", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--noise-multipliers", metavar="LIST", help="sigmas, such as 0.5,1,2")
    parser.add_argument("--target-epsilons", metavar="LIST", help="epsilons to calibrate sigma for, such as 1,4,8")
    parser.add_argument("--seeds", metavar="LIST", default="0,1", help="seeds of the runs (default: 0,1)")
    parser.add_argument("--levels", metavar="LIST", help="noise levels (default: the run's --noise-level)")
    own, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    _check(config)
    noises = _list(own.noise_multipliers, "--noise-multipliers", float, "positive numbers")
    targets = _list(own.target_epsilons, "--target-epsilons", float, "positive numbers")
    seeds = _list(own.seeds, "--seeds", int, "whole numbers")
    levels = _list(own.levels, "--levels", _level, "of " + ", ".join(LEVELS)) or [config.privacy.noise_level]
    if bool(noises) == bool(targets) and levels != ["none"]:
        raise InputError("give either --noise-multipliers or --target-epsilons, such as --noise-multipliers 0.5,1,2.")
    if not seeds:
        raise InputError("--seeds is empty; it must be whole numbers, separated by commas.")

    from fedray.commands import sweep
    from fedray.orchestrator.preparing import UserParts, prepare
    from fedray.reports import pictures
    from fedray.rundir import cards  # torch takes seconds to import: --help answers without it

    pictures.new_figure(1, 1)  # matplotlib is missed now rather than after all runs
    configs = sweep.configs_of(config, levels, noises, targets, seeds)
    for level in levels:
        prepare(next(one for one in configs if one.privacy.noise_level == level), UserParts())
    start, count = time.perf_counter(), 0

    def done(outcome: Outcome) -> None:
        nonlocal count
        count += 1
        if not config.run.quiet:
            sigma = "" if outcome.noise_multiplier is None else f" sigma {outcome.noise_multiplier:.4g}"
            print(
                f"run {count}/{len(configs)}  {outcome.level}{sigma} seed {outcome.seed}  accuracy {outcome.accuracy:.4f}  "
                f"{outcome.seconds:.1f} s",
                flush=True,
            )

    outcomes = sweep.sweep(configs, config.machine.pool == "inline", done)
    points = sweep.points_of(outcomes)
    path = new_output(config, "frontier")
    text = json.dumps(sweep.card(config, outcomes, cards.versions()), indent=2, allow_nan=False) + "\n"
    write_output(path, {"frontier.json": text.encode(), "frontier.png": sweep.picture(points)})
    for line in sweep.table_lines(points):
        print(line)
    print(sweep.NOTE)
    print(f"{len(configs)} runs in {time.perf_counter() - start:.0f} s; files: {path}")
    return 0


def _check(config: RunConfig) -> None:
    for name in ("noise_multiplier", "target_epsilon", "seed"):
        if config.as_dict()[name] is not None:
            raise InputError(f"{flag(name)} does not go with frontier, which sweeps it; give {flag(name)}s, a list.")
    if config.run.dry_run or config.run.resume is not None:
        raise InputError("--dry-run and --resume do not go with frontier; leave them out.")


def _list(text: str | None, flag: str, kind: Callable[[str], Value], rule: str) -> list[Value]:
    try:
        return [] if text is None else [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}; it must be {rule}, separated by commas.") from error


def _level(text: str) -> NoiseLevelName:
    for name in LEVELS:
        if name == text:
            return name
    raise ValueError(text)
