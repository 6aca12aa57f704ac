"""A run directory is data: the code that it names runs when its source is the run's own, or when somebody else names it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedray.commands.cli import main
from fedray.config.user_code import source_of
from fedray.rundir.checkpoint import DESCRIPTION
from fedray.rundir.files import sealed, unsealed
from tests.bad_input.cases import check_one_sentence

KEPT = Path(__file__).parent.parent / "formats" / "0.1.0" / "unfinished"
MINE = """import torch
def model():
    return torch.nn.Linear(16, 4)
"""
JOB = [
    *("--pool", "inline", "--gateways", "2", "--local-steps", "2", "--samples-per-gateway", "64", "--batch-size", "8"),
    *("--seed", "1", "--quiet"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json in a directory and in its checkpoints, seals and all, as somebody hostile would."""
    for file in (run / "checkpoint").glob("0*.safetensors"):
        data = file.read_bytes()
        texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        description = unsealed(texts[DESCRIPTION].encode())
        change(description["config"])
        save_file(load_file(file), file, {**texts, DESCRIPTION: sealed(description).decode()})
    card = json.loads((run / "config.json").read_text())
    change(card)
    (run / "config.json").write_text(json.dumps(card, indent=2) + "\n")


def _run_mine(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(MINE)
    assert main([*JOB, "--rounds", "2", "--model", f"{name}:model", "--out", "run"]) == 0
    for key in [one for one in sys.modules if one == name]:
        del sys.modules[key]


def test_resume_runs_the_code_that_the_run_began_with(folder: Path) -> None:
    _run_mine(folder, "mine_same")
    assert main(["--quiet", "--resume", "run", "--rounds", "3"]) == 0


def test_resume_does_not_run_code_that_was_changed_until_it_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_mine(folder, "mine_changed")
    marker = folder / "imported"
    (folder / "mine_changed.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n{MINE}")
    for more in ([], ["--dry-run"]):
        assert main(["--quiet", "--resume", "run", "--rounds", "3", *more]) == 2
        check_one_sentence(capsys.readouterr().err, ("names mine_changed:model for --model", "name it again"))
        assert not marker.exists()
    assert main(["--quiet", "--resume", "run", "--rounds", "3", "--model", "mine_changed:model"]) == 0
    assert marker.exists()


@pytest.mark.parametrize("value", ["os:_exit", "builtins:exit", "torch:nonsense", "missing_module:model"])
@pytest.mark.parametrize("setting", ["model", "dataset", "task", "track", "algorithm"])
def test_resume_does_not_run_what_a_directory_names(
    setting: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(KEPT, folder / "run")

    def change(card: dict[str, Any]) -> None:
        card["config"][setting] = value
        card["code"] = {setting: None}

    _rewrite(folder / "run", change)
    assert main(["--quiet", "--resume", "run"]) == 2
    check_one_sentence(capsys.readouterr().err, (f"names {value} for --{setting}", "name it again"))


@pytest.mark.parametrize("command", [["verify"], ["report"]])
def test_reading_commands_never_import_what_a_directory_names(command: list[str], folder: Path) -> None:
    shutil.copytree(KEPT, folder / "run")
    (folder / "bomb.py").write_text("import pathlib; pathlib.Path('imported').touch()\n")

    def change(card: dict[str, Any]) -> None:
        for setting in ("model", "dataset", "task", "algorithm", "track", "noise_shape", "clip", "partition"):
            card["config"][setting] = "bomb:go"

    _rewrite(folder / "run", change)
    subprocess.run([sys.executable, "-m", "fedray", *command, "run"], capture_output=True, check=False)
    assert not (folder / "imported").exists()


def test_source_of_finds_modules_without_running_them(folder: Path) -> None:
    (folder / "package_of_mine").mkdir()
    (folder / "package_of_mine" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "package_of_mine" / "inner.py").write_text("x = 1\n")
    assert source_of("package_of_mine.inner:x") == b"x = 1\n"
    assert source_of("package_of_mine:x") == b"raise SystemExit('imported')\n"
    assert source_of("os:_exit") is None
    assert source_of("torch.nn:Linear") is None
    assert source_of("no_such_module:x") is None
    assert not any(name.startswith("package_of_mine") for name in sys.modules)
