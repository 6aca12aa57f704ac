"""`fedray report`: one file that says what the run did and promises, needs nothing else, and reads well anywhere."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedray.commands.cli import main
from fedray.reports import elements as html
from fedray.reports.charts import Curve, nice_ticks, round_ticks, svg
from fedray.rundir.cards import format_epsilon
from tests.commands import browser

Output = pytest.CaptureFixture[str]
_VOID = {"meta", "img", "line", "circle", "polyline", "br"}
HOSTILE = "<script>alert(1)</script>&\"'"


def _png() -> str:
    """Return a white pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\xff")),
        (b"IEND", b""),
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)).decode()


AUDIT: dict[str, Any] = {
    "verdict": "consistent",
    "attacks": [
        {
            "name": "distinguishing game",
            "level": "sample",
            "unit": "record",
            "claim": 1.0,
            "lower_bound": 0.84,
            "confidence": 0.999999,
            "smallest_leak_caught": 1.25,
            "text": f"Two worlds. {HOSTILE}",
        }
    ],
    "outliers": [{"detector": "LOF", "sigma": 0.5, "auc": 0.61, "interval": [0.5, 0.71]}],
    "pictures": [
        {"title": "read off", "png_base64": _png()},
        {"title": "drawn", "svg": "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'><circle r='4'/></svg>"},
        {"title": "broken", "png_base64": '"><script>'},
    ],
    "notes": ["A bound proves a leak, never its absence."],
}


