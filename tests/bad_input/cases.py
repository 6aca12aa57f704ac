"""A case of bad input: what is given, and the words that the one sentence about it must hold."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedray.commands.cli import main
from tests.arguments import changed

NOWHERE = ["--ray-address", "127.0.0.1:1"]  # whatever reached Ray would complain about this address instead


class Case(NamedTuple):
    """Arguments, the words that the sentence must hold, and the user's mine.py, if any."""

    argv: str
    words: tuple[str, ...]
    code: str = ""


def indent(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.split("\n"))


def check_one_sentence(stderr: str, words: tuple[str, ...]) -> None:
    """Check that stderr is one sentence of a sensible length that holds the words."""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith(".\n")
    assert "Traceback" not in stderr
    assert len(stderr) < 800
    missing = [word for word in words if word not in stderr]
    assert not missing, f"{missing} not in: {stderr}"


def check_refusal(
    case: Case, project: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the command line refuses a case in one sentence and leaves no file behind."""
    if case.code:
        project(case.code)
    before = sorted(tmp_path.rglob("*"))
    code = main(changed(NOWHERE, *case.argv.split()))
    seen = capsys.readouterr()
    assert code == 2, seen
    check_one_sentence(seen.err, case.words)
    assert seen.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def run_command(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)
    assert time.monotonic() - start < 60
    return done
