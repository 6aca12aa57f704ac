"""`python -m fedray audit [every flag of a run] [--thorough] [--outliers]`: attack the code that the run would use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedray.commands.arguments import Arguments
from fedray.commands.cli import parse
from fedray.commands.output import new_output, write_output
from fedray.config.settings import RunConfig
from fedray.errors import InputError

if TYPE_CHECKING:
    from fedray.audit.audit import Audit
    from fedray.audit.finding import Finding

_DESCRIPTION = """Attacks the very code that a run with these flags would use, in this process: its trainer, sampler, clipping,
noise and aggregation, with your own model and data if you name them. Prints what each attack proved and the smallest leak it
would have caught as it was played (powerless: none, so it does not count), and writes audit.json. Besides its own flags it
takes every flag of a run (python -m fedray --help); --out
names the directory of audit.json (default: runs/<UTC time>-audit).
Exit codes: 0 consistent with the claims, 2 bad input, 3 VIOLATED."""


def main(arguments: list[str]) -> int:
    """Audit a run and return the exit code.

    Raises:
        InputError: The arguments break a rule, or the level promises nothing.
        GatewayError: The user's code failed.
    """
    parser = Arguments(prog="python -m fedray audit", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--thorough", action="store_true", help="more and longer games, in minutes instead of seconds")
    parser.add_argument("--outliers", action="store_true", help="add the report on outliers before and after noise")
    own, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    if config.run.dry_run or config.run.resume is not None:
        raise InputError(
            "--dry-run and --resume do not go with audit, which trains only what it attacks; leave them out."
        )

    from fedray.audit.audit import run_audit  # torch takes seconds to import: --help and bad flags answer without it
    from fedray.audit.lab import DEFAULT, THOROUGH
    from fedray.orchestrator.preparing import UserParts, prepare

    plan = prepare(config, UserParts())
    if not config.run.quiet:
        spec = plan.spec
        print(
            f"fedray audit: {spec.noise_level} level, sigma = {spec.noise_multiplier:.4g}, C = {spec.clip_norm:g}, engine "
            f"{plan.setup.engine}, {plan.layout.num_params:,} trainable parameters",
            flush=True,
        )
    audit = run_audit(plan, effort=THOROUGH if own.thorough else DEFAULT, with_outliers=own.outliers)
    path = write_audit(audit, config)
    for line in _lines(audit, path, config.run.quiet):
        print(line)
    return 3 if audit.violated else 0


def write_audit(audit: Audit, config: RunConfig) -> Path:
    """Write audit.json and its pictures; return the directory."""
    path = new_output(config, "audit")
    text = json.dumps(audit.as_dict(), indent=2, allow_nan=False) + "\n"
    files = {"audit.json": text.encode()}
    for number, picture in enumerate(audit.pictures, start=1):
        files[f"picture-{number}.png"] = picture.png
    write_output(path, files)
    return path


def _lines(audit: Audit, path: Path, quiet: bool) -> list[str]:
    from fedray.audit.outliers import table_lines

    lines = []
    if not quiet:
        width = max(len(finding.name) for finding in audit.findings)
        lines.append(
            f"{'attack':<{width}}  {'claimed at most':>22}  {'proven at least':>22}  {'would catch':>11}  verdict"
        )
        lines += [_row(finding, width) for finding in audit.findings]
        lines += [
            "",
            *(f"{finding.name} ({finding.unit}, {finding.adjacency}): {finding.text}" for finding in audit.findings),
        ]
        if audit.outliers:
            lines += ["", *table_lines(audit.outliers)]
        lines += ["", *audit.notes]
    broken = [finding for finding in audit.findings if finding.violated]
    if broken:
        names = "; ".join(f"{f.name}: {f.measure} ≥ {f.lower_bound:.4g}, claimed ≤ {f.claim:.4g}" for f in broken)
        lines.append(f"verdict: VIOLATED. {names}")
    else:
        powerless = sum(finding.verdict == "powerless" for finding in audit.findings)
        beside = f", {powerless} more could not have failed" if powerless else ""
        lines.append(f"verdict: consistent ({audit.num_counting} attacks{beside}, {audit.seconds:.0f} s)")
    lines.append(f"files: {path} (copy audit.json into a run directory and `fedray report` shows it)")
    return lines


def _row(finding: Finding, width: int) -> str:
    leak = "-" if finding.smallest_leak_caught is None else f"{finding.smallest_leak_caught:.2f}"
    if finding.smallest_leak_caught is not None and finding.claim != 0:
        leak += "×"
    claim, bound = (f"{finding.measure} {value:.4g}" for value in (finding.claim, finding.lower_bound))
    return f"{finding.name:<{width}}  {claim:>22}  {bound:>22}  {leak:>11}  {finding.verdict}"
