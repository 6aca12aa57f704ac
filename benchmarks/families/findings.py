"""Everything that one run of the zoo found, the issue's bars held against it, and its tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from suite import machine
from suite.findings import Bar
from suite.report import acceptance_table, markdown_table

from families.family import Family
from families.gate import TOLERANCE
from families.job import BATCH, RECORDS
from families.systems import FEDRAY, GHOST, HOOKS, PLAIN, REPLACED
from families.timing import Timed

WANTED_OF_PLAIN = 0.5

CONDITIONS = (
    f"One process, one torch thread. Poisson batches of {BATCH} expected records from shards of {RECORDS}, Adam, sigma 1, "
    "C 1; a round is one call of fedray's trainer, with the engine that a run would choose and its strong noise. Opacus: "
    "one wrapped model for all gateways, one after the other, on the same batches, with torch's own noise; once with hooks, "
    "once with ghost clipping, and where it refuses a layer also with its own substitute for it (ModuleValidator.fix). No "
    "privacy: autograd and Adam on one shared batch of 512 records (256 for the ResNet). Samples/s: gateways × local steps "
    "× B over the median round by wall clock, after one round to warm up; ratios are those of the medians, and CPU ratios "
    "those by the process's processor time, which other load disturbs less."
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one family.

    Args:
        distance: Of fedray's clipped sums from those of single records (relative L2); None where fedray refuses.
        systems: By name.
        absent: The package that the family needs and this environment lacks; then nothing was measured.
    """

    distance: float | None
    systems: Mapping[str, Timed]
    absent: str | None = None

    def ratio(self, system: str, by: str = "samples_per_s") -> float | None:
        """Return fedray's rate over a system's; 0 where fedray refuses, None where the system does or nothing was run."""
        ours, theirs = self.systems.get(FEDRAY), self.systems.get(system)
        rate = None if theirs is None else getattr(theirs, by)
        if rate is None or ours is None:
            return None
        return (getattr(ours, by) or 0.0) / float(rate)

    def spread(self, system: str) -> tuple[float, float] | None:
        """Return the least and the largest ratio of a repeat."""
        ours, theirs = self.systems.get(FEDRAY), self.systems.get(system)
        if ours is None or theirs is None or not ours.wall_s or not theirs.wall_s:
            return None
        each = [
            ours.samples / mine * them / theirs.samples for mine, them in zip(ours.wall_s, theirs.wall_s, strict=True)
        ]
        return min(each), max(each)


def bars(found: Mapping[str, Finding], families: Mapping[str, Family]) -> list[Bar]:
    """Return the bars of the families that were measured; Opacus' only where Opacus trains the family."""
    lines = []
    for key, finding in found.items():
        wanted = families[key].bars
        if (over := finding.ratio(HOOKS)) is not None:
            lines.append(_bar(key, finding, HOOKS, over, wanted.over_hooks))
        if wanted.of_plain is not None:
            lines.append(_bar(key, finding, PLAIN, finding.ratio(PLAIN), wanted.of_plain))
    return lines


def _bar(key: str, finding: Finding, system: str, value: float | None, bar: float) -> Bar:
    by_cpu = finding.ratio(system, "samples_per_cpu_s")
    cpu = "" if by_cpu is None else f" (by CPU time {by_cpu:.2f}×)"
    return Bar(
        number="4", text=f"{key}: fedray over {system}{cpu}", value=value, bar=bar, spread=finding.spread(system)
    )


def markdown(found: Mapping[str, Finding], families: Mapping[str, Family], config: Mapping[str, Any], stem: str) -> str:
    """Return the whole report."""
    lines = bars(found, families)
    missed = sum(line.met is False for line in lines)
    parts = [
        f"# Zoo, {config['date']}",
        machine.one_line(config["machine"]) + ".",
        *([warning] if (warning := machine.busy_warning(config["machine"])) else []),
        CONDITIONS,
        f"{config['gateways']} gateways, {config['repeats']} interleaved repeats{', --quick' if config['quick'] else ''}; "
        f"raw numbers in `{stem}.json`.",
        f"![share of training without privacy]({stem}.png)",
        "## Samples a second",
        _rates(found, families),
        f"fedray reaches half of the rate without privacy in {_half(found)} of {len(found)} families (what the issue wants "
        "in the end).",
        "## Refused",
        _refusals(found),
        "## Acceptance",
        f"{len(lines) - missed} bars met, {missed} missed.",
        acceptance_table(lines),
    ]
    return "\n\n".join(parts) + "\n"


def _rates(found: Mapping[str, Finding], families: Mapping[str, Family]) -> str:
    rows = []
    for key, finding in found.items():
        ours = finding.systems.get(FEDRAY)
        rows.append(
            (
                families[key].title,
                "" if ours is None else ours.engine,
                *(_rate(finding, system) for system in (FEDRAY, HOOKS, GHOST, REPLACED, PLAIN)),
                *(_times(finding.ratio(system)) for system in (HOOKS, GHOST, PLAIN)),
                _times(finding.ratio(PLAIN, "samples_per_cpu_s")),
                "–" if finding.distance is None else f"{finding.distance:.0e}",
            )
        )
    header = (
        *("family", "engine", FEDRAY, HOOKS, GHOST, REPLACED, PLAIN, "over hooks", "over ghost", "of no privacy"),
        *("the same by CPU time", f"distance (≤ {TOLERANCE:g})"),
    )
    return markdown_table(header, rows)


def _rate(finding: Finding, system: str) -> str:
    timed = finding.systems.get(system)
    if timed is None:
        return "–"
    return "refused" if timed.samples_per_s is None else f"{timed.samples_per_s:,.0f}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _half(found: Mapping[str, Finding]) -> int:
    return sum((finding.ratio(PLAIN) or 0.0) >= WANTED_OF_PLAIN for finding in found.values())


def _refusals(found: Mapping[str, Finding]) -> str:
    lines = []
    for key, finding in found.items():
        if finding.absent is not None:
            lines.append(f"- {key}: not measured, {finding.absent} is not installed")
        for name, timed in finding.systems.items():
            if timed.refusal is not None and name != REPLACED:
                lines.append(f"- {key}, {name}: {timed.refusal}")
    return "\n".join(lines) or "Nothing."


def as_json(found: Mapping[str, Finding], families: Mapping[str, Family], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything, raw numbers included."""
    return {
        **config,
        "conditions": CONDITIONS,
        "families": {
            key: {
                "title": families[key].title,
                "local_steps": families[key].local_steps,
                "shared_batch": families[key].shared_batch,
                "bars": asdict(families[key].bars),
                "distance": finding.distance,
                "tolerance": TOLERANCE,
                "absent": finding.absent,
                "systems": {name: timed.as_dict() for name, timed in finding.systems.items()},
            }
            for key, finding in found.items()
        },
        "acceptance": [line.as_dict() for line in bars(found, families)],
    }
