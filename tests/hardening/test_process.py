"""Signals, and standard streams that are closed, full or narrow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

JOB = [
    *(sys.executable, "-m", "fedray", "--pool", "inline", "--gateways", "2", "--rounds", "3", "--local-steps", "2"),
    *("--samples-per-gateway", "64", "--batch-size", "8", "--seed", "1", "--out", "run"),
]


def _run(command: list[str], folder: Path, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with redirections."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {shell}', "sh", *command], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_leave_a_whole_run(closed: str, tmp_path: Path) -> None:
    """The ledger must not get the number of a closed stream, and what others print to it."""
    done = _run(JOB, tmp_path, closed)
    assert done.returncode == 0, done.stderr
    assert _run([sys.executable, "-m", "fedray", "verify", "run"], tmp_path).returncode == 0


def test_ascii_output_is_escaped(tmp_path: Path) -> None:
    done = subprocess.run(
        JOB, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"\\xd7" in done.stdout


def test_full_output_is_not_blamed_on_the_run_directory(tmp_path: Path) -> None:
    done = _run(JOB, tmp_path, ">/dev/full")
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    assert first.startswith(
        "error: standard output cannot be written ([Errno 28] No space left on device); use --quiet"
    )
    assert "run directory" not in done.stderr
    assert len(rest) <= 1
    assert all(line.startswith("Go on with: python -m fedray --resume ") for line in rest)


@pytest.mark.parametrize("command", [["--help"], ["plan"], ["verify", "run"]])
def test_full_output_of_other_commands_is_one_sentence(command: list[str], tmp_path: Path) -> None:
    _run(JOB, tmp_path)
    done = _run([sys.executable, "-m", "fedray", *command], tmp_path, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written")
    assert done.stderr.count("\n") == 1


def _usual_signals() -> None:
    # A shell that starts the tests in the background, or nohup, has signals ignored, and children inherit that.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


@contextmanager
def _long_job(folder: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run that takes minutes, wait until it trains, and stop it in the end."""
    job = [*before, *(" ".join(JOB).replace("--rounds 3 --local-steps 2", "--rounds 100000 --local-steps 64").split())]
    process = subprocess.Popen(
        job,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_usual_signals,  # noqa: PLW1509 - the function only resets signals
    )
    try:
        deadline = time.monotonic() + 120
        metrics = folder / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_interrupts_the_run_and_names_the_remedy(name: str, tmp_path: Path) -> None:
    with _long_job(tmp_path) as process:
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith(
        "error: interrupted; the round under way was abandoned. Go on with: python -m fedray --resume "
    )
    assert said.count("\n") == 1


def test_three_quick_interrupts_exit_with_130(tmp_path: Path) -> None:
    with _long_job(tmp_path) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    done = _run([sys.executable, "-m", "fedray", "--dry-run", "--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr


def test_nohup_keeps_a_run_going(tmp_path: Path) -> None:
    with _long_job(tmp_path, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None


@pytest.mark.parametrize("name", ["numpy.py", "torch.py", "json.py", "tyro.py", "ray.py"])
def test_commands_do_not_import_what_lies_in_the_current_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("import pathlib; pathlib.Path('imported').touch(); raise SystemExit(77)\n")
    assert _run(JOB, tmp_path).returncode == 0
    assert _run([sys.executable, "-m", "fedray", "report", "run"], tmp_path).returncode == 0
    assert not (tmp_path / "imported").exists()
