"""`python -m fedray verify RUNDIR`: whether what a run directory says about privacy is true."""

from __future__ import annotations

import string
from pathlib import Path

from fedray.commands.arguments import Arguments
from fedray.errors import InputError

_DESCRIPTION = """Recomputes epsilon from the ledger and the config alone, checks every file against the manifest and
against the others, and says whether privacy.json is true. It finds damage and inconsistency; somebody who recomputes
everything is found only with the run digest that was printed when the run ended (--digest).
Exit codes: 0 everything is true, 2 no run directory or an unfinished run, 3 something is off."""


def main(arguments: list[str]) -> int:
    """Verify a run directory, print what was found and return the exit code.

    Raises:
        InputError: The arguments are wrong, the path is no run directory, or the run is unfinished (and otherwise in order).
    """
    parser = Arguments(prog="python -m fedray verify", description=_DESCRIPTION)
    parser.add_argument("rundir", type=Path, help="the run directory")
    parser.add_argument("--digest", help="the run digest that was printed when the run ended (64 hexadecimal digits)")
    given = parser.parse_args(arguments)
    if given.digest is not None and (len(given.digest) != 64 or set(given.digest) - set(string.hexdigits)):
        raise InputError(
            f"--digest is {given.digest!r}; it must be 64 hexadecimal digits, as printed when the run ended."
        )

    from fedray.rundir.verification import examine  # numpy and the accountant: --help answers without them

    verdict = examine(given.rundir, given.digest)
    for finding in verdict.findings:
        print(f"{'ok ' if finding.holds else 'OFF'}  {finding.subject}: {finding.text}")
    if not verdict.holds:
        wrong = [finding for finding in verdict.findings if not finding.holds]
        print(f"NOT TRUE: {wrong[0].subject} {wrong[0].text}" + (f" ({len(wrong)} findings)" if len(wrong) > 1 else ""))
        return 3
    if not verdict.finished:
        raise InputError(
            f"{given.rundir} is an unfinished run: what is there is in order, but there is no privacy.json to verify; "
            "resume it first."
        )
    if verdict.digest is not None:
        print(f"run digest: {verdict.digest}")
    print("privacy.json is true." if given.digest else "privacy.json is true, as far as the directory itself can tell.")
    return 0
