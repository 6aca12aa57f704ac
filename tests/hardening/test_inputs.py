"""Inputs that ended in tracebacks, failed late or were taken in silence: one sentence, exit code 2, and nothing was made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.commands.cli import main
from fedray.config.settings import RunConfig
from fedray.errors import InputError
from tests.bad_input.cases import check_one_sentence

HUGE = "1" + "0" * 400
ARGUMENTS = {
    "rounds_huge": (["--rounds", HUGE], "--rounds"),
    "local_steps_huge": (["--local-steps", str(10**12)], "--local-steps"),
    "gateways_huge": (["--gateways", str(10**20)], "--gateways"),
    "gateways_many": (["--gateways", str(10**9)], "--gateways"),
    "records_many": (["--samples-per-gateway", str(10**13)], "--samples-per-gateway"),
    "records_past_memory": (["--samples-per-gateway", str(10**9)], "--samples-per-gateway"),
    "batch_huge": (["--batch-size", HUGE], "--batch-size"),
    "failures_huge": (["--max-failures", HUGE], "--max-failures"),
    "alpha_huge": (["--partition", "dirichlet:1e308"], "--partition"),
    "alpha_tiny": (["--partition", "dirichlet:1e-300"], "--partition"),
    "plan_rounds": (["plan", "--rounds", str(10**30)], "--rounds"),
    "plan_records": (["plan", "--records", str(10**30)], "records"),
    "report_root": (["report", "/nowhere", "--out", "/"], "--out"),
    "report_empty": (["report", "/nowhere", "--out", ""], "--out"),
    "out_nul": (["--out", "a\0b"], "--out"),
    "out_bytes": (["--out", "a\udcffb"], "--out"),
    "out_empty": (["--out", ""], "--out"),
    "out_here": (["--out", "."], "--out"),
    "out_home": (["--out", "~/runs/x"], "--out"),
    "resume_empty": (["--resume", ""], "--resume"),
    "address_empty": (["--ray-address", ""], "--ray-address"),
    "other_digits": (["--rounds", "３"], "--rounds"),
    "other_digits_float": (["--lr", "٠.٥"], "--lr"),
    "clip_without_noise": (["--noise-level", "none", "--clip-norm", "2"], "--clip-norm"),
    "target_past_reach": (["--target-epsilon", "1e12"], "--target-epsilon"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_main_refuses_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, named = ARGUMENTS[name]
    pool = [] if arguments[0] in ("plan", "report") else ["--pool", "inline"]
    assert main([*arguments, *pool]) == 2
    check_one_sentence(capsys.readouterr().err.encode("ascii", "backslashreplace").decode(), (named,))
    assert list(tmp_path.iterdir()) == []


def test_config_refuses_a_name_in_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("dry-run = true\ndry_run = false\n")
    assert main(["--config", str(tmp_path / "run.toml")]) == 2
    check_one_sentence(capsys.readouterr().err, ("gives dry_run twice",))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"fedray", b"--out", os.fsencode(tmp_path) + b"/\xff"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: --out is ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("path", ["", ".", "..", "/", "~", "~x/run", "a\0"])
def test_run_config_refuses_paths_that_name_nothing(path: str) -> None:
    with pytest.raises(InputError, match="--out"):
        RunConfig().resolve(out=path)


FORKS = """import os, torch
def model():
    if os.fork() == 0:
        return torch.nn.Linear(16, 4)
    return torch.nn.Linear(16, 4)
def deep():
    return deep()
"""


def test_a_model_that_forks_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    small = ["--pool", "inline", "--gateways", "2", "--rounds", "1", "--local-steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "fedray", *small, "--model", "forks:model", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round 1/1") == 1


def test_a_model_that_recurses_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recurses.py").write_text(FORKS)
    assert main(["--pool", "inline", "--model", "recurses:deep"]) == 2
    check_one_sentence(capsys.readouterr().err, ("--model recurses:deep", "RecursionError"))
