"""The process around a command: its signals, and its standard streams, which may be closed, full or narrow."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 3  # signals


@contextlib.contextmanager
def interruptible(to_the_end: bool) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP interrupt the block once; while it cleans up, the third ends the process at once.

    What was ignored when the process began (SIGHUP under nohup) stays ignored.

    Args:
        to_the_end: Whether the process ends after the block, so that signals are dealt with until then.
    """
    received = 0

    def interrupt(_signal: int, _frame: Any) -> None:
        nonlocal received
        received += 1
        if received == 1:
            raise KeyboardInterrupt
        if received >= _PATIENCE:
            os._exit(130)

    previous = {name: signal.getsignal(name) for name in _SIGNALS}
    for name, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(name, interrupt)
    try:
        yield
    finally:
        if not to_the_end:
            for name, handler in previous.items():
                signal.signal(name, handler)


def mend_streams() -> None:
    """Make standard streams that can be written to, whatever the process was started with.

    Closed ones lead nowhere: else the next file that is opened, a ledger perhaps, would get their numbers and what others print.
    What a stream cannot spell is written with escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # one that is in use otherwise stays as it is
                stream.reconfigure(errors="backslashreplace")


def flush_output() -> OSError | None:
    """Write what waits on standard output; return what went wrong, after which nothing more is written there."""
    try:
        sys.stdout.flush()
    except OSError as error:
        leave_output()
        return error
    return None


def leave_output() -> None:
    """Let standard output lead nowhere, or Python complains when it flushes at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
