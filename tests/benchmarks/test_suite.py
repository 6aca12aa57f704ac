"""The arithmetic of the benchmarks' reports; running them is `python benchmarks/throughput.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from suite.cases import cases
from suite.findings import Bar
from suite.growth import Point, Series
from suite.report import acceptance_table, markdown_table


def point(size: int, round_s: float) -> Point:
    return Point(size=size, round_s=round_s, cold_start_s=1.0, driver_peak_mb=1.0, tree_peak_mb=1.0, phases={})


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (2.0, False, "met"),
        (1.99, False, "MISSED"),
        (2.0, True, "met"),
        (2.01, True, "MISSED"),
        (float("nan"), False, "MISSED"),
        (None, False, "not measured in this run"),
    ],
)
def test_bar_says_whether_it_is_met(value: float | None, at_most: bool, verdict: str) -> None:
    assert Bar(number="1", text="a ratio", value=value, bar=2.0, at_most=at_most).verdict == verdict


def test_acceptance_table_shows_what_is_missed_and_what_was_not_measured() -> None:
    lines = [
        Bar(number="1", text="slow", value=1.0, bar=2.0),
        Bar(number="2", text="left out", value=None, bar=3.0),
    ]
    missed, left_out = acceptance_table(lines).splitlines()[2:]
    assert "MISSED" in missed
    assert "not measured" in left_out


def test_series_finds_the_exponent_of_each_stretch() -> None:
    series = Series(axis="gateways", fixed="", points=(point(10, 1.0), point(100, 1.0), point(1000, 10.0)))
    assert series.exponents() == pytest.approx([0.0, 1.0])
    flat, linear = series.sentences()
    assert flat.endswith("less than linear.")
    assert linear.endswith(": linear.")


def test_markdown_table_has_columns_of_one_width() -> None:
    lines = markdown_table(("system", "s"), [("a", "1"), ("longer", "1000")]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_every_case_holds_fedray_and_quick_is_part_of_the_full_run() -> None:
    full = {case.key for case in cases(quick=False)}
    assert {case.key for case in cases(quick=True)} <= full
    for case in cases(quick=False):
        assert any(entry.label.startswith("fedray") for entry in case.entries)
