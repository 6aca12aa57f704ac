"""What a resume refuses and respects: config, data, lock, keys; and what a dry run says of it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedray
from fedray.commands.cli import main
from fedray.errors import InputError
from fedray.orchestrator.session import Session
from fedray.rundir.cards import format_epsilon
from fedray.rundir.evidence import checkpoints
from tests.recovery.jobs import assert_true, entries, in_child, lines, resume, round_keys, train
from tests.recovery.test_attempts import cut_off_after_charge

RNG = np.random.default_rng(0)
SHARDS = [(RNG.normal(size=(32, 5)).astype(np.float32), RNG.integers(0, 3, 32)) for _ in range(3)]
TEST = (RNG.normal(size=(20, 5)).astype(np.float32), RNG.integers(0, 3, 20))
OWN: dict[str, Any] = {"noise_level": "gateway", "rounds": 2, "local_steps": 1, "batch_size": 8, "pool": "inline"}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def make_other() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def own(
    shards: Any = SHARDS, *, model: Callable[[], Any] = make, test: Any = TEST, loss: Any = None, **settings: Any
) -> fedray.Run:
    config = fedray.RunConfig().resolve(**({} if "resume" in settings else OWN) | {"pool": "inline"} | settings)
    return fedray.Orchestrator(shards, model=model, test=test, loss=loss, config=config).run()


def stop_own(run: Path, **settings: Any) -> None:
    """Be killed when the first round is saved."""
    save = fedray.rundir.directory.RunDirectory.save

    def last(self: Any, state: Any, ledger: Any) -> None:
        save(self, state, ledger)
        if state.round == 1:
            os.kill(os.getpid(), 9)

    fedray.rundir.directory.RunDirectory.save = last  # type: ignore[method-assign]
    own(out=run, **settings)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resuming") / "stopped"
    assert in_child(stop_own, path) == -9
    return path


def scaled(part: int) -> Any:
    shards = [tuple(array.copy() for array in shard) for shard in SHARDS]
    shards[part][0][3, 2] += 1e-3
    return shards


def files_of(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shards": scaled(2)}, "shard 2"),
        ({"test": (TEST[0] + 1, TEST[1])}, "test data"),
        ({"shards": SHARDS[:2]}, "--gateways"),
        ({"lr": 0.5}, "--lr"),
        ({"clip_norm": 2.0}, "--clip-norm"),
        ({"noise_multiplier": 3.0}, "--noise-multiplier"),
        ({"max_epsilon": 100.0}, "--max-epsilon"),
        ({"rounds": 5}, "--rounds"),
    ],
)
def test_resume_refuses_what_changed_by_name(stopped: Path, disk: Path, changes: dict[str, Any], named: str) -> None:
    shutil.copytree(stopped, disk / "run")
    before = files_of(disk / "run")
    with pytest.raises(InputError, match=named):
        own(resume=disk / "run", **changes)
    assert files_of(disk / "run") == before


def test_resume_refuses_another_model(stopped: Path, disk: Path) -> None:
    shutil.copytree(stopped, disk / "run")

    def wider() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    with pytest.raises(InputError, match="model"):
        own(resume=disk / "run", model=wider)


def test_resume_refuses_a_model_of_the_same_shape_that_computes_something_else(stopped: Path, disk: Path) -> None:
    shutil.copytree(stopped, disk / "run")
    with pytest.raises(InputError, match="model"):
        own(resume=disk / "run", model=make_other)


def test_resume_refuses_another_loss(stopped: Path, disk: Path) -> None:
    shutil.copytree(stopped, disk / "run")

    def smoothed(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target, reduction="none", label_smoothing=0.1)

    with pytest.raises(InputError, match=r"loss of .* is not what the run began with"):
        own(resume=disk / "run", loss=smoothed)


# Alike but for a constant: by name they cannot be told apart.
LOSSES: dict[str, Any] = {
    "begun with": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none", label_smoothing=0.1),
    "gone on with": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none", label_smoothing=0.2),
}


def stop_with_loss(run: Path, name: str) -> None:
    stop_own(run, loss=LOSSES[name])


@pytest.mark.parametrize(("name", "attempts"), [("begun with", [0, 0]), ("gone on with", [0, 0, 1])])
def test_resume_with_other_code_draws_other_noise_and_charges_again(disk: Path, name: str, attempts: list[int]) -> None:
    """Round 2 had been charged, and may have been released, when the run was killed."""
    assert in_child(stop_with_loss, disk / "run", "begun with") == -9
    own(resume=disk / "run", loss=LOSSES[name])
    assert [entry["attempt"] for entry in entries(disk / "run")] == attempts


def test_resume_takes_the_same_parts(stopped: Path, disk: Path) -> None:
    shutil.copytree(stopped, disk / "run")
    run = own(resume=disk / "run")
    assert [record["round"] for record in run.history] == [1, 2]
    assert run.history[0]["epsilon"] != run.history[1]["epsilon"]
    assert_true(disk / "run")


def test_identity_holds_no_plain_digest_of_shards(stopped: Path) -> None:
    """A plain hash would let outsiders test guesses; equal shards under other keys have other MACs."""
    identity = json.loads((stopped / "checkpoint" / "identity.json").read_text().splitlines()[0])
    from fedray.privacy.streams import mac

    assert {"model", "test data", "shard 0", "shard 1", "shard 2"} <= set(identity)
    key = bytes.fromhex((stopped / "checkpoint" / "setup.key").read_text())
    x, y = SHARDS[1]
    assert identity["shard 1"] == mac(key, f"{x.dtype}{x.shape}{y.dtype}{y.shape}".encode() + x.tobytes() + y.tobytes())


# --- keys and lock -------------------------------------------------------------------------------------------------------


def test_round_keys_are_private_and_gone_when_the_run_ends(stopped: Path, disk: Path) -> None:
    keys = [*checkpoints(stopped), stopped / "checkpoint" / "setup.key"]
    assert len(keys) == 3
    assert round_keys(stopped) == 2
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    shutil.copytree(stopped, disk / "run")
    own(resume=disk / "run")
    assert checkpoints(disk / "run")
    assert not round_keys(disk / "run")


def test_no_keep_key_keeps_no_round_key_and_gives_up_resume(disk: Path) -> None:
    assert in_child(stop_own, disk / "run", no_keep_key=True) == -9
    assert checkpoints(disk / "run")
    assert not round_keys(disk / "run")
    with pytest.raises(InputError, match="--no-keep-key"):
        own(resume=disk / "run")


def test_no_keep_key_run_can_be_extended(disk: Path) -> None:
    train(disk / "run", rounds=1, no_keep_key=True)
    run = resume(disk / "run", rounds=2)
    assert len(run.history) == 2
    assert_true(disk / "run")


def hold(run: Path, ready: Path) -> None:
    orchestrator = fedray.Orchestrator(config=fedray.RunConfig().resolve(resume=run, pool="inline"))
    ready.write_text("held")
    os.kill(os.getpid(), 9)
    raise AssertionError(orchestrator)


def test_two_processes_cannot_resume_one_directory(disk: Path) -> None:
    assert in_child(cut_off_after_charge, disk / "run", 3, {"rounds": 3}) == -9
    first = fedray.Orchestrator(config=fedray.RunConfig().resolve(resume=disk / "run", pool="inline"))
    assert in_child(refused, disk / "run") == 0
    first.run()
    assert in_child(hold, disk / "run", disk / "ready") == -9  # a killed holder lets go
    assert (disk / "ready").exists()
    resume(disk / "run")


def refused(run: Path) -> None:
    with pytest.raises(InputError, match="in use by another process"):
        fedray.Orchestrator(config=fedray.RunConfig().resolve(resume=run, pool="inline"))


def test_a_running_run_cannot_be_resumed(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    advance = Session.advance

    def probe(self: Session, *rest: Any) -> None:
        codes.append(in_child(refused, self.files.path))
        advance(self, *rest)

    monkeypatch.setattr(Session, "advance", probe)
    train(disk / "run", rounds=1)
    assert codes == [0]


@pytest.mark.parametrize("path", ["nowhere", "file", "empty"])
def test_resume_refuses_what_is_no_run_directory(disk: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    (disk / "file").write_text("")
    (disk / "empty").mkdir()
    assert main(["--resume", str(disk / path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_resume_without_rounds_left_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert main(["--resume", str(finished)]) == 0
    assert "is complete already; give --rounds N to add rounds" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


# --- dry runs ------------------------------------------------------------------------------------------------------------


def test_dry_run_plans_the_run_that_resume_goes_on_with(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = disk / "run"
    assert in_child(cut_off_after_charge, run, 3, {"noise_multiplier": 2.5}) == -9
    before = files_of(run)
    assert main(["--dry-run", "--resume", str(run), "--pool", "inline"]) == 0
    printed = capsys.readouterr().out
    for words in ("4 gateways, 3 rounds × 2 local steps; 1 are done", "sigma = 2.5,", "nothing was trained"):
        assert words in printed
    assert files_of(run) == before


def test_dry_run_of_a_finished_run_says_so_or_plans_its_extension(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(finished)
    assert main(["--dry-run", "--resume", str(finished)]) == 0
    assert "is complete already" in capsys.readouterr().out
    assert main(["--dry-run", "--resume", str(finished), "--rounds", "5", "--pool", "inline"]) == 0
    assert "5 rounds × " in capsys.readouterr().out
    assert files_of(finished) == before


@pytest.mark.parametrize(("flags", "named"), [(["--lr", "0.5"], "--lr"), (["--rounds", "1"], "--rounds")])
def test_dry_run_refuses_what_resume_refuses(
    finished: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--resume", str(finished), *flags]) == 2
    assert named in capsys.readouterr().err


def test_dry_run_refuses_other_data_and_a_missing_directory(
    stopped: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--resume", str(disk / "none"), "--pool", "inline"]) == 2
    assert "no run directory" in capsys.readouterr().err
    assert main(["--dry-run", "--resume", str(stopped), "--pool", "inline"]) == 2  # its shards came from Python
    assert "not what the run began with" in capsys.readouterr().err


def test_dry_run_counts_the_rounds_that_were_charged_twice(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds 2 and 3 were charged before the kill, and again in other groups; two rounds more make seven charges."""
    run = disk / "run"
    assert in_child(cut_off_after_charge, run, 3, {}) == -9
    resume(run, gateways_per_actor=1)
    assert main(["--dry-run", "--resume", str(run), "--rounds", "5"]) == 0
    shown = capsys.readouterr().out
    card = resume(run, rounds=5, gateways_per_actor=1).privacy
    assert len(lines(run / "ledger.jsonl")) == 7 + 1  # and the extension
    for guarantee in card["guarantees"]:
        assert f"epsilon {format_epsilon(guarantee['epsilon'])} per {guarantee['unit']}" in shown
