"""The pages that people read point at files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *DOCS,
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]


def _links(page: Path) -> list[str]:
    """Return the relative targets of a page's links and pictures, without what follows a #."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^()\s]+)\)", text)]
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_to_files_that_exist(page: Path) -> None:
    assert [target for target in _links(page) if not (page.parent / target).exists()] == []


def test_readme_links_are_found() -> None:
    assert {"docs/README.md", "docs/privacy.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(_links(ROOT / "README.md"))


def test_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    assert set(_links(index)) == {page.name for page in DOCS} - {index.name}
