"""A run after a loss of power, or a disk that fails once, goes on to the same result, and no charge is lost."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path

import pytest

from fedray.errors import FedrayError, RunFailedError
from fedray.privacy.ledger import read
from tests.hardening.power_loss import Change, Disk, emptied, played, recorded, resume, train

POINTS = int(os.environ.get("FEDRAY_POWER_POINTS", "60"))


@functools.cache
def _whole(folder: Path) -> tuple[tuple[Change, ...], bytes]:
    """Return all changes of an undisturbed run, and its final model."""
    disk = Disk(emptied(folder / "whole"))
    with recorded(disk):
        run = train(disk.folder)
    return tuple(disk.changes), (run.path / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("power")


def _charges(changes: list[Change]) -> list[str]:
    return [
        change.data.decode().strip()
        for change in changes
        if change.kind == "append" and change.path == "run/ledger.jsonl"
    ]


@pytest.mark.parametrize("point", range(POINTS))
def test_power_loss_loses_no_run_and_no_charge(point: int, folder: Path) -> None:
    changes, model = _whole(folder)
    rng = random.Random(point)
    until = 1 + point % len(changes)
    kept = list(changes[:until])
    place = emptied(folder / "after")
    played(kept, place, rng)
    exists = any(change.kind == "sync" and change.path == "." for change in kept[:-1])
    if not (place / "run").exists():
        assert not exists, "the run was there, and is gone"
        return
    done = resume(place)
    assert (done.path / "model.safetensors").read_bytes() == model
    charged = (done.path / "ledger.jsonl").read_text().splitlines()
    assert charged[: len(_charges(kept[:-1]))] == _charges(kept[:-1])
    assert len(read(done.path / "ledger.jsonl")) == len(charged)


@pytest.mark.parametrize("point", range(POINTS))
def test_a_disk_that_fails_once_loses_no_run_and_no_charge(point: int, folder: Path) -> None:
    changes, model = _whole(folder)
    disk = Disk(emptied(folder / "failing"), fails_at=point % len(changes))
    try:
        with recorded(disk):
            run = train(disk.folder)
    except FedrayError as error:
        assert isinstance(error, RunFailedError)  # noqa: PT017 - only some points fail
        if not (disk.folder / "run").exists():
            assert [path.name for path in disk.folder.iterdir()] == []
            return
        run = resume(disk.folder)
    assert (run.path / "model.safetensors").read_bytes() == model
    lines = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["event"] == "charge"] == [1, 2, 3]
