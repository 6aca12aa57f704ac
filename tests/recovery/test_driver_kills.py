"""The driver is killed -9 anywhere: each resume ends as if nothing had happened, and nothing is charged too little."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recovery.jobs import SMALL, DiskWatch, assert_true, in_child, lines, outcome, resume, round_keys, train

EXTENDED: dict[str, Any] = {"rounds": 3}
LEVELS = ["gateway", pytest.param("sample", marks=pytest.mark.slow)]


def watched(folder: Path, fatal: int | None, tear: bool, changes: dict[str, Any]) -> None:
    """Run the small job, killed before one operation on files."""
    watch = DiskWatch(folder, fatal, tear)
    watch.start()
    if "resume" in changes:
        resume(**{"path" if name == "resume" else name: value for name, value in changes.items()})
    else:
        train(folder / "run", **changes)
    if fatal is None:
        os.fsync = watch._sync
        log = list(watch.log)
        Path(f"{folder}.log").write_text("\n".join(log))


def operations(folder: Path, changes: dict[str, Any]) -> list[str]:
    """Return what an undisturbed run does to files, in order."""
    folder.mkdir(exist_ok=True)
    assert in_child(watched, folder, None, False, changes) == 0
    return Path(f"{folder}.log").read_text().splitlines()


def charged(path: Path) -> int:
    return sum(entry["event"] == "charge" for entry in lines(path))


def kill_and_resume(disk: Path, changes: dict[str, Any], which: Callable[[str], bool], tear: bool = False) -> None:
    log = operations(disk / "whole", changes)
    wanted = outcome(disk / "whole" / "run")
    instants = [index for index, what in enumerate(log) if which(what)]
    assert len(instants) > 3
    for number, fatal in enumerate(instants):
        folder = disk / f"killed-{fatal}"
        folder.mkdir()
        assert in_child(watched, folder, fatal, tear, changes) == -9
        run = folder / "run"
        if not run.exists():
            deadline = time.monotonic() + 10
            while list(folder.iterdir()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not list(folder.iterdir())
            train(run, **changes)
        else:
            resume(run)
        assert [entry.name for entry in folder.iterdir()] == ["run"]
        assert outcome(run) == wanted, log[fatal]
        assert not round_keys(run)
        if number % 5 == 0:
            assert_true(run)


@pytest.mark.slow
def test_resume_ends_as_undisturbed_when_killed_at_any_operation_on_files(disk: Path) -> None:
    kill_and_resume(disk, {"rounds": 2}, lambda what: True)


@pytest.mark.slow
def test_resume_ends_as_undisturbed_when_killed_in_the_middle_of_a_write(disk: Path) -> None:
    kill_and_resume(
        disk, {"rounds": 2}, lambda what: what.startswith("fsync") and not what.endswith("point"), tear=True
    )


@pytest.mark.slow
def test_resume_repeats_no_line_of_the_private_file(disk: Path) -> None:
    changes = {"rounds": 2, "participation": 0.7}
    kill_and_resume(disk, changes, lambda what: "private" in what or what.endswith("/ledger.json"))
    private = {(folder / "run" / "private.jsonl").read_bytes() for folder in disk.iterdir() if folder.is_dir()}
    assert len(private) == 1
    assert [line["round"] for line in lines(disk / "whole" / "run" / "private.jsonl")] == [1, 2]


@pytest.mark.slow
def test_extension_ends_as_undisturbed_when_killed_at_any_operation_on_files(disk: Path) -> None:
    """A seeded run draws its extension's root from the seed, so two extensions can be compared."""
    base = disk / "base"
    train(base, rounds=2)
    whole = disk / "whole"
    copy(base, whole / "run")
    log = operations(whole, {"resume": whole / "run", **EXTENDED})
    wanted = outcome(whole / "run")
    for fatal in range(len(log)):
        folder = disk / f"killed-{fatal}"
        copy(base, folder / "run")
        assert in_child(watched, folder, fatal, False, {"resume": folder / "run", **EXTENDED}) == -9
        resume(folder / "run")
        if fatal % 4 == 0:
            assert_true(folder / "run")  # whether the extension had begun or not
        resume(folder / "run", **EXTENDED)
        assert outcome(folder / "run") == wanted, log[fatal]
        if fatal % 4 == 0:
            assert_true(folder / "run")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(source, target)


