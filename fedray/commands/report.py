"""`python -m fedray report RUNDIR`: a run as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from fedray.commands.arguments import Arguments
from fedray.errors import InputError, RunFailedError

_DESCRIPTION = """Writes report.html: curves, the privacy card in plain words, audit results when audit.json lies in the run
directory, verification, placement, phase times and settings, in one file that needs no network. An unfinished or damaged run gets
one as well, which says so at its top."""


def main(arguments: list[str]) -> int:
    """Write the report and return the exit code.

    Raises:
        InputError: The arguments are wrong, or the path is no run directory that can be shown.
        RunFailedError: The report cannot be written.
    """
    parser = Arguments(prog="python -m fedray report", description=_DESCRIPTION)
    parser.add_argument("rundir", type=Path, help="the run directory")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html in the run directory)")
    given = parser.parse_args(arguments)

    from fedray.reports.page import render  # numpy and the accountant: --help answers without them
    from fedray.rundir.files import replace

    out = given.rundir / "report.html" if given.out is None else given.out
    if not out.name or out.is_dir() or "\0" in str(out):
        raise InputError(f"--out is {str(given.out)!r}; it must name a file.")
    page = render(given.rundir)
    try:
        replace(out, page.encode())
    except OSError as error:
        raise RunFailedError(f"--out {out} cannot be written ({error}); choose another place.") from error
    print(f"report: {out}")
    return 0
