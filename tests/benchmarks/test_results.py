"""benchmarks/results keeps the newest report of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DATED = re.compile(r"\d{4}-\d\d-\d\d-(?P<kind>.+?)(-\d+)?")


def repeated_kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the kinds of dated reports that there are several of, each with its reports' names.

    A report's files share a name but for their endings; `-2`, `-3` and so on tell reports of one kind and day apart.
    """
    reports: dict[str, list[str]] = {}
    for stem in sorted({Path(name).stem for name in names}):
        if found := DATED.fullmatch(stem):
            reports.setdefault(found["kind"], []).append(stem)
    return {kind: stems for kind, stems in reports.items() if len(stems) > 1}


def test_results_hold_one_report_of_each_kind() -> None:
    assert repeated_kinds(path.name for path in RESULTS.iterdir()) == {}


def test_repeated_kinds_finds_other_days_and_numbers() -> None:
    names = ["2026-01-01-zoo.md", "2026-01-02-zoo.md", "2026-01-02-zoo-2.json", "2026-01-01-image.md"]
    assert repeated_kinds(names) == {"zoo": ["2026-01-01-zoo", "2026-01-02-zoo", "2026-01-02-zoo-2"]}


def test_repeated_kinds_keeps_longer_names_and_undated_files_apart() -> None:
    names = ["2026-01-01-zoo-2.md", "2026-01-01-zoo-2.png", "2026-01-01-zoo-groups-of-16-mb.md", "zoo.md"]
    assert repeated_kinds(names) == {}
