"""What does not fill a seam is refused before anything starts, in a sentence that names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedray import Orchestrator, RunConfig
from fedray.commands.cli import main
from fedray.config.seams import find, reference_in, users_code
from fedray.errors import InputError, UserCodeError
from fedray.reports.callback import Callback, RoundDone
from fedray.tasks.classification import Classification
from fedray.tasks.task import Task
from tests.bad_input.cases import check_one_sentence

SMALL: dict[str, Any] = {
    "pool": "inline", "gateways": 2, "rounds": 2, "local_steps": 1, "samples_per_gateway": 64, "batch_size": 8, "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("seam", "value"),
    [
        ("server_optimizer", "sgd:5"),
        ("partitioner", "iid:5"),
        ("aggregator", "mean:Foo"),
        ("task", "classification:My"),
    ],
)
def test_find_refuses_an_argument_that_is_not_taken(seam: str, value: str) -> None:
    with pytest.raises(InputError, match="which is fedray's own, takes no argument"):
        find(seam, value)


def test_find_hands_over_what_follows_a_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_argument.py").write_text("class Box:\n    def __init__(self, text): self.text = text\n")
    monkeypatch.chdir(tmp_path)
    assert find("source", "with_argument:Box:data/a:b.csv").text == "data/a:b.csv"
    assert reference_in("with_argument:Box:data/a:b.csv") == "with_argument:Box"
    assert users_code({"dataset": "with_argument:Box:x", "task": "classification"}) == {
        "dataset": ["with_argument:Box"]
    }


class _Strict(Classification):
    def check_targets(self, y: Any, where: str) -> Any:
        if y.max() > 1:
            raise InputError(f"{where}: target {y.max()} is neither 0 nor 1; give one of them.")
        return y


class _Metric:
    name = "broken"

    def state(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.tensor(output.shape[9])

    def value(self, state: torch.Tensor, num_records: int) -> float:
        return float(state)


class _Measured(Classification):
    metrics = (_Metric(),)


class _Bare(Task):
    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output[:, 0] - target) ** 2


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"task": _Strict()}, "target 3 is neither 0 nor 1"),
        ({"task": Classification}, "is the class Classification; hand in what it makes"),
        ({"task": "classification"}, "is str, no Task"),
        ({"task": _Measured()}, "its metrics raised IndexError"),
        ({"task": _Bare()}, "its metrics raised AttributeError"),
        ({"callbacks": Callback}, "callbacks is"),
        ({"callbacks": [type("Mine", (Callback,), {})]}, "is the class Mine"),
        ({"callbacks": [object()]}, "is object, no Callback; it has no on_end, on_round, on_start"),
        ({"loss": torch.nn.functional.mse_loss, "task": Classification()}, "loss and task are both given"),
    ],
)
def test_orchestrator_refuses_parts_that_do_not_fit(parts: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        Orchestrator(config=RunConfig().resolve(**SMALL, out=tmp_path / "run"), **parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answer", [True, 1, [], 0.5])
def test_a_callback_that_answers_with_no_sentence_fails_the_run(answer: object, tmp_path: Path) -> None:
    class Odd(Callback):
        def on_round(self, done: RoundDone) -> Any:
            return answer

    with pytest.raises(UserCodeError, match="it must return a sentence to stop the run, or None"):
        Orchestrator(config=RunConfig().resolve(**SMALL, out=tmp_path / "run"), callbacks=[Odd()]).run()


def test_a_callback_cannot_change_parameters(tmp_path: Path) -> None:
    class Spoils(Callback):
        def on_round(self, done: RoundDone) -> None:
            done.params[:] = 0

    with pytest.raises(UserCodeError, match="read-only"):
        Orchestrator(config=RunConfig().resolve(**SMALL, out=tmp_path / "run"), callbacks=[Spoils()]).run()


def test_a_source_that_misses_its_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "misses.py").write_text("class Table:\n    def load(self, wanted): open('nope.csv')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["--pool", "inline", "--dataset", "misses:Table"]) == 2
    check_one_sentence(capsys.readouterr().err, ("--dataset misses:Table raised FileNotFoundError", "nope.csv"))


def test_output_that_is_cut_off_is_no_traceback(tmp_path: Path) -> None:
    job = "--pool inline --gateways 2 --rounds 3 --local-steps 1 --samples-per-gateway 64 --batch-size 8 --quiet --out run"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m fedray {job} | head -1"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert b"callback" not in done.stderr


@pytest.mark.parametrize("dtype", [np.float64, np.bool_])
def test_a_partition_of_other_than_whole_numbers_is_refused(dtype: type, tmp_path: Path) -> None:
    from fedray.data.partition import split

    class Odd:
        def split(self, targets: Any, gateways: int, rng: Any) -> Any:
            return [np.array([0, 1], dtype), np.array([2], dtype)]

    with pytest.raises(InputError, match="must hold whole numbers, no masks and no floats"):
        split(Odd(), "mine:Odd", np.zeros(4, np.int64), 2, np.random.default_rng(0))
