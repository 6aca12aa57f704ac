"""Errors that fedray shows to its users; one sentence each: what, value, rule, remedy.

Every error survives pickling, because it may cross from an actor to the driver.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

OUTPUT_FAILED = "standard output cannot be written ({}); use --quiet, or send it elsewhere."


class FedrayError(Exception):
    """Base of every error that fedray raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(FedrayError):
    """The user's input (flag, file, data or model) breaks a rule; nothing was started."""

    exit_code = 2


class RunFailedError(FedrayError):
    """A run that had started could not go on."""


class UserCodeError(RunFailedError):
    """The user's code failed: in gateways (GatewayError), or in the driver while a round was scored.

    Args:
        message: One sentence naming round and cause.
        details: The original traceback, shown once.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message, details)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class GatewayError(UserCodeError):
    """The user's code or data failed inside gateways during a round; the sentence names them, too."""


class RunInterruptedError(FedrayError):
    """The user stopped a run (Ctrl-C or SIGTERM); the round under way was abandoned."""

    exit_code = 130


class BudgetExhaustedError(FedrayError):
    """The next round would pass --max-epsilon; it was refused before it ran."""

    exit_code = 0


class StopAskedError(FedrayError):
    """A callback asked the run to stop."""

    exit_code = 0


class DamagedRunError(InputError):
    """A file of a run directory is missing, damaged or does not belong to it."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises in the driver into a UserCodeError.

    Args:
        what: Failed, for the message.
    """
    try:
        yield
    except (FedrayError, BrokenPipeError):  # the terminal is a callback, too, and nobody may read it any more
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserCodeError(f"{what}: {type(error).__name__}: {error}", traceback.format_exc()) from error
