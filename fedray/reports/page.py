"""report.html: a run in one file for people; no network, no script, good on a phone, in print and to a screen reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedray.config.settings import DEFAULTS
from fedray.errors import DamagedRunError
from fedray.reports import audit_page
from fedray.reports import elements as html
from fedray.reports.charts import Curve, svg
from fedray.rundir import cards, evidence
from fedray.rundir.evidence import UntrueError
from fedray.rundir.verification import Verdict, examine

_TABLE_ROWS = 300
_UNITS = {
    "record": "one record of one gateway",
    "gateway": "a gateway as a whole, with all its records",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing may be fetched, nothing may run


@dataclass(frozen=True, kw_only=True)
class _RunFiles:
    """What the report is made of.

    Args:
        name: The run directory's name.
        card: config.json.
        records: metrics.jsonl.
        privacy: privacy.json; empty when the run is unfinished.
        audit: audit.json; None when there is none.
        verdict: What verification found.
    """

    name: str
    card: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    privacy: Mapping[str, Any]
    audit: Mapping[str, Any] | None
    verdict: Verdict

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings by name."""
        found: Mapping[str, Any] = self.card["config"]
        return found


def render(path: Path) -> str:
    """Return the report of a run directory, finished or not; what is off with it is said at the top.

    Raises:
        InputError: The path is no run directory.
        DamagedRunError: Config or metrics cannot be read at all.
    """
    run = _read(path)
    title = f"{run.config.get('noise_level')} level, {run.config.get('gateways')} gateways"
    body = "".join(
        [
            f"<header><h1>fedray: {html.text(title)}</h1>{html.paragraph(f'Run directory {run.name}', lead=True)}</header>",
            "<main>",
            _summary(run),
            html.section("Privacy", _privacy(run)),
            html.section("Curves", _curves(run)),
            html.section("Audit", "" if run.audit is None else audit_page.content(run.audit, run.privacy)),
            html.section("Verification", _verification(run)),
            html.section("Where and how long", _placement(run), _phases(run)),
            html.section("Settings", _settings(run)),
            "</main>",
            f"<footer>Written by fedray {html.text(cards.versions()['fedray'])} from the files of the run directory.</footer>",
        ]
    )
    style = (Path(__file__).parent / "page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fedray: {html.text(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def _read(path: Path) -> _RunFiles:
    verdict = examine(path)
    try:
        card = evidence.read_object(path, "config.json")
        lines, _ = evidence.lines_of(path, "metrics.jsonl", finished=False)
        records = [evidence.parsed(line, "a line ") for line in lines]
        if not isinstance(card.get("config"), dict) or not all(_is_record(record) for record in records):
            raise UntrueError("and metrics.jsonl do not have the form that fedray writes.")
    except (UntrueError, ValueError) as error:
        raise DamagedRunError(f"{path}: config.json or metrics.jsonl cannot be shown: {error}; restore it.") from error
    privacy = _optional(path, "privacy.json") or {}
    return _RunFiles(
        name=path.resolve().name,
        card=card,
        records=records,
        privacy=privacy,
        audit=_optional(path, "audit.json"),
        verdict=verdict,
    )


def _optional(path: Path, name: str) -> dict[str, Any] | None:
    if not (path / name).exists():
        return None
    try:
        return evidence.read_object(path, name)
    except UntrueError as error:
        if name == "privacy.json":
            return None  # verification has said so
        raise DamagedRunError(f"{path / name} {error} Remove or replace it.") from error


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("round"), int)
        and all(evidence.is_number(record.get(name, 0)) or record.get(name) is None for name in ("accuracy", "loss"))
        and all(isinstance(record.get(name), dict) for name in ("epsilon", "seconds"))
        and all(evidence.is_number(value) for value in [*record["epsilon"].values(), *record["seconds"].values()])
        and evidence.is_number(record.get("samples_per_s"))
    )


