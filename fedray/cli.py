"""The command line: arguments to RunConfig, a run, an exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fedray.config import RunConfig, flag
from fedray.errors import FedrayError, GatewayError, InputError

_DESCRIPTION = """Differentially private federated learning, simulated on Ray: many gateways train privately in parallel, an
orchestrator averages their weights. A simulator in one trust domain: every process of the Ray cluster can read un-noised
weights and run code, so keep the cluster on a private network with token authentication.
Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""


@dataclass(frozen=True, kw_only=True)
class _CommandLine(RunConfig):
    config: Path | None = None
    """TOML file with any of these settings, by field name; flags override it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name; None for the process' own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(parse(arguments))
    except FedrayError as error:
        if isinstance(error, GatewayError) and error.details:
            print(error.details.rstrip(), file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the round under way was abandoned; what was written is intact.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse(arguments: Sequence[str]) -> RunConfig:
    """Return the settings that the arguments, and the TOML file they name, ask for.

    Raises:
        InputError: A flag or its value is unknown, or a value breaks a rule.
        SystemExit: --help was asked for.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            settings = tyro.cli(
                _CommandLine,
                prog="python -m fedray",
                description=_DESCRIPTION,
                args=[*_file_arguments(arguments), *arguments],
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_sentence(stderr.getvalue())) from None
    fields = {name: value for name, value in vars(settings).items() if name != "config"}
    return RunConfig(**fields)


def _run(config: RunConfig) -> int:
    # torch takes a second to import: --help and bad flags answer without it.
    from fedray.dry_run import dry_run
    from fedray.orchestrator import Orchestrator
    from fedray.progress import Terminal

    terminal = Terminal(config.quiet)
    try:
        if config.dry_run:
            dry_run(config)
        else:
            Orchestrator(config=config, progress=terminal).run()
    finally:
        terminal.close()
    return 0


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _file_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the settings of --config FILE as arguments, to be placed before the user's own."""
    path = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            path = Path(arguments[index + 1])
        elif argument.startswith("--config="):
            path = Path(argument.partition("=")[2])
    if path is None:
        return []
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} cannot be read ({error}); name a readable TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path} is not TOML ({error}); write one `name = value` a line.") from error
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict | list):
            raise InputError(f"--config {path}: {name} is a table or list; every setting is one plain value.")
        field = name.replace("-", "_")
        if field not in RunConfig.__dataclass_fields__:
            raise InputError(f"--config {path}: {name} is no setting; see --help for the names.")
        if isinstance(value, bool):
            if not isinstance(RunConfig.__dataclass_fields__[field].default, bool):
                raise InputError(f"--config {path}: {name} is {value}; it must be no truth value.")
            found += [flag(field)] if value else []
        else:
            found += [flag(field), str(value)]
    return found


def _one_sentence(box: str) -> str:
    """Return the text of the parser's framed message as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    text = re.sub(r"[─-╿]", " ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = text.removeprefix("Parsing error").removeprefix("Unrecognized options").strip()
    text = re.sub(r"\s*For full helptext, (see|run) .*$", "", text)
    return f"{text}; see --help." if text else "the arguments cannot be read; see --help."
