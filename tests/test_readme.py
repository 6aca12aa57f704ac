"""The commands and programs of the README and of docs/ are run as they stand, the long ones with a smaller job."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NEEDS_MACHINES = {"cluster.md", "container.md"}
"""Pages whose commands need Docker or several machines: `tests/cluster/` checks them."""
PAGES = [
    README,
    *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in NEEDS_MACHINES),
]
FIRST = "python -m fedray --gateways 16 --noise-level sample"
OWN = "python -m fedray --dataset mine:data"
DIGITS = ("python -m fedray --dataset digits --gateways 20", "python -m fedray --dataset digits --gateways 16")
SUITE = "python -m pytest"
"""Whoever runs these tests runs this one."""
SMALL = [
    *("--pool", "inline", "--rounds", "2", "--local-steps", "4"),
    *("--samples-per-gateway", "256", "--batch-size", "16"),
]
SLOW = pytest.mark.slow


def _blocks(language: str) -> list[str]:
    return [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)]


def _commands() -> list[str]:
    """Return each command of the pages once, without comments and installations."""
    lines = [line.split("#")[0] for block in _blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [" ".join(command.split()) for line in lines for command in line.split("&&")]
    return [command for command in dict.fromkeys(commands) if command and not command.startswith("pip install")]


def _arguments(command: str) -> list[str]:
    program, *rest = command.split()
    assert program == "python", command
    return [sys.executable, *rest]


def _command(beginning: str) -> list[str]:
    """Return the arguments of the pages' one command that begins like this."""
    found = [command for command in _commands() if command.startswith(beginning)]
    assert len(found) == 1, f"{len(found)} commands begin with {beginning!r}"
    return _arguments(found[0])


def _others() -> list[str]:
    """Return the commands that have no test of their own here and need no run directory."""
    own = (FIRST, OWN, *DIGITS)
    return [one for one in _commands() if not one.startswith(own) and one != SUITE and "runs/DIR" not in one]


def _write_mine(folder: Path) -> None:
    (own,) = (program for program in _blocks("python") if program.startswith("# mine.py"))
    (folder / "mine.py").write_text(own)


def _run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _accuracy(printed: str) -> float:
    found = re.search(r"accuracy (0\.\d+) on held-out data", printed)
    assert found, printed
    return float(found[1])


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WORKED = re.findall(r"```python\n# (\w+)\.py\n(.*?)```\n\n```sh\n(.*?)\n```", CONTRIBUTING, flags=re.DOTALL)


def test_contributing_has_a_worked_example_of_each_kind() -> None:
    flags = " ".join(command for _, _, command in WORKED)
    assert re.findall(r"--(server-optimizer|algorithm|task|dataset|clip)\b", flags) == [
        "server-optimizer", "algorithm", "task", "dataset", "clip",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "program", "command"), WORKED, ids=[name for name, _, _ in WORKED])
def test_contributing_worked_examples_run(name: str, program: str, command: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(program)
    small = [*SMALL, "--gateways", "2"]
    if "--dataset" in command:  # fedray cuts its shards
        small = [one for one in small if one not in ("--samples-per-gateway", "256")]
    _run([*_arguments(command), *small], tmp_path)


def test_readme_first_screen_holds_both_commands() -> None:
    first = "\n".join(README.splitlines()[:24])
    assert "pip install -e . && python -m fedray --gateways 16 --noise-level sample\n" in first
    assert 'pip install -e ".[test]" && python -m pytest\n' in first


def test_readme_first_command_trains_privately(tmp_path: Path) -> None:
    printed = _run(_command(FIRST), tmp_path)
    assert _accuracy(printed) >= 0.90
    assert "epsilon 1.324 per record (add-or-remove, delta 1e-05)" in printed
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_readme_own_model_and_data_run(tmp_path: Path) -> None:
    _write_mine(tmp_path)
    assert _accuracy(_run([*_command(OWN), "--pool", "inline", "--rounds", "3"], tmp_path)) > 0.6


def test_docs_python_entry_runs(tmp_path: Path) -> None:
    _write_mine(tmp_path)
    (entry,) = (program for program in _blocks("python") if program.startswith("import fedray"))
    accuracy, epsilon = map(float, _run([sys.executable, "-c", entry], tmp_path).split())
    assert accuracy > 0.6
    assert 0 < epsilon < 20


def test_docs_hold_no_program_that_no_test_runs() -> None:
    assert [program.splitlines()[0] for program in _blocks("python")] == ["# mine.py", "import fedray"]


def test_docs_hold_no_command_that_no_test_runs() -> None:
    assert [command for command in _commands() if not command.startswith(("python -m fedray ", SUITE))] == []


@SLOW
@pytest.mark.parametrize("beginning", DIGITS)
def test_docs_digits_commands_reach_their_accuracy(beginning: str, tmp_path: Path) -> None:
    assert _accuracy(_run([*_command(beginning), "--seed", "0"], tmp_path)) >= 0.80


@SLOW
def test_docs_run_directory_commands_work(tmp_path: Path) -> None:
    directory = tmp_path / "runs/DIR"
    _run([sys.executable, "-m", "fedray", "--pool", "inline", "--rounds", "4", "--out", str(directory)], tmp_path)
    commands = [command for command in _commands() if "runs/DIR" in command]
    assert len(commands) >= 4
    for command in commands:
        _run(_arguments(command), tmp_path)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 20
    assert (directory / "report.html").exists()


@SLOW
@pytest.mark.parametrize("command", _others())
def test_docs_other_command_runs(command: str, tmp_path: Path) -> None:
    takes_a_job = not command.startswith("python -m fedray plan")
    _run([*_arguments(command), *(SMALL if takes_a_job else [])], tmp_path)
