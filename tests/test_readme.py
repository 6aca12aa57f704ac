"""The README's commands and programs are run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SLOW = pytest.mark.slow


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _command(beginning: str) -> list[str]:
    """Return the arguments of the README's one command that begins like this."""
    joined = [block.replace("\\\n", " ") for block in _blocks("sh")]
    lines = [line.split("#")[0].strip() for block in joined for line in block.splitlines()]
    commands = [line.rpartition("&& ")[2] for line in lines]
    found = sorted({command for command in commands if command.startswith(beginning)})
    assert len(found) == 1, f"{len(found)} commands of the README begin with {beginning!r}"
    return [sys.executable, *found[0].split()[1:]]


def _run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _accuracy(printed: str) -> float:
    found = re.search(r"accuracy (0\.\d+) on held-out data", printed)
    assert found, printed
    return float(found[1])


def test_readme_first_screen_holds_both_commands() -> None:
    first = "\n".join(README.splitlines()[:24])
    assert "pip install -e . && python -m fedray --gateways 16 --noise-level sample\n" in first
    assert 'pip install -e ".[test]" && python -m pytest\n' in first


def test_readme_first_command_trains_privately(tmp_path: Path) -> None:
    printed = _run(_command("python -m fedray --gateways 16 --noise-level sample"), tmp_path)
    assert _accuracy(printed) >= 0.90
    assert "epsilon 1.324 per record (add-or-remove, delta 1e-05)" in printed
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_readme_own_model_and_data_run(tmp_path: Path) -> None:
    programs = _blocks("python")
    own = next(program for program in programs if program.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(own)
    arguments = _command("python -m fedray --dataset mine:data")
    assert _accuracy(_run([*arguments, "--pool", "inline", "--rounds", "3"], tmp_path)) > 0.6


def test_readme_python_entry_runs(tmp_path: Path) -> None:
    programs = _blocks("python")
    (tmp_path / "mine.py").write_text(next(program for program in programs if program.startswith("# mine.py")))
    entry = next(program for program in programs if program.startswith("import fedray"))
    accuracy, epsilon = map(float, _run([sys.executable, "-c", entry], tmp_path).split())
    assert accuracy > 0.6
    assert 0 < epsilon < 20


@SLOW
@pytest.mark.parametrize(
    ("beginning", "least"),
    [
        ("python -m fedray --dataset digits --gateways 20", 0.80),
        ("python -m fedray --dataset digits --gateways 16", 0.80),
    ],
)
def test_readme_digits_commands_reach_their_accuracy(beginning: str, least: float, tmp_path: Path) -> None:
    assert _accuracy(_run([*_command(beginning), "--seed", "0"], tmp_path)) >= least


@SLOW
def test_readme_run_directory_commands_work(tmp_path: Path) -> None:
    _run(
        [sys.executable, "-m", "fedray", "--pool", "inline", "--rounds", "4", "--out", str(tmp_path / "runs/DIR")],
        tmp_path,
    )
    for beginning in (
        "python -m fedray --resume runs/DIR --rounds 20",
        "python -m fedray verify runs/DIR",
        "python -m fedray report runs/DIR",
    ):
        _run(_command(beginning), tmp_path)
    assert (tmp_path / "runs/DIR/report.html").exists()
