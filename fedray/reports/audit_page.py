"""The audit's part of report.html; takes any audit.json that has a verdict, and shows what else it finds in it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from fedray.reports import elements as html

_SHARED = ("noise_multiplier", "clip_norm", "sample_rate", "batch_size")
_NAMES = {
    "claim": "claimed at most",
    "lower_bound": "proven at least",
    "smallest_leak_caught": "would have caught a leak of (times the claim; where that is 0: of the measure)",
    "measure": "measured in",
    "gate": "decides the verdict",
}
_BESIDE = ("name", "text", "verdict")


def content(audit: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    """Return the HTML of verdict, attacks, pictures and notes.

    Args:
        audit: audit.json.
        privacy: privacy.json of the run; empty when there is none.
    """
    attacks = [attack for attack in _list(audit, "attacks") if isinstance(attack, dict)]
    pictures = [picture for picture in _list(audit, "pictures") if isinstance(picture, dict)]
    notes = _list(audit, "notes")
    return "".join(
        [
            _verdict(audit, sum(attack.get("verdict") not in ("powerless", "report") for attack in attacks)),
            _mismatch(audit, privacy),
            f'<div class="cards">{"".join(map(_attack, attacks))}</div>' if attacks else "",
            _outliers(_list(audit, "outliers")),
            f'<div class="charts">{"".join(map(_picture, pictures))}</div>' if pictures else "",
            f"<h3>What the audit does and does not prove</h3>{html.bullets(notes)}" if notes else "",
        ]
    )


def _verdict(audit: Mapping[str, Any], num_attacks: int) -> str:
    verdict = audit.get("verdict")
    if verdict == "consistent":
        return html.note("Consistent.", f"None of {num_attacks} attacks leaked more than is claimed.", "good")
    return html.note(f"{verdict}.", "An attack proved a leak that is larger than what is claimed.", "bad")


def _mismatch(audit: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    """Warn when the audit attacked other settings than the run's."""
    other = [name for name in _SHARED if name in audit and name in privacy and audit[name] != privacy[name]]
    if "level" in audit and "noise_level" in privacy and audit["level"] != privacy["noise_level"]:
        other.insert(0, "level")
    if not other:
        return ""
    return html.note(
        "Another run:", f"this audit attacked other settings than this run's ({', '.join(other)}).", "warn"
    )


def _attack(attack: Mapping[str, Any]) -> str:
    title = str(attack.get("name", "attack"))
    if "verdict" in attack:
        title += f": {attack['verdict']}"
    values = {
        _NAMES.get(name, name.replace("_", " ")): value for name, value in attack.items() if _is_plain(name, value)
    }
    return html.card(title, html.paragraph(attack.get("text", "")), html.pairs(values))


def _is_plain(name: str, value: Any) -> bool:
    return name not in _BESIDE and (value is None or isinstance(value, str | int | float))


def _outliers(rows: list[Any]) -> str:
    """Return the outlier report's rows, whatever their columns are: one table for each value of the column "what"."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if isinstance(row, dict):
            groups.setdefault(str(row.get("what", "all")), []).append(row)
    tables = []
    for what, group in groups.items():
        columns = list(dict.fromkeys(name for row in group for name in row if name != "what"))
        cells = [[_cell(row.get(name)) for name in columns] for row in group]
        tables.append(html.table(what, [name.replace("_", " ") for name in columns], cells, wide=True))
    if not tables:
        return ""
    heading = "<h3>Outliers before and after noise (a report, never a gate)</h3>"
    return heading + "".join(html.details(f"Table: {what}", part) for what, part in zip(groups, tables, strict=True))


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " – ".join(f"{part:.3g}" if isinstance(part, float) else str(part) for part in value)
    return html.Number(f"{value:.3g}") if isinstance(value, float) else value


def _picture(picture: Mapping[str, Any]) -> str:
    """Return a picture as an image, in which nothing can run."""
    title = str(picture.get("title", "picture"))
    if isinstance(picture.get("svg"), str):
        kind, data = "svg+xml", base64.b64encode(picture["svg"].encode()).decode()
    else:
        kind, data = "png", str(picture.get("png_base64", ""))
        try:
            base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            return html.figure(title, html.paragraph("This picture is damaged."))
    alt = html.text(picture.get("alt", title))
    return html.figure(title, f'<img src="data:image/{kind};base64,{data}" alt="{alt}">')


def _list(audit: Mapping[str, Any], name: str) -> list[Any]:
    found = audit.get(name)
    return found if isinstance(found, list) else []
