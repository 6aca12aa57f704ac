"""Draw docs/architecture.md's picture from the code: which part of fedray imports which.

    python docs/architecture.py [--check]

Rewrites the picture in place; with --check it only tells whether the picture is the code's (exit code 1 when it is not).
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/architecture.py -->", "<!-- end of what is drawn -->"


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each module's part, the first word of its path, and its file."""
    for path in sorted((ROOT / "fedray").rglob("*.py")):
        part = path.relative_to(ROOT / "fedray").parts[0].removesuffix(".py")
        if not part.startswith("__"):
            yield part, path


def picture() -> str:
    """Return the graph of parts; an arrow that follows from others is left out."""
    below: dict[str, set[str]] = {}
    for part, path in modules():
        found = below.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedray."):
                found.add((node.module or "").split(".")[1])
        found.discard(part)
    lines = []
    for part in sorted(below):
        implied = set().union(*(_all_below(other, below) for other in below[part]))
        lines += [f"    {part} --> {other}" for other in sorted(below[part] - implied)]
    return "```mermaid\ngraph TD\n" + "\n".join(lines) + "\n```"


def _all_below(part: str, below: dict[str, set[str]]) -> set[str]:
    found = set(below[part])
    for other in below[part]:
        found |= _all_below(other, below)
    return found


def main() -> int:
    """Draw or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    drawn = f"{head}{BEGIN}\n\n{picture()}\n\n{END}{tail}"
    if wanted.check:
        if drawn != text:
            print(f"{PAGE} is not what the code is; run python docs/architecture.py", file=sys.stderr)
        return int(drawn != text)
    PAGE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
