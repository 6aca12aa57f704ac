"""Pieces of HTML; every text that comes in is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

Mood = Literal["plain", "good", "bad", "warn"]


def text(value: object) -> str:
    """Return any value as HTML text."""
    return escape(_shown(value), quote=True)


def paragraph(value: object, lead: bool = False) -> str:
    """Return a paragraph."""
    start = '<p class="lead">' if lead else "<p>"
    return f"{start}{text(value)}</p>"


def bullets(values: Iterable[object]) -> str:
    """Return a list."""
    return f"<ul>{''.join(f'<li>{text(value)}</li>' for value in values)}</ul>"


def checks(values: Iterable[tuple[bool, str, str]]) -> str:
    """Return a list of (holds, subject, text) whose words say what its colours say."""
    items = "".join(
        f'<li class="{"good" if holds else "bad"}"><b>{"ok" if holds else "OFF"}</b> '
        f"<strong>{text(subject)}</strong>: {text(words)}</li>"
        for holds, subject, words in values
    )
    return f'<ul class="checks">{items}</ul>'


def section(title: str, *content: str) -> str:
    """Return a section with its heading; nothing when it has no content."""
    body = "".join(content)
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{body}</section>' if body else ""


def note(start: str, rest: str, mood: Mood = "plain") -> str:
    """Return a highlighted sentence whose start says in words what its colour says."""
    return f'<p class="note {mood}"><b>{text(start)}</b> {text(rest)}</p>'


def tile(value: str, label: str) -> str:
    """Return a large figure with its name."""
    return f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>'


def card(title: str, *content: str) -> str:
    """Return a boxed part."""
    return f'<div class="card"><b>{text(title)}</b>{"".join(content)}</div>'


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and values."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in values.items())}</dl>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], wide: bool = False) -> str:
    """Return a table whose first column heads its rows; a wide one scrolls in its own box on a narrow screen."""
    rows = list(rows)
    kinds = [*(rows[0] if rows else []), *head][: len(head)]
    first = "".join(
        f'<th scope="col"{_numeric(kind)}>{text(name)}</th>' for name, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{_numeric(cell)}>{cell if isinstance(cell, Bar) else text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    found = f"<table><caption>{text(caption)}</caption><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    if not wide:
        return found
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">{found}</div>'


def details(summary: str, content: str) -> str:
    """Return content that opens on demand."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def figure(caption: str, content: str) -> str:
    """Return a figure."""
    return f"<figure><figcaption>{text(caption)}</figcaption>{content}</figure>"


class Number(str):
    """A number that is formatted already."""

    __slots__ = ()


class Bar(str):
    """A cell that shows a share of 1 as a bar; the number stands beside it in words."""

    __slots__ = ()

    def __new__(cls, share: float) -> Bar:
        """Return the bar's HTML."""
        width = 100 * min(max(share, 0.0), 1.0)
        return super().__new__(cls, f'<span class="bar" style="width:{width:.1f}%" aria-hidden="true"></span>')


def _numeric(value: object) -> str:
    return ' class="number"' if isinstance(value, int | float | Number) and not isinstance(value, bool) else ""


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
