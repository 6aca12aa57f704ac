"""A disk that fills up: the cause is said, the exit code is 1, the last checkpoint is intact, and the run goes on later."""

from __future__ import annotations

import contextlib
import io
import resource
from pathlib import Path
from typing import Any

import pytest

from fedray.commands.cli import main
from fedray.privacy import ledger
from fedray.rundir import files
from fedray.rundir.directory import RunDirectory
from tests.recovery.jobs import SMALL, assert_true, in_child, lines, outcome, resume, train


def fill_up(run: Path, said: Path, what: str) -> None:
    """Let one kind of write hit a limit in round 3, half-way through; exit with the command line's code."""

    def limited(function: Any, path_of: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            path: Path = path_of(*arguments)
            size = path.stat().st_size if path.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
            return function(*arguments, **named)

        return call

    def from_round_3(self: RunDirectory, record: Any) -> None:
        append(self, record)
        if record["round"] != 2:
            return
        if what == "ledger":
            ledger.append_durably = limited(ledger.append_durably, lambda path, data: path)  # type: ignore[attr-defined]
        elif what == "metrics":
            RunDirectory.append_metrics = limited(append, lambda self, record: self.path / "metrics.jsonl")  # type: ignore[method-assign]
        elif what == "model":
            RunDirectory.write_model = limited(RunDirectory.write_model, lambda self, state: Path("none"))  # type: ignore[method-assign]

    def from_state_3(self: RunDirectory, state: Any, ledger: Any) -> None:
        if what == "checkpoint" and state.round == 3:
            files.write_durably = limited(files.write_durably, lambda path, data, mode=0: Path("none"))  # type: ignore[attr-defined]
        save(self, state, ledger)

    append, save = RunDirectory.append_metrics, RunDirectory.save
    RunDirectory.append_metrics = from_round_3  # type: ignore[method-assign]
    RunDirectory.save = from_state_3  # type: ignore[method-assign]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "rounds"]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main([*flags, "--rounds", "5", "--out", str(run)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.write_text(stderr.getvalue())
    raise SystemExit(code)


@pytest.mark.parametrize("what", ["ledger", "metrics", "checkpoint", "model"])
def test_run_ends_intact_when_the_disk_is_full(what: str, disk: Path) -> None:
    run = disk / "run"
    assert in_child(fill_up, run, disk / "said", what) == 1
    (error,) = (disk / "said").read_text().splitlines()
    assert error.startswith("error: writing the run directory failed ([Errno 27] File too large")
    assert f"Go on with: python -m fedray --resume {run}" in error
    done = 5 if what == "model" else 2
    assert max(path.name for path in (run / "checkpoint").glob("0*")) == f"{done:08d}-0000.safetensors"
    assert len((run / "ledger.jsonl").read_bytes().splitlines()) >= done
    charged = sum(b'"charge"' in line for line in (run / "ledger.jsonl").read_bytes().split(b"\n"))
    resume(run)
    train(disk / "whole", rounds=5)
    assert outcome(run) == outcome(disk / "whole")
    assert len(lines(run / "ledger.jsonl")) >= charged - 1  # the torn line had not been charged
    assert_true(run)


def no_space_for_a_directory(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    raise SystemExit(main([*flags, "--out", str(out), "--quiet"]))


def test_nothing_is_left_when_the_run_directory_does_not_fit(disk: Path) -> None:
    assert in_child(no_space_for_a_directory, disk / "run") == 1
    assert not list(disk.iterdir())
