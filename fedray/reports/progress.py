"""What the terminal shows: a panel at the start, a line or a live table while it runs, sentences at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from fedray.errors import OUTPUT_FAILED, RunFailedError
from fedray.reports.callback import End, RoundDone, Start

_SHOWN_ROUNDS = 20  # rows of the live table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line deal with it; rich would leave the process."""
        raise BrokenPipeError


class Terminal:
    """Shows a run on standard output: live on a terminal, plain lines elsewhere.

    Args:
        quiet: Show the closing sentences only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = _Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live: Live | None = None
        self._records: list[Mapping[str, Any]] = []

    def on_start(self, start: Start) -> None:
        """Show the plan and its warnings."""
        with _writing():
            self.show_plan("fedray", start.rows, start.warnings)

    def on_round(self, done: RoundDone) -> None:
        """Show a finished round."""
        with _writing():
            self._show_round(done.record, done.rounds)

    def on_end(self, end: End) -> None:
        """Show the closing sentences."""
        with _writing():
            self.say(end.sentences)

    def show_plan(self, title: str, rows: Sequence[tuple[str, str]], warnings: Sequence[str]) -> None:
        """Show a plan and its warnings."""
        if self._quiet:
            return
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(f"[bold]{name}[/bold]", value)
            self._console.print(Panel(table, title=title, title_align="left"))
        else:
            print(title)
            for name, value in rows:
                print(f"  {name}: {value}")
        for warning in warnings:
            self._console.print(f"warning: {warning}", style="yellow", markup=False)
        sys.stdout.flush()

    def _show_round(self, record: Mapping[str, Any], rounds: int) -> None:
        if self._quiet:
            return
        if not self._console.is_terminal:
            print(_line(record, rounds), flush=True)
            return
        self._records.append(record)
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8, transient=False)
            self._live.start()
        self._live.update(_table(self._records[-_SHOWN_ROUNDS:], rounds))

    def say(self, sentences: Sequence[str]) -> None:
        """Show sentences, quiet or not."""
        self.close()
        for sentence in sentences:
            self._console.print(sentence, markup=False)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the terminal as it was, on an error as well."""
        if self._live is not None:
            self._live.stop()
            self._live = None


@contextmanager
def _writing() -> Iterator[None]:
    """Tell a standard output that fails from a run directory that does."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunFailedError(OUTPUT_FAILED.format(error)) from error


def _cells(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    cells = [(name, f"{value:.4f}") for name, value in record["metrics"].items() if value is not None]
    if record["loss"] is not None:
        cells.append(("loss", f"{record['loss']:.4f}"))
    cells += [(f"epsilon/{unit}", f"{value:.3f}") for unit, value in record["epsilon"].items()]
    cells.append(("seconds", f"{record['seconds']['total']:.2f}"))
    cells.append(("samples/s", f"{record['samples_per_s']:,.0f}"))
    return cells


def _line(record: Mapping[str, Any], rounds: int) -> str:
    return f"round {record['round']}/{rounds}  " + "  ".join(f"{name} {value}" for name, value in _cells(record))


def _table(records: Sequence[Mapping[str, Any]], rounds: int) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("round", justify="right")
    for name, _ in _cells(records[-1]):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(f"{record['round']}/{rounds}", *[value for _, value in _cells(record)])
    return table
