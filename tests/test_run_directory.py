"""The files of a run: names, keys and types that outside checks read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedray
from fedray.config.settings import SETTINGS
from fedray.privacy.streams import first_round_key, new_root_key, next_round_key

SHARDS = [(np.eye(3, 5, dtype=np.float32)[np.arange(64) % 3], np.arange(64) % 3) for _ in range(3)]
LEVELS = ["none", "sample", "batch", "gateway"]
GUARANTEES = {
    "none": [],
    "sample": [("record", "add-or-remove")],
    "batch": [("gateway", "replace"), ("gateway", "zero-out"), ("record", "add-or-remove")],
    "gateway": [("gateway", "zero-out"), ("gateway", "replace"), ("record", "add-or-remove")],
}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).tanh()))


def train(out: Path, level: str, model: Any = make, **changes: Any) -> fedray.Run:
    settings: dict[str, Any] = {"noise_level": level, "rounds": 2, "local_steps": 2, "batch_size": 16, "seed": 0}
    config = fedray.RunConfig().resolve(pool="inline", out=out, **{**settings, **changes})
    return fedray.Orchestrator(SHARDS, model=model, test=SHARDS[0], config=config).run()


@pytest.fixture(scope="module", params=LEVELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> fedray.Run:
    return train(tmp_path_factory.mktemp("runs") / request.param, request.param)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=_refuse)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def test_run_directory_holds_these_files(run: fedray.Run) -> None:
    names = {entry.name for entry in run.path.iterdir()}
    wanted = {"config.json", "ledger.jsonl", "metrics.jsonl", "checkpoint", "model.safetensors", "privacy.json"}
    assert wanted <= names
    assert not {name for name in names if name.startswith(".") or name.endswith(".tmp")}


def test_run_directory_appears_alone(run: fedray.Run) -> None:
    assert {entry.name for entry in run.path.parent.iterdir()} <= set(LEVELS)


def test_config_holds_every_field_resolved(run: fedray.Run) -> None:
    card = read(run.path / "config.json")
    assert {"format", "config", "versions", "machine"} <= set(card)
    assert set(card["config"]) == set(SETTINGS)
    assert card["config"]["gateways"] == 3
    assert card["config"]["out"] == str(run.path)
    assert card["config"]["noise_multiplier"] == (None if card["config"]["noise_level"] == "none" else 1.0)
    assert {"python", "torch", "opacus", "ray", "fedray"} <= set(card["versions"])


def test_ledger_holds_one_line_a_started_round(run: fedray.Run) -> None:
    entries = lines(run.path / "ledger.jsonl")
    assert [entry["round"] for entry in entries] == [1, 2]
    for entry in entries:
        assert {"round", "attempt", "gateways", "steps", "level", "inputs"} <= set(entry)
        assert (entry["attempt"], entry["gateways"], entry["steps"]) == (0, [[0, 2]], 2)
        assert entry["level"] == run.privacy["noise_level"]
        assert len(bytes.fromhex(entry["inputs"])) == 32


def test_metrics_hold_one_line_a_round(run: fedray.Run) -> None:
    records = lines(run.path / "metrics.jsonl")
    assert records == list(run.history)
    units = {unit for unit, _ in GUARANTEES[run.privacy["noise_level"]]}
    for index, record in enumerate(records, start=1):
        assert set(record) == {"round", "accuracy", "loss", "metrics", "epsilon", "seconds", "samples_per_s"}
        assert record["round"] == index
        assert isinstance(record["accuracy"], float)
        assert isinstance(record["loss"], float)
        assert set(record["epsilon"]) == units
        assert all(isinstance(value, float) for value in record["epsilon"].values())


def test_metrics_speed_counts_public_numbers_only(run: fedray.Run) -> None:
    for record in run.history:
        assert record["samples_per_s"] == pytest.approx(3 * 2 * 16 / record["seconds"]["total"])
        assert 0 < record["seconds"]["train"] <= record["seconds"]["total"]


def test_metrics_end_at_the_cards_first_epsilon_of_each_unit(run: fedray.Run) -> None:
    last = run.history[-1]["epsilon"]
    for unit, epsilon in last.items():
        first = next(g for g in run.privacy["guarantees"] if g["unit"] == unit)
        assert epsilon == pytest.approx(first["epsilon"], rel=1e-9)


def test_privacy_card_holds_these_keys(run: fedray.Run) -> None:
    card = read(run.path / "privacy.json")
    assert card == run.privacy
    assert set(card) == {
        *(
            "noise_level",
            "noise_multiplier",
            "clip_norm",
            "sample_rate",
            "batch_size",
            "local_steps",
            "rounds",
            "steps",
        ),
        *("delta", "guarantees", "isolation", "rng", "treated_as_public", "not_covered", "versions", "digests"),
    }
    assert (card["sample_rate"], card["batch_size"], card["local_steps"]) == (0.25, 16, 2)
    assert (card["rounds"], card["steps"], card["delta"]) == (2, 4, 1e-5)


def test_privacy_card_lists_the_levels_guarantees_in_order(run: fedray.Run) -> None:
    found = run.privacy["guarantees"]
    assert [(g["unit"], g["adjacency"]) for g in found] == GUARANTEES[run.privacy["noise_level"]]
    for guarantee in found:
        assert set(guarantee) == {"unit", "adjacency", "observer", "epsilon", "delta", "mu", "mechanism", "accountant"}
        assert isinstance(guarantee["epsilon"], float)


def test_privacy_card_says_simulation_only_with_a_seed(run: fedray.Run) -> None:
    assert run.privacy["rng"]["simulation_only"] is True
    assert "nominal shard size" in " ".join(run.privacy["treated_as_public"])


def test_privacy_card_digests_the_files_beside_it(run: fedray.Run) -> None:
    for name, digest in run.privacy["digests"].items():
        if (run.path / name).is_file():
            assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == digest
    assert "model.safetensors" in run.privacy["digests"]


def test_run_directory_keeps_no_round_key_of_a_finished_run(run: fedray.Run) -> None:
    keys = [new_root_key(0), first_round_key(new_root_key(0))]
    for _ in run.history:
        keys.append(next_round_key(keys[-1]))
    for path in run.path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(key in content or key.hex().encode() in content for key in keys), path


def test_model_file_has_the_models_own_names(run: fedray.Run) -> None:
    assert set(load_file(run.path / "model.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_load_model_gives_the_trained_model_back(run: fedray.Run) -> None:
    model = fedray.load_model(run.path, make)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), run.model(x))
    assert not model.training


def test_load_model_refuses_another_architecture(run: fedray.Run) -> None:
    with pytest.raises(fedray.FedrayError, match="does not fit the model"):
        fedray.load_model(run.path, lambda: nn.Linear(5, 3))


def test_equal_runs_give_equal_models(run: fedray.Run, tmp_path: Path) -> None:
    again = train(tmp_path / "again", run.privacy["noise_level"])
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    other = train(tmp_path / "other", run.privacy["noise_level"], seed=1)
    assert (other.path / "model.safetensors").read_bytes() != (run.path / "model.safetensors").read_bytes()


def test_equal_runs_charge_the_same(run: fedray.Run, tmp_path: Path) -> None:
    again = train(tmp_path / "again", run.privacy["noise_level"])
    assert (again.path / "ledger.jsonl").read_text() == (run.path / "ledger.jsonl").read_text()


def test_model_file_takes_tied_weights(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "sample", model=Tied)
    state = load_file(run.path / "model.safetensors")
    assert torch.equal(state["first.weight"], state["second.weight"])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fedray.load_model(run.path, Tied)(x), run.model(x))


def test_metrics_hold_no_infinity_when_the_model_explodes(tmp_path: Path) -> None:
    def deep() -> nn.Module:  # scores grow with the cube of the parameters
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    run = train(tmp_path / "run", "sample", model=deep, optimizer="sgd", lr=1e14)
    assert [record["loss"] for record in lines(run.path / "metrics.jsonl")] == [None, None]


def test_run_directory_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train(tmp_path / "run", "gateway").path == tmp_path / "run"


def test_run_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    assert (train(tmp_path / "a" / "b" / "run", "gateway").path / "privacy.json").exists()


def test_privacy_card_charges_only_started_rounds(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "gateway", rounds=10, max_epsilon=7.0)
    assert run.stopped is not None
    assert "stopped before round 3 of 10" in run.stopped
    assert (run.privacy["rounds"], run.privacy["steps"]) == (2, 4)
    assert run.privacy["guarantees"][0]["epsilon"] <= 7.0
