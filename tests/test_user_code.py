"""A user's own data set and model, named as module:function."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tests.test_models
from fedray.commands.cli import main
from fedray.config.user_code import code_digest, find_function, is_reference
from fedray.models.loading import load_model

NUMPY = """
import numpy as np
rng = np.random.default_rng(0)
def records(number):
    y = rng.integers(0, 3, number)
    return (3 * np.eye(3, 5)[y] + rng.normal(size=(number, 5))), y
"""
TORCH = """
import torch
torch.manual_seed(0)
def records(number):
    y = torch.randint(0, 3, (number,))
    return 3 * torch.eye(3, 5)[y] + torch.randn(number, 5), y
"""
FORMS = {
    "one_pair": "def data(gateways): return records(400), records(200)",
    "list_of_shards": "def data(gateways): return [records(80 + i) for i in range(gateways)], records(200)",
    "lazy_shards": """
class Shards:
    def __init__(self, gateways): self.gateways = gateways
    def __len__(self): return self.gateways
    def __getitem__(self, index): return records(100)
def data(gateways): return Shards(gateways), records(200)
""",
}
MODEL = """
from torch import nn
def make(): return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
"""
ARGV = [
    *("--dataset", "mine:data", "--gateways", "4", "--batch-size", "32", "--pool", "inline", "--rounds", "3"),
    *("--seed", "1", "--out", "run", "--noise-level", "gateway", "--noise-multiplier", "0.2"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty directory; modules imported from there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", [NUMPY, TORCH], ids=["numpy", "torch"])
def test_main_trains_on_a_users_data(form: str, library: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(library + FORMS[form])
    lazy = ["--samples-per-gateway", "100"] if form == "lazy_shards" else []
    assert main([*ARGV, *lazy]) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("accuracy ")[-1].split()[0]) > 0.8


def test_main_trains_a_users_model(here: Path) -> None:
    (here / "mine.py").write_text(NUMPY + FORMS["one_pair"] + MODEL)
    assert main([*ARGV, "--model", "mine:make", "--quiet"]) == 0
    model = load_model(here / "run", find_function("mine:make", "--model"))
    assert isinstance(model, torch.nn.Sequential)
    assert model[0].weight.shape == (16, 5)


def test_main_trains_a_fixed_model(here: Path) -> None:
    (here / "mine.py").write_text(
        NUMPY
        + FORMS["one_pair"]
        + "\nfrom torch import nn\n"
        + "def make(): return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    assert main([*ARGV, "--model", "mine:make", "--fix-model", "--quiet"]) == 0


def test_find_function_prefers_the_current_directory(here: Path) -> None:
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "twice.py").write_text("def f(): return 'elsewhere'")
    (here / "twice.py").write_text("def f(): return 'here'")
    sys.path.insert(0, str(elsewhere))
    assert find_function("twice:f", "--model")() == "here"


def test_find_function_takes_packages(here: Path) -> None:
    (here / "pack").mkdir()
    (here / "pack" / "inner.py").write_text("def f(): return 3")
    assert find_function("pack.inner:f", "--model")() == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a:b", True), ("a.b:c", True), ("a", False), (":b", False), ("a:", False), ("a:b:c", False), ("a/b.py:c", False)],
)
def test_is_reference(name: str, expected: bool) -> None:
    assert is_reference(name) is expected


def smoothed(amount: float) -> Callable[..., torch.Tensor]:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, reduction="none", label_smoothing=amount)

    return loss


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(2, 2), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helped(self.layer(x)) * self.scale


class Steeper(Scaled):
    steepness = 2

    def __init__(self) -> None:
        super().__init__(2.0)

    @staticmethod
    def bent(x: torch.Tensor) -> torch.Tensor:
        return x**2


def helped(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) * SLOPE


SLOPE = 2.0


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return tests.test_models.from_elsewhere(x)  # type: ignore[attr-defined]


def test_code_digest_sees_constants_closures_attributes_and_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = [
        lambda x: x + 1,
        lambda x: x + 2,
        smoothed(0.1),
        smoothed(0.2),
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(F.cross_entropy, label_smoothing=0.2),
        Scaled(2.0),
        Scaled(3.0),
    ]
    found = [code_digest([part]) for part in parts]
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    found.append(code_digest([Scaled(2.0)]))
    monkeypatch.setitem(globals(), "helped", torch.tanh)
    found.append(code_digest([Scaled(2.0)]))
    monkeypatch.setitem(globals(), "helped", F.gelu)
    found.append(code_digest([Scaled(2.0)]))
    found.append(code_digest([elsewhere]))
    monkeypatch.setattr(tests.test_models, "from_elsewhere", F.gelu, raising=False)
    found.append(code_digest([elsewhere]))
    found.append(code_digest([Steeper()]))
    monkeypatch.setattr(Scaled, "forward", lambda self, x: x)  # inherited
    found.append(code_digest([Steeper()]))
    monkeypatch.setattr(Steeper, "bent", staticmethod(lambda x: x**3))
    found.append(code_digest([Steeper()]))
    monkeypatch.setattr(Steeper, "steepness", 3)
    found.append(code_digest([Steeper()]))
    assert len(set(found)) == len(found)


def test_code_digest_leaves_data_alone() -> None:
    numbers = list(range(10**6))
    assert code_digest([lambda: numbers]) == code_digest([lambda: numbers])


def test_code_digest_is_the_same_in_every_process() -> None:
    code = "from tests.test_user_code import *; print(code_digest([smoothed(0.1), Scaled(2.0), helped]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code_digest([smoothed(0.1), Scaled(2.0), helped])


def test_code_digest_takes_model_libraries_by_their_names() -> None:
    """Their code, thousands of functions, counts by its version, which is noted where it is installed."""

    def block(slope: float, module: str) -> Any:
        def forward(self: Any, x: Any) -> Any:
            return x * slope

        return type("Block", (), {"forward": forward, "__module__": module})()

    for library in ("transformers.models.bert", "peft.tuners.lora"):
        assert code_digest([block(2.0, library)]) == code_digest([block(3.0, library)])
    assert code_digest([block(2.0, "mine")]) != code_digest([block(3.0, "mine")])