def _summary(run: _RunFiles) -> str:
    tiles = []
    if run.records and run.records[-1].get("accuracy") is not None:
        tiles.append(html.tile(f"{run.records[-1]['accuracy']:.4f}", "accuracy on held-out data"))
    for guarantee in run.verdict.guarantees[:1]:
        unit = f"epsilon per {guarantee.unit} ({guarantee.adjacency}), delta {guarantee.delta:g}"
        tiles.append(html.tile(cards.format_epsilon(guarantee.epsilon), unit))
    tiles.append(html.tile(f"{len(run.records)} of {run.config.get('rounds')}", "rounds done"))
    if run.records:
        tiles.append(
            html.tile(f"{median(record['samples_per_s'] for record in run.records):,.0f}", "samples/s (median round)")
        )
    return f'<div class="tiles">{"".join(tiles)}</div>{_banner(run)}'


def _banner(run: _RunFiles) -> str:
    wrong = [finding for finding in run.verdict.findings if not finding.holds]
    if wrong:
        found = html.note(
            "Not true:", f"{wrong[0].subject} {wrong[0].text} ({len(wrong)} findings, see Verification)", "bad"
        )
    elif not run.verdict.finished:
        found = html.note("Unfinished run.", "What is there is in order; its directory holds the round key.", "warn")
    else:
        found = html.note("Verified when this report was written:", "files, ledger and epsilon agree.", "good")
    if run.config.get("seed") is not None and run.verdict.guarantees:
        found += html.note(
            "Simulation only.", "With --seed the noise can be predicted by whoever knows the seed.", "warn"
        )
    if run.verdict.guarantees:  # so config.json can be trusted to hold numbers
        units = [guarantee.unit for guarantee in run.verdict.guarantees]
        delta, records, gateways = run.config["delta"], run.card["nominal_records"], run.config["gateways"]
        for sentence in cards.delta_warnings(units, delta, records, gateways):
            found += html.note("Large delta.", sentence, "warn")
    return found


def _privacy(run: _RunFiles) -> str:
    guarantees = run.verdict.guarantees
    if not guarantees:
        off = any(not finding.holds for finding in run.verdict.findings)
        if run.config.get("noise_level") == "none" and not off:
            return html.note("No promise.", "--noise-level none promises nothing: updates are exact.", "warn")
        return html.note("Unknown.", "Config or ledger cannot be read, so nothing can be said about privacy.", "bad")
    promises = [
        html.card(
            f"epsilon {cards.format_epsilon(guarantee.epsilon)} per {guarantee.unit}",
            html.paragraph(cards.sentence(guarantee)),
            html.pairs(
                {
                    "who is protected": _UNITS[guarantee.unit],
                    "neighbours": guarantee.adjacency,
                    **({} if guarantee.mu is None else {"whole curve": f"mu = {cards.format_epsilon(guarantee.mu)}"}),
                    "against whom": guarantee.observer,
                    "how": guarantee.mechanism,
                    "counted by": guarantee.accountant,
                }
            ),
        )
        for guarantee in guarantees
    ]
    charges = run.verdict.charges
    steps = (
        "" if charges is None else f"{charges.steps} local steps in {charges.rounds} rounds were started and charged"
    )
    return "".join(
        [
            html.paragraph(
                "Everything below was recomputed from the ledger and the settings. A smaller epsilon is a stronger promise; "
                f"0 means that nothing can be learned. {steps} to the most charged gateway."
            ),
            f'<div class="cards">{"".join(promises)}</div>',
            "<h3>What is not covered</h3>",
            html.bullets(
                _list(run.privacy, "not_covered") or ["unknown: the run is unfinished or its card is damaged"]
            ),
            "<h3>Treated as public</h3>",
            html.bullets(
                _list(run.privacy, "treated_as_public") or ["unknown: the run is unfinished or its card is damaged"]
            ),
        ]
    )


def _list(card: Mapping[str, Any], name: str) -> list[Any]:
    found = card.get(name)
    return found if isinstance(found, list) else []


