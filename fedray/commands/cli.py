"""The command line: arguments to RunConfig, a run, an exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fedray.commands.process import flush_output, interruptible, leave_output, mend_streams
from fedray.config.data import DataSettings
from fedray.config.federation import FederationSettings
from fedray.config.files import nearest, settings_in
from fedray.config.machine import MachineSettings
from fedray.config.privacy import PrivacySettings
from fedray.config.rules import flag
from fedray.config.run import RunSettings
from fedray.config.settings import GROUPS, SETTINGS, RunConfig
from fedray.config.training import TrainingSettings
from fedray.errors import OUTPUT_FAILED, FedrayError, InputError, UserCodeError
from fedray.pool import connection

_DESCRIPTION = """Differentially private federated learning, simulated on Ray: many gateways train privately in parallel, an
orchestrator averages their weights. A simulator in one trust domain: every process of the Ray cluster can read un-noised
weights and run code, so keep the cluster on a private network with token authentication.
Beside runs there are commands, each with a --help of its own: audit attacks the code that a run uses, frontier draws
accuracy against epsilon, plan answers what a privacy level costs, report writes a page about a run directory, verify
recomputes its epsilon and checks its files.
Exit codes: 0 done, 1 the run failed, 2 bad input, 3 a promise does not hold, 130 interrupted."""


COMMANDS: dict[str, str] = {
    "audit": "fedray.commands.audit",
    "frontier": "fedray.commands.frontier",
    "plan": "fedray.commands.plan",
    "report": "fedray.commands.report",
    "verify": "fedray.commands.verify",
}
"""Sub-commands by their first word, and the module whose main(arguments) runs each."""


@dataclass(frozen=True, kw_only=True)
class _CommandLine:
    config: Path | None = None
    """TOML file with any of these settings, or a run's config.json; flags override it."""
    federation: FederationSettings = FederationSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = PrivacySettings()
    run: RunSettings = RunSettings()
    machine: MachineSettings = MachineSettings()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name; None for the process' own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        mend_streams()
    with interruptible(to_the_end=argv is None):
        code = _main(arguments, own_process=argv is None)
    if argv is None and (error := flush_output()) is not None and not isinstance(error, BrokenPipeError):
        print(f"error: {OUTPUT_FAILED.format(error)}", file=sys.stderr)
        return code or 1
    return code


def _main(arguments: list[str], own_process: bool) -> int:
    try:
        if arguments and arguments[0] in COMMANDS:
            return int(importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:]))
        config = parse(arguments)
        if own_process and config.machine.pool == "ray":  # its start is what a user waits for
            threading.Thread(target=_import_early, daemon=True).start()
            connection.connect_early(config.machine.ray_address)
        return _run(config, explicit_fields(arguments))
    except FedrayError as error:
        if isinstance(error, UserCodeError) and error.details:
            print(error.details.rstrip(), file=sys.stderr)
        print(f"error: {_one_line(error)}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has gone, as in `--help | head`
        leave_output()
        return 1
    except OSError as error:  # files have errors of their own; what is left is a command that prints
        leave_output()
        print(f"error: {OUTPUT_FAILED.format(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the round under way was abandoned; what was written is intact.", file=sys.stderr)
        return 130
    finally:
        connection.abandon_early()


def parse(arguments: Sequence[str]) -> RunConfig:
    """Return the settings that the arguments, and the TOML file they name, ask for.

    Raises:
        InputError: A flag or its value is unknown, or a value breaks a rule.
        SystemExit: --help was asked for.
    """
    path = _file(arguments)
    if not {"-h", "--help"} & set(arguments) and (problem := _mistake(arguments)) is not None:
        raise InputError(problem)
    file_arguments = [] if path is None else _file_arguments(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            settings = tyro.cli(
                _CommandLine,
                prog="python -m fedray",
                description=_DESCRIPTION,
                args=[*file_arguments, *arguments],
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # The parser's own message is a framed box of several lines.
        raise InputError(f"the arguments cannot be read ({_one_line(said.getvalue())}); see --help.") from None
    config = RunConfig(**{name: getattr(settings, name) for name in GROUPS})
    _say_repeated(arguments)
    return config


def _say_repeated(arguments: Sequence[str]) -> None:
    """Say on standard error when a flag is given twice with different values."""
    seen: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name == "--":
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        value = value if equals else "" if following.startswith("--") else following
        name = "--" + name.removeprefix("--").replace("_", "-")
        if seen.setdefault(name, value) != value:
            print(
                f"warning: {name} is given twice, as {seen[name]!r} and {value!r}; the last one counts.",
                file=sys.stderr,
            )


def explicit_fields(arguments: Sequence[str]) -> set[str]:
    """Return the names of the settings that arguments, or the TOML file they name, give a value to."""
    path = _file(arguments)
    given = [*([] if path is None else _file_arguments(path)), *arguments]
    flags = [argument for argument in given if argument.startswith("--")]  # a value may be called like a field
    names = {argument.partition("=")[0].removeprefix("--").replace("-", "_") for argument in flags}
    return SETTINGS.keys() & names


def _run(config: RunConfig, explicit: set[str]) -> int:
    # torch takes a second to import: --help and bad flags answer without it.
    from fedray.commands.dry_run import dry_run
    from fedray.orchestrator.rounds import Orchestrator
    from fedray.reports.progress import Terminal

    terminal = Terminal(config.run.quiet)
    try:
        if config.run.dry_run:
            dry_run(config, explicit)
        else:
            Orchestrator(config=config, callbacks=[terminal], explicit=explicit).run()
    finally:
        terminal.close()
    return 0


def _import_early() -> None:
    with contextlib.suppress(BaseException):  # the process may end meanwhile; what is wrong shows where it is needed
        importlib.import_module("fedray.orchestrator.rounds")


def _file(arguments: Sequence[str]) -> Path | None:
    path = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or index + 1 < len(arguments)):
            path = Path(value if equals else arguments[index + 1])
    return path


def _file_arguments(path: Path) -> list[str]:
    """Return the settings of a file as arguments, to be placed before the user's own."""
    settings = settings_in(path)
    flags = [flag(name) for name, value in settings.items() if value is True]
    return flags + [f"{flag(name)}={value}" for name, value in settings.items() if not isinstance(value, bool)]


def _mistake(arguments: Sequence[str]) -> str | None:
    """Return a sentence about the first argument that is no flag, or whose value does not fit; None if all fit."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, given = argument.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--"):
            return f"{argument!r} is no flag; every setting is written --name value: see --help."
        if field != "config" and field not in SETTINGS:
            return f"{name} is no flag{nearest(name)}; see --help for all flags."
        value = given if equals else rest[0] if rest and not rest[0].startswith("--") else None
        problem = _value_mistake(field, value)
        if problem is not None:
            return problem
        if value is not None and not equals:
            rest.pop(0)
    return None


def _value_mistake(field: str, value: str | None) -> str | None:
    if field != "config" and SETTINGS[field].kind is bool:
        return None if value is None else f"{flag(field)} is {value!r}; it takes no value: leave the value out."
    words = "a TOML file, or a run's config.json" if field == "config" else SETTINGS[field].words
    if value is not None and (field == "config" or SETTINGS[field].fits(value, from_text=True)):
        return None
    given = "has no value" if value is None else f"is {value!r}"
    return f"{flag(field)} {given}; it must be {words}."


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
