"""Files of a run directory are damaged: a resume goes on from the last good state or names the file, never wrongly."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedray.errors import DamagedRunError, InputError
from fedray.rundir.evidence import checkpoint_texts, checkpoints
from tests.recovery.jobs import DiskWatch, assert_true, in_child, lines, outcome, resume, round_keys, train
from tests.recovery.test_attempts import cut_off_after_charge

ROUNDS = 4


def cut_off(run: Path) -> None:
    """Train until the checkpoint of round 3 is there, and be killed when the last round has been charged."""

    class Watch(DiskWatch):
        def _count(self, what: str, path: str, descriptor: int | None = None) -> None:
            if "00000003" in what and what.startswith("os.rename"):
                self._fatal = len(self.log) + 3  # a sync and a removal later
            super()._count(what, path, descriptor)

    Watch(run, None).start()
    train(run, rounds=ROUNDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "finished"
    train(path, rounds=ROUNDS)
    return path


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "unfinished"
    assert in_child(cut_off, path) == -9
    assert round_keys(path) == 2
    assert len(lines(path / "ledger.jsonl")) == ROUNDS
    return path


def files_of(path: Path) -> list[Path]:
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


def damage(file: Path, rng: random.Random) -> None:
    """Flip one bit, or cut the file short."""
    data = bytearray(file.read_bytes())
    if not data or rng.random() < 0.5:
        file.write_bytes(data[: rng.randrange(max(1, len(data)))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


def holds_or_names(run: Path, name: Path, wanted: dict[str, Any], **changes: Any) -> str:
    """Resume a damaged directory; return what happened."""
    before = (run / name).read_bytes()
    try:
        resume(run, **changes)
    except InputError as error:
        said = str(error)
        assert name.name in said, f"{name}: {said}"
        assert "restore" in said or "no run directory" in said
        assert (run / name).read_bytes() == before  # what is damaged can still be repaired
        return "named"
    found = outcome(run)
    assert {**found, "files": 0} == {**wanted, "files": 0}, name
    return "went on"


@pytest.mark.parametrize("state", ["unfinished", "finished", "extended"])
def test_resume_goes_on_or_names_the_file_when_one_is_damaged(
    state: str, finished: Path, unfinished: Path, disk: Path
) -> None:
    rng = random.Random(f"damage {state}")
    changes = {"rounds": ROUNDS + 1} if state == "extended" else {}
    source = unfinished if state == "unfinished" else finished
    shutil.copytree(source, disk / "whole")
    resume(disk / "whole", **changes)
    wanted = outcome(disk / "whole")
    seen = {"named": 0, "went on": 0}
    names = files_of(source)
    for number in range(max(70, len(names))):
        name = names[number % len(names)]
        run = disk / f"case-{number}"
        shutil.copytree(source, run)
        damage(run / name, rng)
        seen[holds_or_names(run, name, wanted, **changes)] += 1
    assert min(seen.values()) >= 10, seen


def test_resume_finds_a_ledger_that_was_cut_at_a_line_boundary(unfinished: Path, disk: Path) -> None:
    whole = (unfinished / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for kept in range(len(whole)):
        run = disk / f"kept-{kept}"
        shutil.copytree(unfinished, run)
        (run / "ledger.jsonl").write_bytes(b"".join(whole[:kept]))
        with pytest.raises(DamagedRunError, match=r"ledger.jsonl has \d lines"):
            resume(run)


def test_resume_finds_that_the_charge_of_a_round_without_checkpoint_was_lost(disk: Path) -> None:
    """The checkpoint that would remember it was never written."""
    run = disk / "run"
    assert in_child(cut_off_after_charge, run, 3, {"rounds": 4}) == -9
    whole = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(whole) == 3
    (run / "ledger.jsonl").write_bytes(b"".join(whole[:2]))
    with pytest.raises(DamagedRunError, match=r"ledger.jsonl has 2 lines that do not continue the 3"):
        resume(run)


def test_resume_drops_a_torn_last_line_of_the_ledger(unfinished: Path, finished: Path, disk: Path) -> None:
    shutil.copytree(unfinished, disk / "run")
    with (disk / "run" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "charge", "round": 5, "att')
    resume(disk / "run")
    assert outcome(disk / "run") == outcome(finished)
    assert_true(disk / "run")


def test_resume_keeps_a_charged_line_whose_newline_is_damaged(unfinished: Path, disk: Path) -> None:
    """It looks torn, but was counted: the file is refused and left as it is."""
    shutil.copytree(unfinished, disk / "run")
    raw = (disk / "run" / "ledger.jsonl").read_bytes()[:-1] + b"x"
    (disk / "run" / "ledger.jsonl").write_bytes(raw)
    with pytest.raises(DamagedRunError, match=r"ledger\.jsonl"):
        resume(disk / "run")
    assert (disk / "run" / "ledger.jsonl").read_bytes() == raw


def test_resume_never_takes_an_earlier_checkpoint_of_a_finished_run_for_its_end(finished: Path, disk: Path) -> None:
    for harm in ("damaged", "gone"):
        run = disk / harm
        shutil.copytree(finished, run)
        newest = checkpoints(run)[-1]
        if harm == "gone":
            newest.unlink()
        else:
            newest.write_bytes(b"{}")
        for changes in ({}, {"rounds": ROUNDS + 2}):
            with pytest.raises(DamagedRunError, match="checkpoint"):
                resume(run, **changes)
        assert len(lines(run / "metrics.jsonl")) == ROUNDS


def without_key(checkpoint: Path) -> None:
    texts = checkpoint_texts(checkpoint) or {}
    del texts["round_key"]
    save_file(load_file(checkpoint), checkpoint, texts)


def test_resume_falls_back_when_a_round_key_is_missing(unfinished: Path, finished: Path, disk: Path) -> None:
    shutil.copytree(unfinished, disk / "run")
    without_key(checkpoints(disk / "run")[-1])
    resume(disk / "run")
    assert outcome(disk / "run") == outcome(finished)


def test_resume_names_the_checkpoint_when_all_round_keys_are_missing(unfinished: Path, disk: Path) -> None:
    shutil.copytree(unfinished, disk / "run")
    for checkpoint in checkpoints(disk / "run"):
        without_key(checkpoint)
    with pytest.raises(DamagedRunError, match=r"00000003-0000\.safetensors is damaged: it is not the key"):
        resume(disk / "run")


def test_the_end_of_a_run_leaves_no_key_anywhere(unfinished: Path, disk: Path) -> None:
    """Not in what a crash left half written, nor in an older checkpoint that is damaged and cannot be read."""
    run = disk / "run"
    train(run, rounds=2)
    (before,) = checkpoints(run)
    keyed = checkpoints(unfinished)[0].read_bytes()
    key = (checkpoint_texts(checkpoints(unfinished)[0]) or {})["round_key"].encode()
    assert key in keyed
    (run / "checkpoint" / "00000001-0000.safetensors").write_bytes(b"\xff" + keyed[1:])
    (run / "checkpoint" / ".00000002-0000.safetensors").write_bytes(keyed[:-10])
    resume(run)
    assert checkpoints(run) == [before]
    assert not any(key in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["model.safetensors", "privacy.json", "manifest.json"])
def test_resume_writes_a_lost_file_of_a_finished_run_again(name: str, finished: Path, disk: Path) -> None:
    shutil.copytree(finished, disk / "run")
    (disk / "run" / name).write_bytes(b"nonsense")
    resume(disk / "run")
    assert outcome(disk / "run") == outcome(finished)
    assert_true(disk / "run")
