"""What RunConfig, Orchestrator and load_model refuse, when called from Python."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedray
from fedray.errors import InputError

X, Y = np.zeros((64, 5), np.float32), np.arange(64) % 4
CONFIG = fedray.RunConfig().resolve(batch_size=8, pool="inline")


def _shards(number: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(X, Y) for _ in range(number)]


def test_orchestrator_refuses_labels_beyond_the_outputs() -> None:
    with pytest.raises(InputError, match=r"shard 0: label 3 is out of range; the model has 3 outputs"):
        fedray.Orchestrator(_shards(), model=lambda: nn.Linear(5, 3), config=CONFIG)


def test_orchestrator_refuses_a_gateway_by_its_name() -> None:
    bad = [fedray.Gateway("clinic-0", data=(X, Y)), fedray.Gateway("clinic-1", data=(X, Y[:3]))]
    with pytest.raises(InputError, match=r"gateway clinic-1: x has 64 records and y has 3"):
        fedray.Orchestrator(bad, config=CONFIG)


def test_orchestrator_refuses_nan_targets_of_a_regression() -> None:
    target = np.full((64, 1), np.nan, np.float32)
    with pytest.raises(InputError, match="y of record 0 is NaN"):
        fedray.Orchestrator([(X, target)], model=lambda: nn.Linear(5, 1), loss=_squared, config=CONFIG)


def test_orchestrator_refuses_a_loss_of_the_whole_batch() -> None:
    with pytest.raises(InputError, match=r"loss returned \(\) for 3 records; it must return one value a record"):
        fedray.Orchestrator(_shards(), model=lambda: nn.Linear(5, 4), loss=nn.functional.cross_entropy, config=CONFIG)


def test_orchestrator_refuses_a_loss_that_raises() -> None:
    with pytest.raises(InputError, match="loss raised ValueError: Using a target size"):
        fedray.Orchestrator(_shards(), model=lambda: nn.Linear(5, 4), loss=nn.BCELoss(reduction="none"), config=CONFIG)


def test_orchestrator_refuses_lazy_gateways_of_unknown_size() -> None:
    with pytest.raises(InputError, match="loaded lazily"):
        fedray.Orchestrator([fedray.Gateway("a", data=lambda: (X, Y))], config=CONFIG)


def test_orchestrator_refuses_what_is_no_sequence() -> None:
    with pytest.raises(InputError, match="gateways is int"):
        fedray.Orchestrator(3, config=CONFIG)


def test_orchestrator_refuses_no_gateways() -> None:
    with pytest.raises(InputError, match="--gateways is 0"):
        fedray.Orchestrator([], config=CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", "3"), ("rounds", 2.5), ("lr", "x"), ("gateways", True), ("noise_level", "user"), ("seed", 2**63)],
)
def test_config_refuses_values_of_another_kind(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} is "):
        fedray.RunConfig().resolve(**{field: value})  # type: ignore[arg-type]  # that is the point


class _Lazy:
    """Lazy shards that hold something, with a label of -1 in the last one if asked."""

    def __init__(self, held: object = None, bad: bool = False) -> None:
        self.held, self.bad = held, bad

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return X, -Y if self.bad and index == 2 else Y


@pytest.mark.usefixtures("local_ray")
def test_orchestrator_refuses_shards_that_cannot_be_sent(outdir: Path) -> None:
    config = CONFIG.resolve(pool="ray", samples_per_gateway=64, out=outdir)
    with pytest.raises(InputError, match=r"cannot be sent to actors .*open files and connections where"):
        fedray.Orchestrator(_Lazy(threading.Lock()), model=_four_scores, test=(X, Y), config=config).run()
    assert not outdir.exists()


@pytest.mark.usefixtures("local_ray")
def test_orchestrator_refuses_a_bad_lazy_shard_before_round_one(outdir: Path) -> None:
    config = CONFIG.resolve(pool="ray", samples_per_gateway=64, out=outdir)
    with pytest.raises(InputError, match="shard of gateway 2: label -3 is out of range"):
        fedray.Orchestrator(_Lazy(bad=True), model=_four_scores, test=(X, Y), config=config).run()
    assert not outdir.exists()


def _gone() -> Any:
    raise FileNotFoundError(2, "No such file", "clinic-3.npy")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("pool", ["inline", "ray"])
@pytest.mark.parametrize("test", [(X, Y), None])
def test_orchestrator_refuses_a_lazy_shard_that_does_not_load(outdir: Path, pool: Any, test: Any) -> None:
    gateways = [fedray.Gateway(f"clinic-{i}", data=(X, Y) if test and i < 2 else _gone) for i in range(3)]
    config = CONFIG.resolve(pool=pool, samples_per_gateway=64, out=outdir)
    with pytest.raises(
        InputError, match=r"clinic-[02] cannot be loaded \(FileNotFoundError: .*clinic-3.npy.*see to its files"
    ):
        fedray.Orchestrator(gateways, model=_four_scores, test=test, config=config).run()
    assert not outdir.exists()


@pytest.mark.parametrize(("name", "value"), [("out", 3), ("resume", 3), ("dataset", 3), ("model", nn.Identity)])
def test_run_config_refuses_other_kinds_of_value(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name} is .*; it must be"):
        fedray.RunConfig().resolve(**{name: value})


def test_run_config_takes_paths_as_text(tmp_path: Path) -> None:
    assert fedray.RunConfig().resolve(out=str(tmp_path)) == fedray.RunConfig().resolve(out=tmp_path)  # type: ignore[arg-type]
    assert fedray.RunConfig().resolve(resume=str(tmp_path)).run.resume == tmp_path  # type: ignore[arg-type]


def test_load_model_refuses_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model\.safetensors; only a finished run has one"):
        fedray.load_model(tmp_path, lambda: nn.Linear(2, 2))


def test_load_model_refuses_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="is damaged"):
        fedray.load_model(tmp_path, lambda: nn.Linear(2, 2))


def _four_scores() -> nn.Module:
    return nn.Linear(5, 4)


def _squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum(dim=1)
