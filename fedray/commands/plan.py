"""`python -m fedray plan`: what privacy costs, before anything is trained."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from fedray.commands.arguments import Arguments
from fedray.config.rules import flag
from fedray.config.settings import RunConfig
from fedray.errors import InputError

if TYPE_CHECKING:
    from fedray.privacy.levels import Claim
    from fedray.privacy.planning import Setting, Unknown
    from fedray.privacy.spec import NoiseLevelName, WeightsName

_LEVELS: tuple[NoiseLevelName, ...] = ("sample", "batch", "gateway")
_EPSILONS = (1.0, 4.0, 8.0)
_SOLVABLE = ("noise_multiplier", "rounds", "records", "batch_size", "local_steps", "participation")
_DESCRIPTION = """Answers before any training, for each noise level, unit and adjacency. Without arguments: what each level
costs at epsilon 1, 4 and 8 for the default job. Without --epsilon: epsilon of the described run, and the noise for 1, 4 and 8.
With --epsilon: the first of noise multiplier, rounds, records, batch size, local steps and participation that is not given
(or the one that --solve names) is solved for. Unknowns that are not solved for take the default job's value."""
_MEANINGS = {
    "noise_multiplier": "the smallest noise multiplier",
    "rounds": "the largest number of rounds",
    "records": "the smallest nominal shard size, in records",
    "batch_size": "the largest batch size",
    "local_steps": "the largest number of local steps a round",
    "participation": "the largest participation",
}


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A title, the head of each column, and the cells of each row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def main(arguments: list[str]) -> int:
    """Print the plan and return the exit code.

    Raises:
        InputError: An argument breaks a rule, or nothing is left to solve for.
    """
    given = _parser().parse_args(arguments)
    unknown = _unknown(given)
    settings = _settings(given, unknown)
    if given.epsilon is None:
        tables = [_costs(settings)]
    elif unknown == "noise_multiplier":
        tables = _noise(settings, given.epsilon)
    else:
        tables = [_solved(settings, given.epsilon, unknown)]
    _show(_job(settings[0], unknown, level=given.noise_level), tables, _notes(settings, unknown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="python -m fedray plan", description=_DESCRIPTION)
    parser.add_argument("--noise-level", choices=["all", *_LEVELS], default="all", help="which level (default: all)")
    parser.add_argument("--epsilon", type=float, nargs="+", help="the epsilon to end at; several give a column each")
    parser.add_argument(
        "--noise-multiplier", "--sigma", type=float, help="noise standard deviation over the clip norm (1)"
    )
    parser.add_argument("--rounds", type=int, help="rounds (10)")
    parser.add_argument("--local-steps", type=int, help="local steps of each gateway in a round (16)")
    parser.add_argument("--batch-size", type=int, help="expected size of a Poisson batch, in records (64)")
    parser.add_argument("--records", "--samples-per-gateway", type=int, help="nominal shard size, in records (4096)")
    parser.add_argument("--gateways", type=int, default=16, help="how many gateways there are (16)")
    parser.add_argument("--participation", type=float, help="chance of a gateway to take part in a round (1)")
    parser.add_argument("--delta", type=float, default=1e-5, help="delta of every guarantee (1e-5)")
    parser.add_argument("--weights", choices=["uniform", "records"], default="uniform", help="how updates are averaged")
    parser.add_argument("--solve", choices=[name.replace("_", "-") for name in _SOLVABLE], help="what to solve for")
    return parser


def _unknown(given: argparse.Namespace) -> Unknown:
    """Return what is to be solved for.

    Raises:
        InputError: The arguments leave nothing, or contradict each other.
    """
    named = None if given.solve is None else given.solve.replace("-", "_")
    if given.epsilon is None:
        if named is not None:
            raise InputError(f"--solve {given.solve} needs --epsilon: say which epsilon the run may end at.")
        return "epsilon"
    for epsilon in given.epsilon:
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise InputError(f"--epsilon is {epsilon:g}; it must be a positive, finite number.")
    if named is not None and getattr(given, named) is not None:
        raise InputError(
            f"--solve {given.solve} and {flag(named)} {getattr(given, named):g} exclude each other; leave one out."
        )
    free = [name for name in _SOLVABLE if getattr(given, name) is None]
    if not free:
        raise InputError(
            f"--epsilon and all of {', '.join(map(flag, _SOLVABLE))} are given; leave out the one to solve for."
        )
    return cast("Unknown", named or free[0])


def _settings(given: argparse.Namespace, unknown: Unknown) -> list[Setting]:
    """Return the described run, once a level.

    Raises:
        InputError: A value breaks a rule.
    """
    from fedray.privacy.planning import (  # numpy-free, but the accountant: --help answers without it
        LARGEST_RECORDS,
        Setting,
    )

    values = {name: getattr(given, name) for name in _SOLVABLE if getattr(given, name) is not None}
    levels: tuple[NoiseLevelName, ...] = _LEVELS if given.noise_level == "all" else (given.noise_level,)
    found = []
    for level in levels:
        weights: WeightsName = "uniform" if given.noise_level == "all" and level == "gateway" else given.weights
        setting = Setting(noise_level=level, gateways=given.gateways, delta=given.delta, weights=weights, **values)
        if setting.records > LARGEST_RECORDS:
            raise InputError(f"--records is {setting.records}; it must be at most {LARGEST_RECORDS:,}.")
        RunConfig().resolve(  # the rules of a run's own settings hold here as well
            noise_level=setting.noise_level,  # never "none" here
            noise_multiplier=setting.noise_multiplier,
            rounds=setting.rounds,
            local_steps=setting.local_steps,
            batch_size=setting.batch_size,
            samples_per_gateway=setting.records,
            gateways=setting.gateways,
            participation=setting.participation,
            delta=setting.delta,
            weights=setting.weights,
        )
        if unknown not in ("records", "batch_size") and setting.batch_size > setting.records:
            raise InputError(
                f"--batch-size is {setting.batch_size} but the nominal shard size is {setting.records} records "
                f"(q would be {setting.batch_size / setting.records:.3g} > 1); lower it, or raise --records."
            )
        found.append(setting)
    return found


def _claims(settings: Iterable[Setting]) -> Iterable[tuple[Setting, int, Claim]]:
    for setting in settings:
        for index, claim in enumerate(setting.claims):
            yield setting, index, claim


def _costs(settings: Sequence[Setting]) -> _Table:
    from fedray.privacy.planning import solve
    from fedray.rundir.cards import format_epsilon

    rows = []
    for setting, index, claim in _claims(settings):
        noise = [_cell("noise_multiplier", solve(setting, index, "noise_multiplier", epsilon)) for epsilon in _EPSILONS]
        cost = format_epsilon(setting.epsilon(index))
        mu = setting.mu(index)
        curve = "–" if mu is None else format_epsilon(mu)
        average = f"{setting.noise_on_average:.3g}"
        rows.append([setting.noise_level, claim.unit, claim.adjacency, cost, curve, average, *noise])
    sigma = settings[0].noise_multiplier
    head = [
        "level",
        "unit",
        "adjacency",
        f"epsilon at sigma {sigma:g}",
        "mu",
        "noise",
        *(f"sigma for {e:g}" for e in _EPSILONS),
    ]
    return _Table(title="what each level costs, and the noise multiplier for epsilon 1, 4 and 8", head=head, rows=rows)


def _noise(settings: Sequence[Setting], epsilons: Sequence[float]) -> list[_Table]:
    """Return the noise multipliers, and the noise that they leave on the average."""
    from fedray.privacy.planning import solve

    sigmas, noises = [], []
    for setting, index, claim in _claims(settings):
        found = [solve(setting, index, "noise_multiplier", epsilon) for epsilon in epsilons]
        name = [setting.noise_level, claim.unit, claim.adjacency]
        sigmas.append([*name, *(_cell("noise_multiplier", sigma) for sigma in found)])
        left = [sigma and replace(setting, noise_multiplier=sigma).noise_on_average for sigma in found]
        noises.append([*name, *("–" if noise is None else f"{noise:.3g}" for noise in left)])
    head = ["level", "unit", "adjacency", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    return [
        _Table(title=_MEANINGS["noise_multiplier"], head=head, rows=sigmas),
        _Table(title="the noise that it leaves", head=head, rows=noises),
    ]


def _solved(settings: Sequence[Setting], epsilons: Sequence[float], unknown: Unknown) -> _Table:
    from fedray.privacy.planning import solve

    rows = [
        [setting.noise_level, claim.unit, claim.adjacency]
        + [_cell(unknown, solve(setting, index, unknown, epsilon)) for epsilon in epsilons]
        for setting, index, claim in _claims(settings)
    ]
    head = ["level", "unit", "adjacency", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    return _Table(title=_MEANINGS[unknown], head=head, rows=rows)


def _cell(unknown: str, value: float | None) -> str:
    """Return a value rounded so that it still holds: noise up, participation down."""
    from fedray.rundir.cards import format_epsilon

    if value is None:
        return "none"
    if value in (0, math.inf):
        return "any"
    if unknown == "noise_multiplier":
        return format_epsilon(value)
    if unknown == "participation":
        digits = 2 - math.floor(math.log10(value))
        return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"
    return f"{value:.0f}"


def _job(setting: Setting, unknown: Unknown, level: str) -> str:
    parts = {
        "gateways": f"{setting.gateways} gateways",
        "participation": f"participation {setting.participation:g}" if setting.participation < 1 else "",
        "rounds": f"{setting.rounds} rounds",
        "local_steps": f"{setting.local_steps} local steps",
        "batch_size": f"batch size {setting.batch_size}",
        "records": f"{setting.records} records a gateway",
        "noise_multiplier": f"sigma {setting.noise_multiplier:g}",
        "delta": f"delta {setting.delta:g}",
    }
    known = [text for name, text in parts.items() if text and name != unknown]
    return f"{'all levels' if level == 'all' else level + ' level'}: {', '.join(known)}"


def _notes(settings: Sequence[Setting], unknown: Unknown) -> list[str]:
    from fedray.rundir.cards import delta_warnings

    observers: dict[str, list[str]] = {}
    for setting in settings:
        observers.setdefault(setting.claims[0].observer, []).append(setting.noise_level)
    notes = [f"{', '.join(levels)}: against {observer}." for observer, levels in observers.items()]
    notes.append(
        "noise: its standard deviation on a coordinate of the average of one local step (gateway: of one round), in C."
    )
    if unknown == "epsilon":
        notes.append(
            "mu: of the whole Gaussian curve, from which epsilon follows at every delta; –: it is no Gaussian's."
        )
    notes.append("any: it does not matter. none: no value reaches that epsilon. Every value holds for the whole run.")
    if settings[0].participation < 1 and {"sample", "batch"} & {setting.noise_level for setting in settings}:
        notes.append(
            "sample and batch claim no amplification by participation, for the orchestrator sees who takes part; they are "
            "counted as if the most charged gateway took part in every round."
        )
    units = [claim.unit for _, _, claim in _claims(settings) if not (unknown == "records" and claim.unit == "record")]
    first = settings[0]
    notes += [f"warning: {text}" for text in delta_warnings(units, first.delta, first.records, first.gateways)]
    return notes


def _show(job: str, tables: Sequence[_Table], notes: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else 200, soft_wrap=not terminal)
    console.print(job, markup=False)
    for table in tables:
        console.print()
        console.print(table.title, markup=False, style="bold" if terminal else None)
        grid: Any = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, name in enumerate(table.head):
            grid.add_column(name, justify="left" if number < 3 else "right")
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    console.print()
    for note in notes:
        console.print(note, markup=False)