@pytest.mark.parametrize("level", LEVELS)
def test_resume_ends_as_undisturbed_when_killed_at_random_instants(level: str, disk: Path) -> None:
    changes = {"rounds": 6, "noise_level": level}
    assert in_child(os.getpid) == 0  # the first child also waits for what all of them are forked from
    began = time.monotonic()
    assert in_child(train, disk / "whole", **changes) == 0
    span_s = time.monotonic() - began
    wanted = outcome(disk / "whole")
    rng = random.Random(level)
    kills = 25 if level == "gateway" else 8
    killed = within = 0
    for number in range(3 * kills):
        run = disk / f"run-{number}"
        began = time.monotonic()
        code = in_child(train, run, kill_after_s=rng.uniform(0.3, 1.0) * span_s, **changes)
        assert code in (0, -9)
        killed += code == -9
        if code == 0:
            span_s = min(span_s, time.monotonic() - began)  # it was over before the shot
        if not run.exists():
            span_s *= 1.1  # the machine may be slower than before
            assert in_child(train, run, **changes) == 0
        else:
            within += code == -9
            before = charged(run / "ledger.jsonl")
            assert in_child(resume, run) == 0
            assert charged(run / "ledger.jsonl") >= before
        assert outcome(run) == wanted
        if killed >= kills and within >= 3:
            return
    pytest.fail(f"only {killed} runs were killed, {within} of them with a run directory")


def test_unseeded_run_killed_at_any_write_to_its_ledger_goes_on_with_its_charges(disk: Path) -> None:
    """What was charged is repeated under its own incarnation; a new one is written once, before what it charges."""
    changes: dict[str, Any] = {"rounds": 2, "seed": None}
    log = operations(disk / "whole", changes)
    instants = [index for index, what in enumerate(log) if "ledger.jsonl" in what and "run/" in what]
    assert len(instants) >= 6
    for fatal in instants:
        folder = disk / f"killed-{fatal}"
        folder.mkdir()
        assert in_child(watched, folder, fatal, True, changes) == -9
        run = folder / "run"
        before = (run / "ledger.jsonl").read_bytes()
        resume(run)
        after = (run / "ledger.jsonl").read_bytes()
        assert after.startswith(before[: before.rfind(b"\n") + 1])
        entries = lines(run / "ledger.jsonl")
        assert [(e["round"], e["attempt"]) for e in entries if e["event"] == "charge"] == [(1, 0), (2, 0)]
        values = [entry["inputs"] for entry in entries if entry["event"] == "incarnation"]
        assert 1 <= len(values) == len(set(values)) <= 2
        assert entries[0]["event"] == "incarnation"
        assert_true(run)


def test_run_directory_appears_complete_or_not_at_all(disk: Path) -> None:
    log = operations(disk / "whole", {"rounds": 1})
    appears = next(
        index for index, what in enumerate(log) if what.startswith("os.rename") and ".fedray-" in what.split("/")[-1]
    )
    for fatal in (appears, appears + 1):
        folder = disk / f"killed-{fatal}"
        folder.mkdir()
        assert in_child(watched, folder, fatal, False, {"rounds": 1}) == -9
        assert (folder / "run").exists() == (fatal > appears)
    assert json.loads((folder / "run" / "config.json").read_text())["config"]["gateways"] == SMALL["gateways"]


def test_a_run_sweeps_what_killed_processes_of_this_machine_left(disk: Path) -> None:
    """Only theirs: a process that lives is still at it, and other machines may share the disk."""
    dead, other = (disk / f".fedray-{host}-4194303-ab" for host in (socket.gethostname(), "elsewhere"))
    alive = disk / f".fedray-{socket.gethostname()}-{os.getppid()}-ab"
    for folder in (dead, alive, other):
        (folder / "checkpoint").mkdir(parents=True)
    train(disk / "run", rounds=1)
    assert {path.name for path in disk.iterdir()} == {alive.name, other.name, "run"}