class _Page(HTMLParser):
    """Collects what the tests ask about, and checks that elements nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self._silent = 0
        self.feed(source)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(run: Path) -> _Page:
    assert main(["report", str(run)]) == 0
    return _Page((run / "report.html").read_text())


@pytest.mark.parametrize("run", ["none", "sample", "batch", "gateway", "target", "stopped"], indirect=True)
def test_report_is_one_sound_page_for_every_level(run: Path) -> None:
    page = _page(run)
    assert {"html", "title", "h1", "main", "svg"} <= {tag for tag, _ in page.tags}
    assert page.of("html") == [{"lang": "en"}]
    assert "Verified when this report was written" in page.words


def test_report_fetches_and_runs_nothing(run: Path) -> None:
    (run / "audit.json").write_text(json.dumps(AUDIT))
    page = _page(run)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "url(" not in (run / "report.html").read_text()


@pytest.mark.parametrize("run", ["batch"], indirect=True)
def test_report_tells_the_privacy_card_in_plain_words(run: Path) -> None:
    words = _page(run).words
    card = json.loads((run / "privacy.json").read_text())
    for guarantee in card["guarantees"]:
        assert guarantee["mechanism"] in words
    assert words.count("against whom") == 3
    assert "everybody, the orchestrator included" in words
    assert "a gateway as a whole, with all its records" in words
    assert "changes the odds of whatever an observer may see" in words
    for line in [*card["not_covered"], *card["treated_as_public"]]:
        assert line in words


@pytest.mark.parametrize(
    ("run", "curves"),
    [("none", 2), ("sample", 3), ("batch", 4)],
    indirect=["run"],
)
def test_report_draws_accuracy_loss_and_epsilon(run: Path, curves: int) -> None:
    page = _page(run)
    labels = [attributes["aria-label"] or "" for attributes in page.of("svg")]
    assert len(labels) == curves
    assert labels[0].startswith("accuracy on held-out data against rounds: ")
    assert labels[1].startswith("loss on held-out data against rounds: ")
    assert len(page.of("circle")) == 3 * curves


@pytest.mark.parametrize("run", ["stopped"], indirect=True)
def test_report_draws_the_budget(run: Path) -> None:
    assert "--max-epsilon 5" in _page(run).words


def test_report_shows_settings_placement_and_phases(run: Path) -> None:
    words = _page(run).words
    for part in (
        "this process, cpu",
        "samples_per_gateway",
        "256",
        "train",
        "aggregate",
        "share of total",
        "dp-accounting",
    ):
        assert part in words


def test_report_shows_the_audit(run: Path) -> None:
    (run / "audit.json").write_text(json.dumps(AUDIT))
    page = _page(run)
    for part in (
        "None of 1 attacks",
        "proven at least",
        "0.84",
        "0.5 – 0.71",
        "never its absence",
        "This picture is damaged",
    ):
        assert part in page.words
    assert HOSTILE in page.words  # as text
    assert [image["alt"] for image in page.of("img")] == ["read off", "drawn"]


def test_report_says_when_the_audit_failed_or_was_of_another_run(run: Path) -> None:
    (run / "audit.json").write_text(json.dumps({"verdict": "VIOLATED", "level": "batch"}))
    words = _page(run).words
    assert "An attack proved a leak" in words
    assert "this audit attacked other settings than this run's (level)" in words


def test_report_without_audit_has_no_such_section(run: Path) -> None:
    assert "audit" not in {attributes.get("id") for _, attributes in _page(run).tags}


def test_report_of_a_damaged_run_says_so_at_its_top(run: Path) -> None:
    text = (run / "privacy.json").read_text()
    (run / "privacy.json").write_text(text.replace('"epsilon": ', '"epsilon": 0.'))
    words = _page(run).words
    assert words.index("Not true:") < words.index("What is not covered")
    assert "Verified" not in words


def test_report_of_an_unfinished_run_says_so(run: Path) -> None:
    for name in ("model.safetensors", "privacy.json", "manifest.json"):
        (run / name).unlink()
    words = _page(run).words
    assert "Unfinished run." in words
    assert "epsilon per record" in words


@pytest.mark.parametrize("run", ["none"], indirect=True)
def test_report_without_privacy_promises_nothing(run: Path) -> None:
    assert "--noise-level none promises nothing" in _page(run).words


@pytest.mark.parametrize(("run", "curves"), [("sample", 0), ("batch", 2), ("gateway", 3)], indirect=["run"])
def test_report_names_mu_where_the_curve_is_gaussian(run: Path, curves: int) -> None:
    words = _page(run).words
    assert words.count("whole curve") == curves
    for guarantee in json.loads((run / "privacy.json").read_text())["guarantees"]:
        assert guarantee["mu"] is None or f"mu = {format_epsilon(guarantee['mu'])}" in words


def test_report_warns_of_a_large_delta(run: Path, outdir: Path) -> None:
    assert "Large delta." not in _page(run).words
    flags = "--gateways 2 --rounds 1 --samples-per-gateway 64 --pool inline --delta 0.02 --quiet"
    assert main([*flags.split(), "--out", str(outdir)]) == 0
    assert "Large delta. --delta is 0.02, not below 1/64" in " ".join(_page(outdir).words.split())


def test_report_of_seeded_noise_says_simulation_only(outdir: Path) -> None:
    flags = "--gateways 2 --rounds 1 --samples-per-gateway 64 --pool inline --seed 1 --quiet"
    assert main([*flags.split(), "--out", str(outdir)]) == 0
    assert "Simulation only." in _page(outdir).words


def test_report_goes_where_it_is_told(run: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "elsewhere.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert not (run / "report.html").exists()
    assert f"report: {out}" in capsys.readouterr().out


def test_report_changes_nothing_else_in_the_run(run: Path) -> None:
    _page(run)
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("damage", ["config.json", "metrics.jsonl"])
def test_report_refuses_what_cannot_be_shown(run: Path, damage: str, capsys: Output) -> None:
    (run / damage).write_text("nonsense\n")
    assert main(["report", str(run)]) == 2
    assert "cannot be shown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "rundir"),
        (["/nowhere"], 2, "is no run directory"),
        (["{run}", "--out", "/nowhere/x.html"], 1, "cannot be written"),
    ],
)
def test_report_refuses_bad_arguments(run: Path, arguments: list[str], code: int, words: str, capsys: Output) -> None:
    assert main(["report", *(argument.format(run=run) for argument in arguments)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.1234, 0.1235), (-3.0, 7e6), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9), (0.93, 0.94)]
)
def test_nice_ticks_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert len(set(ticks)) == len(ticks)


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (1, 10), (1, 24), (7, 1000)])
def test_round_ticks_are_few_whole_rounds(first: int, last: int) -> None:
    ticks = round_ticks(first, last)
    assert ticks[0] == first
    assert ticks[-1] == last
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 7


@pytest.mark.parametrize("count", [1, 2, 41, 5000])
def test_svg_stays_inside_its_frame(count: int) -> None:
    points = [(number, (-1.0) ** number * number) for number in range(1, count + 1)]
    drawn = svg(Curve(name="x", points=points, limit=(count * 1.5, "limit")))
    assert len(drawn) < 20_000
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", re.search(r'points="(.*?)"', drawn)[1]):  # type: ignore[index]
        assert 0 <= float(x) <= 360
        assert 0 <= float(y) <= 230


def test_elements_escape_what_comes_in() -> None:
    for made in (
        html.paragraph(HOSTILE), html.bullets([HOSTILE]), html.note(HOSTILE, HOSTILE), html.tile(HOSTILE, HOSTILE),
        html.card(HOSTILE), html.pairs({HOSTILE: HOSTILE}), html.table(HOSTILE, [HOSTILE], [[HOSTILE]], wide=True),
        html.details(HOSTILE, ""), html.figure(HOSTILE, ""), html.checks([(True, HOSTILE, HOSTILE)]),
        svg(Curve(name=HOSTILE, points=[(1, 1.0)], limit=(1.0, HOSTILE))),
    ):  # fmt: skip
        assert "<script" not in made


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("run", ["none", "batch"], indirect=True)
def test_report_lies_well_in_a_browser(run: Path, width: int, tmp_path: Path) -> None:
    (run / "audit.json").write_text(json.dumps(AUDIT))
    assert main(["report", str(run)]) == 0
    layout = browser.lay_out(run / "report.html", width, tmp_path)
    assert layout.scroll_width <= layout.client_width == width
    assert layout.wide == []
    assert layout.fetched == []
    assert layout.console == []
    assert layout.smallest_text >= (9 if width == 320 else 12)
