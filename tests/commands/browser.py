"""A page in headless Chromium: its layout at a width, what it logs and what it asks for, and a picture of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Runs in a frame of exactly the wanted width: headless Chromium's own window is never narrower than 500 px.
_PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe id="page" src="{name}"
style="width:{width}px;height:{height}px;border:0"></iframe><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll") && !e.closest("svg")
    && e.getClientRects().length && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.tagName + "." + e.className);
  const fonts = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
  const fetched = document.getElementById("page").contentWindow.performance.getEntriesByType("resource").map(e => e.name);
  document.title = "done";
  const found = {{scroll: root.scrollWidth, client: root.clientWidth, height: root.scrollHeight, wide: wide,
    text: Math.min(...fonts, 99), fetched: fetched}};
  document.body.insertAdjacentHTML("beforeend", "<pre id=found>" + JSON.stringify(found) + "</pre>");
}};</script>"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a page lies at a width.

    Args:
        scroll_width: Of the whole page, in CSS pixels.
        client_width: Of the view.
        height: Of the whole page.
        wide: Elements that reach past the view's right edge.
        smallest_text: Height of the smallest text in a chart.
        fetched: What the page asked for besides itself.
        console: What Chromium logged about the page.
    """

    scroll_width: int
    client_width: int
    height: int
    wide: list[str]
    smallest_text: float
    fetched: list[str]
    console: list[str]


def lay_out(page: Path, width: int, place: Path) -> Layout:
    """Open a page from the file system at this width and measure it."""
    probe = place / f"probe-{width}.html"
    shutil.copy(page, place / "page.html")
    probe.write_text(_PROBE.format(name="page.html", width=width, height=900))
    done = _chromium(place, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom", str(probe))
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)[1])  # type: ignore[index]
    return Layout(
        scroll_width=found["scroll"],
        client_width=found["client"],
        height=found["height"],
        wide=found["wide"],
        smallest_text=found["text"],
        fetched=found["fetched"],
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
    )


def picture(page: Path, width: int, height: int, out: Path, place: Path) -> None:
    """Write a PNG of a page at this width."""
    frame = place / f"frame-{width}.html"
    shutil.copy(page, place / "page.html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    _chromium(place, f"--screenshot={out}", f"--window-size={max(width, 500)},{height}", str(frame))


def _chromium(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={place / 'profile'}", *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