def _curves(run: _RunFiles) -> str:
    if not run.records:
        return html.paragraph("No round is done.")
    found = []
    for name, zero in (("accuracy", False), ("loss", False)):
        points = [(record["round"], record[name]) for record in run.records if record.get(name) is not None]
        if points:
            found.append(Curve(name=f"{name} on held-out data", points=points, from_zero=zero))
    for index, unit in enumerate(run.records[-1]["epsilon"]):
        points = [(record["round"], record["epsilon"][unit]) for record in run.records if unit in record["epsilon"]]
        limit = _limit(run) if index == 0 else None
        found.append(Curve(name=f"epsilon per {unit}", points=points, limit=limit, from_zero=True))
    units = list(run.records[-1]["epsilon"])
    head = ["round", "accuracy", "loss", *(f"epsilon per {unit}" for unit in units), "seconds", "samples/s"]
    stride = -(-len(run.records) // _TABLE_ROWS)
    rows = [
        [
            record["round"],
            *(record.get(name) for name in ("accuracy", "loss")),
            *(record["epsilon"].get(unit) for unit in units),
            record["seconds"].get("total"),
            round(record["samples_per_s"]),
        ]
        for record in run.records[::stride]
    ]
    charts = "".join(html.figure(curve.name, svg(curve)) for curve in found)
    numbers = html.table("The same in numbers", head, rows, wide=True)
    return f'<div class="charts">{charts}</div>{html.details("All rounds in numbers", numbers)}'


def _limit(run: _RunFiles) -> tuple[float, str] | None:
    for name in ("max_epsilon", "target_epsilon"):
        value: Any = run.config.get(name)
        if evidence.is_number(value):
            return float(value), f"--{name.replace('_', '-')} {value:g}"
    return None


def _verification(run: _RunFiles) -> str:
    found = html.checks((finding.holds, finding.subject, finding.text) for finding in run.verdict.findings)
    digest = "" if run.verdict.digest is None else html.paragraph(f"Run digest: {run.verdict.digest}")
    advice = html.paragraph(
        "fedray verify finds damage and inconsistency. Somebody who recomputes everything is found only by the run digest "
        "that was printed when the run ended: fedray verify RUNDIR --digest HEX."
    )
    return html.paragraph("What was checked when this report was written:") + found + digest + advice


def _placement(run: _RunFiles) -> str:
    machine = run.card.get("machine")
    where = {"gateways ran in": run.card.get("placement") or "not recorded"}
    return html.pairs({**where, **(machine if isinstance(machine, dict) else {})})


def _phases(run: _RunFiles) -> str:
    phases = dict.fromkeys(phase for record in run.records for phase in record["seconds"] if phase != "total")
    total = sum(record["seconds"].get("total", 0.0) for record in run.records)
    if not phases or total <= 0:
        return ""
    rows = []
    for phase in phases:
        times = [record["seconds"][phase] for record in run.records if phase in record["seconds"]]
        share = sum(times) / total
        rows.append([phase, html.Number(f"{median(times):.4f}"), html.Number(f"{share:.1%}"), html.Bar(share)])
    caption = (
        f"Seconds by phase; all rounds together took {total:.2f} s. Scoring may overlap with the next round's training."
    )
    return html.table(caption, ["phase", "median round", "share of total", ""], rows)


def _settings(run: _RunFiles) -> str:
    changed = {n: value for n, value in run.config.items() if n not in DEFAULTS or DEFAULTS[n] != value}
    rest = {name: value for name, value in run.config.items() if name not in changed}
    found = "<h3>Other than the defaults</h3>" + html.pairs(changed) + html.details("Defaults", html.pairs(rest))
    rng, versions = run.privacy.get("rng"), run.card.get("versions")
    if isinstance(rng, dict):
        found += "<h3>Randomness</h3>" + html.pairs(rng)
    if isinstance(versions, dict):
        found += html.details("Versions", html.pairs(versions))
    return found
