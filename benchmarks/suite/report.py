"""Tables of the throughput benchmark, as Markdown and on the terminal (the same text), and its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from suite import RESULTS, machine
from suite.cases import Case
from suite.findings import Bar, Findings, bars
from suite.gate import TOLERANCE

CONDITIONS = (
    "One torch thread a process; 2 worker processes for fedray and Flower, 1 for all others. Ray's workers at niceness 0 "
    "in both (RAY_worker_niceness=0). Adam is torch's fused kernel in every peer, the faster one for them, unless a name "
    "says otherwise. No system scores its model. Peers' private rows and all of fedray's take Poisson batches; rows "
    "without record noise of pfl and the plain loop take batches in order. Cold start: from the start of the process to "
    "the end of round 1. Samples/s: gateways × local steps × B over the median steady round. Memory: peak of a system's "
    "whole process tree (shared pages once)."
)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up; all but the first are right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if column == 0 else ":") for column, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def markdown(found: Findings, cases: Sequence[Case], config: dict[str, Any], stem: str) -> str:
    """Return the whole report."""
    parts = [
        f"# Throughput, {config['date']}",
        machine.one_line(config["machine"]) + ".",
        *([warning] if (warning := machine.busy_warning(config["machine"])) else []),
        CONDITIONS,
        f"{config['repeats']} interleaved repeats{', --quick' if config['quick'] else ''}; "
        f"raw numbers in `{stem}.json`.",
        f"![samples a second]({stem}.png)",
        "## Equality gate (relative L2)",
        markdown_table(
            ("comparison", "distance", "allowed"),
            [(check.name, f"{check.distance:.1e}", f"{TOLERANCE:g}") for check in found.gate],
        ),
        *(part for case in cases for part in (f"## {case.title}", _case_table(found, case))),
        "## Start to exit",
        _start_table(found),
        "## Broadcast and gather alone",
        _transfer_sentence(found),
        "## Epsilon after one more round",
        _accountant_table(found),
        "## Acceptance",
        acceptance_table(bars(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _case_table(found: Findings, case: Case) -> str:
    systems = found.cases[case.key]
    best = max(measured.samples_per_s for measured in systems.values())
    rows = [
        (
            measured.name,
            f"{measured.median('cold_start_s'):.1f}",
            f"{measured.round_s:.3f}",
            f"{measured.samples_per_s:,.0f}",
            f"{measured.gateways_per_s:,.1f}",
            f"{measured.median('peak_rss_mb'):,.0f}",
            f"{measured.samples_per_s / best:.3f}",
        )
        for measured in systems.values()
    ]
    header = ("system", "cold start s", "round s", "samples/s", "gateways/s", "peak MB", "of fastest")
    return markdown_table(header, rows) + _phases_sentence(found, case)


def _phases_sentence(found: Findings, case: Case) -> str:
    measured = found.cases[case.key].get("fedray")
    if measured is None:
        return ""
    phases = measured.results[-1]["round_phases"]
    return "\n\nfedray's round, ms: " + ", ".join(f"{name} {1000 * s:.1f}" for name, s in phases.items()) + "."


def _start_table(found: Findings) -> str:
    names = {
        "fedray": "python -m fedray --gateways 16 --noise-level sample",
        "flower": "the same training in Flower + Opacus",
        "ray_alone": "ray.init, import torch, two ready actors",
    }
    rows = [(names[name], f"{row['median_s']:.1f}") for name, row in found.start.as_dict().items()]
    return markdown_table(("program", "seconds"), rows)


def _transfer_sentence(found: Findings) -> str:
    transfer = found.transfer
    return (
        f"{transfer['size_bytes'] / 1e6:.0f} MB a round (once out, back from each of two actors): "
        f"{transfer['bytes_per_s'] / 1e9:.2f} GB/s; memcpy of as many bytes between warm buffers "
        f"{transfer['memcpy_bytes_per_s'] / 1e9:.2f} GB/s. Adding the updates up in float64 takes another "
        f"{1000 * transfer['sum_s']:.1f} ms."
    )


def _accountant_table(found: Findings) -> str:
    rows = [
        (
            f"{one.rounds:,}",
            f"{one.fedray_ms:.1f}",
            f"{one.dp_accounting_ms:.1f}",
            f"{one.dp_accounting_ms / one.fedray_ms:.1f}×",
        )
        for one in found.accountant
    ]
    return markdown_table(("rounds", "fedray, CPU ms", "dp-accounting, CPU ms", "ratio"), rows)


def acceptance_table(lines: Sequence[Bar]) -> str:
    """Return each bar of the issue with what was measured."""
    rows = []
    for line in lines:
        sign, value = ("≤" if line.at_most else "≥"), line.value
        spread = "" if line.spread is None else f"{line.spread[0]:.3g} … {line.spread[1]:.3g}"
        rows.append(
            (
                f"{line.number}. {line.text}",
                f"{sign} {line.bar:g}{line.unit}",
                "–" if value is None else f"{value:.3g}{line.unit}",
                spread,
                line.verdict,
            )
        )
    return markdown_table(("acceptance", "bar", "measured", "each repeat", "verdict"), rows)


def as_json(found: Findings, cases: Sequence[Case], config: dict[str, Any]) -> dict[str, Any]:
    """Return everything, raw numbers included."""
    return {
        **config,
        "conditions": CONDITIONS,
        "gate": [check.as_dict() for check in found.gate],
        "cases": {case.key: _case_json(found, case) for case in cases},
        "start_to_exit": found.start.as_dict(),
        "transfer": found.transfer,
        "accountant": [one.as_dict() for one in found.accountant],
        "acceptance": [line.as_dict() for line in bars(found)],
    }


def _case_json(found: Findings, case: Case) -> dict[str, Any]:
    jobs = {entry.label: _public(case.job_of(entry).__dict__) for entry in case.entries}
    systems = {name: measured.as_dict() for name, measured in found.cases[case.key].items()}
    return {"title": case.title, "records": case.num_records, "lazy": case.lazy, "jobs": jobs, "systems": systems}


def _public(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name not in ("folder", "data", "weights")}


def now() -> str:
    """Return today's date and time (UTC) for names and headings."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def stem_of(kind: str, date: str, folder: Path = RESULTS) -> str:
    """Return a name for a report's files that none in the folder has."""
    stem = f"{date[:10]}-{kind}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not (folder / f"{name}.json").exists())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report's raw numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
