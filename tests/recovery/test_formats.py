"""Run directories of every released version are read and resumed; those of a newer one are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fedray
from fedray.commands.cli import main
from fedray.config.files import FORMAT

KEPT = Path(__file__).parent.parent / "formats"
VERSIONS = sorted(folder.name for folder in KEPT.iterdir())


def _copy(version: str, name: str, tmp_path: Path) -> Path:
    run = tmp_path / name
    shutil.copytree(KEPT / version / name, run)
    for file in (run / "checkpoint").iterdir():
        file.chmod(0o600)
    return run


@pytest.mark.parametrize("version", VERSIONS)
def test_formats_an_unfinished_run_goes_on(version: str, tmp_path: Path) -> None:
    run = _copy(version, "unfinished", tmp_path)
    before = (run / "metrics.jsonl").read_bytes().splitlines()[0]  # what a checkpoint had counted
    charged = (run / "ledger.jsonl").read_bytes()
    assert main(["--resume", str(run), "--quiet"]) == 0
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    assert (run / "ledger.jsonl").read_bytes().startswith(charged)
    card = json.loads((run / "config.json").read_bytes())
    assert card["format"] == FORMAT
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == card["config"]["rounds"]
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_formats_a_finished_run_is_verified_reported_and_extended(version: str, tmp_path: Path) -> None:
    run = _copy(version, "finished", tmp_path)
    assert main(["verify", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["--resume", str(run), "--quiet"]) == 0  # complete already
    assert "format" not in json.loads((run / "config.json").read_bytes()) or version != "0.1.0"
    assert main(["--resume", str(run), "--rounds", "5", "--quiet"]) == 0
    assert json.loads((run / "privacy.json").read_bytes())["rounds"] == 5
    assert main(["verify", str(run)]) == 0


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    run = _copy(VERSIONS[-1], "unfinished", tmp_path)
    card = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps({**card, "format": FORMAT + 1, "versions": {"fedray": "9.9.9"}}))
    return run


@pytest.mark.parametrize("command", [["--resume"], ["--dry-run", "--resume"], ["verify"], ["report"], ["--config"]])
def test_formats_a_newer_run_is_refused_by_name(
    command: list[str], newer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in newer.rglob("*") if path.is_file()}
    named = newer / "config.json" if command == ["--config"] else newer
    assert main([*command, str(named)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"was written by fedray 9.9.9 in format {FORMAT + 1}, and this fedray reads formats up to {FORMAT}" in said
    assert {path: path.read_bytes() for path in newer.rglob("*") if path.is_file()} == before


def test_formats_of_every_release_are_kept() -> None:
    changes = (KEPT.parent.parent / "CHANGELOG.md").read_text()
    released = {line.split()[1] for line in changes.splitlines() if line.startswith("## ") and "not yet" not in line}
    assert released == set(VERSIONS)
    assert fedray.__version__ not in released or fedray.__version__ == VERSIONS[-1]
