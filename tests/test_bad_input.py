"""Every kind of bad input ends with exit code 2 and one sentence, before anything is started or written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fedray
from fedray.commands.cli import main
from fedray.errors import InputError
from tests.zygote import python

NOWHERE = ["--ray-address", "127.0.0.1:1"]  # whatever reached Ray would complain about this address instead


class Case(NamedTuple):
    """Arguments, the words that the sentence must hold, and the user's mine.py, if any."""

    argv: str
    words: tuple[str, ...]
    code: str = ""


def data(body: str, argv: str = "", *words: str) -> Case:
    """Return a case whose --dataset has this body; x and y are good arrays of 64 records and 4 classes."""
    good = "x = np.zeros((64, 5), np.float32); y = np.arange(64) % 4"
    code = f"import numpy as np, torch\ndef data(gateways):\n    {good}\n" + _indent(body)
    code += "def model():\n    return torch.nn.Linear(5, 4)\n"
    return Case(f"--dataset mine:data --gateways 4 --batch-size 8 {argv}", words, code)


def model(body: str, argv: str, *words: str) -> Case:
    """Return a case whose --model is the function of this body, on toy (16 features, 4 classes)."""
    code = f"import threading, torch\nfrom torch import nn\nF = nn.functional\ndef make():\n{_indent(body)}"
    return Case(f"--model mine:make {argv}", words, code)


def module(forward: str, init: str = "self.a = nn.Linear(16, 4)") -> str:
    """Return the body of a model function that makes a module with this forward."""
    lines = ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in init.split("; ")]
    return "\n".join([*lines, "    def forward(self, x):", f"        {forward}", "return M()"])


def _indent(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.split("\n"))


FLAGS = {
    "unknown_flag": Case("--gatways 3", ("--gatways", "did you mean --gateways?")),
    "unknown_flag_far": Case("--zzz", ("--zzz", "no flag", "--help")),
    "stray_word": Case("train", ("'train'", "--name value")),
    "missing_value": Case("--rounds", ("--rounds has no value", "whole number")),
    "missing_value_before_flag": Case("--pool --quiet", ("--pool has no value", "ray, inline")),
    "text_for_count": Case("--rounds abc", ("--rounds is 'abc'", "whole number of at least 1")),
    "fraction_for_count": Case("--seed 1.5", ("--seed is '1.5'", "whole number")),
    "text_for_number": Case("--lr=fast", ("--lr is 'fast'", "positive")),
    "unknown_level": Case("--noise-level user", ("--noise-level is 'user'", "none, batch, sample, gateway")),
    "unknown_optimizer": Case("--optimizer rmsprop", ("--optimizer is 'rmsprop'", "adam, sgd")),
    "unknown_device": Case("--device tpu", ("--device is 'tpu'", "auto, cpu, cuda")),
    "unknown_weights": Case("--weights size", ("--weights is 'size'", "uniform, records")),
    "switch_with_value": Case("--quiet=3", ("--quiet is '3'", "takes no value")),
    "no_gateways": Case("--gateways 0", ("--gateways is 0", "at least 1")),
    "negative_rounds": Case("--rounds -1", ("--rounds is -1", "at least 1")),
    "no_local_steps": Case("--local-steps 0", ("--local-steps is 0", "at least 1")),
    "no_batch": Case("--batch-size 0", ("--batch-size is 0", "at least 1")),
    "negative_sigma": Case("--noise-multiplier -1", ("--noise-multiplier is -1", "--noise-level none")),
    "zero_sigma": Case("--noise-multiplier 0", ("--noise-multiplier is 0", "--noise-level none")),
    "nan_sigma": Case("--noise-multiplier nan", ("--noise-multiplier is nan", "between")),
    "infinite_clip_norm": Case("--clip-norm inf", ("--clip-norm is inf", "between 1e-15 and 1e15")),
    "negative_clip_norm": Case("--clip-norm -2", ("--clip-norm is -2", "between")),
    "negative_lr": Case("--lr -0.1", ("--lr is -0.1", "positive")),
    "nan_lr": Case("--lr nan", ("--lr is nan", "finite")),
    "overflowing_lr": Case("--lr 1e999", ("--lr is inf", "finite")),
    "zero_delta": Case("--delta 0", ("--delta is 0", "between")),
    "delta_one": Case("--delta 1", ("--delta is 1", "between")),
    "negative_target": Case("--target-epsilon -1", ("--target-epsilon is -1", "positive")),
    "infinite_budget": Case("--max-epsilon inf", ("--max-epsilon is inf", "finite")),
    "negative_seed": Case("--seed -1", ("--seed is -1", "between 0 and")),
    "no_gateways_per_actor": Case("--gateways-per-actor 0", ("--gateways-per-actor is 0", "auto or")),
    "text_for_gateways_per_actor": Case("--gateways-per-actor all", ("--gateways-per-actor is 'all'", "auto or")),
    "no_samples": Case("--samples-per-gateway 0", ("--samples-per-gateway is 0", "at least 1")),
    "unknown_partition": Case("--partition shards", ("--partition is 'shards'", "iid or dirichlet:ALPHA")),
    "zero_alpha": Case("--partition dirichlet:0", ("--partition is 'dirichlet:0'", "ALPHA > 0")),
    "text_alpha": Case("--partition dirichlet:x", ("--partition is 'dirichlet:x'", "ALPHA > 0")),
    "missing_alpha": Case("--partition dirichlet", ("--partition is 'dirichlet'", "ALPHA > 0")),
    "unknown_dataset": Case("--dataset mnist", ("--dataset is 'mnist'", "toy, digits or module:function")),
    "unknown_model": Case("--model resnet", ("--model is 'resnet'", "mlp, cnn or module:function")),
    "target_with_sigma": Case(
        "--target-epsilon 3 --noise-multiplier 1", ("--target-epsilon 3", "--noise-multiplier 1", "exclude each other")
    ),
    "target_without_noise": Case("--target-epsilon 3 --noise-level none", ("--target-epsilon is 3", "choose sample")),
    "budget_without_noise": Case("--max-epsilon 3 --noise-level none", ("--max-epsilon is 3", "choose sample")),
    "sigma_without_noise": Case(
        "--noise-multiplier 1 --noise-level none", ("--noise-multiplier is 1", "choose sample")
    ),
    "weighted_gateway_level": Case(
        "--noise-level gateway --weights records", ("--weights is 'records'", "--noise-level gateway", "uniform")
    ),
    "budget_below_round_one": Case("--max-epsilon 0.01", ("--max-epsilon is 0.01", "round 1", "raise")),
    "target_out_of_reach": Case(
        "--noise-level batch --delta 1e-14 --target-epsilon 1e-12", ("--target-epsilon is 1e-12", "raise it")
    ),
    "rate_above_one": Case(
        "--samples-per-gateway 10", ("--batch-size is 64", "10 records", "q would be 6.4 > 1", "lower")
    ),
    "rate_above_one_digits": Case("--dataset digits --gateways 50", ("--batch-size is 64", "28 records", "lower it")),
    "samples_of_digits": Case(
        "--dataset digits --samples-per-gateway 9", ("--samples-per-gateway is 9", "leave it out")
    ),
    "more_gateways_than_records": Case(
        "--dataset digits --gateways 1438", ("--gateways is 1438", "1437 training records", "at least one")
    ),
    "images_needed": Case("--model cnn", ("--model cnn", "images", "use --model mlp")),
    "no_gpu_inline": Case("--device cuda --pool inline --dry-run", ("--device is cuda", "no GPU", "--device cpu")),
    "ray_client": Case("--ray-address ray://127.0.0.1:1", ("--ray-address ray://127.0.0.1:1", "ray job submit")),
    "out_name_too_long": Case(f"--out {'x' * 300}", ("--out xxx", "too long", "new or empty directory")),
}
FILES = {
    "config_missing": Case("--config none.toml", ("--config none.toml", "cannot be read")),
    "config_directory": Case("--config .", ("--config .", "cannot be read")),
    "config_without_value": Case("--quiet --config", ("--config has no value", "TOML")),
    "config_not_toml": Case("--config mine.py", ("--config mine.py", "not TOML", "name = value"), "rounds: 3"),
    "config_unknown_key": Case("--config mine.py", ("round is no setting", "did you mean --rounds?"), "round = 3"),
    "config_text_for_count": Case("--config mine.py", ("rounds is '3'", "whole number"), "rounds = '3'"),
    "config_fraction_for_count": Case("--config mine.py", ("rounds is 2.5", "whole number"), "rounds = 2.5"),
    "config_truth_for_count": Case("--config mine.py", ("rounds is True", "whole number"), "rounds = true"),
    "config_text_for_switch": Case("--config mine.py", ("quiet is 'yes'", "true or false"), "quiet = 'yes'"),
    "config_number_for_path": Case("--config mine.py", ("out is 3", "a path"), "out = 3"),
    "config_table": Case("--config mine.py", ("rounds is {'a': 1}", "whole number"), "[rounds]\na = 1"),
    "config_unknown_choice": Case("--config mine.py", ("pool is 'dask'", "ray, inline"), "pool = 'dask'"),
    "config_out_of_range": Case("--config mine.py", ("--lr is nan", "finite"), "lr = nan"),
}
PAIR = "return (x, y), (x, y)"
SHARDS = "shards = [(x.copy(), y.copy()) for _ in range(4)]"
DATA = {
    "data_no_module": Case(
        "--dataset nowhere:data", ("--dataset nowhere:data", "does not import", "current directory")
    ),
    "data_syntax_error": Case("--dataset mine:data", ("mine", "does not import", "SyntaxError"), "def data(:"),
    "data_exits_at_import": Case("--dataset mine:data", ("does not import", "SystemExit"), "import sys; sys.exit(3)"),
    "data_no_function": Case("--dataset mine:data", ("no function data", "spelling"), "train = 3"),
    "data_raises": data("raise OSError('disk\\n  on fire')", "", "data raised OSError: disk on fire"),
    "data_returns_none": data("pass", "", "returned NoneType", "(train, test)"),
    "data_returns_number": data("return 3, (x, y)", "", "train is int", "sequence of such pairs"),
    "data_test_no_pair": data("return (x, y), x", "", "test is ndarray", "pair (x, y)"),
    "data_nan": data(f"x[7, 2] = np.nan; {PAIR}", "", "record 7 is NaN", "clean the data"),
    "data_infinite": data(f"x[3] = np.inf; {PAIR}", "", "record 3 is NaN or infinite"),
    "data_too_large_for_float32": data(f"x = x.astype(float); x[5] = 1e300; {PAIR}", "", "record 5 is NaN or infinite"),
    "data_nan_tensor": data(f"x = torch.from_numpy(x); x[1] = float('nan'); {PAIR}", "", "record 1 is NaN"),
    "data_sparse_tensor": data(f"x = torch.from_numpy(x).to_sparse(); {PAIR}", "", "train: x", "one array"),
    "data_text": data(f"x = x.astype(str); {PAIR}", "", "x has type <U32", "real numbers"),
    "data_complex": data(f"x = x.astype(complex); {PAIR}", "", "complex128", "real numbers"),
    "data_ragged": data("return (x, y), ([[1.0], [1.0, 2.0]], [0, 1])", "", "test: x is ragged", "equal rows"),
    "data_lengths_differ": data("return (x, y[:-1]), (x, y)", "", "x has 64 records and y has 63", "equally many"),
    "data_empty": data("return (x[:0], y[:0]), (x, y)", "", "train is empty", "at least one record"),
    "data_empty_test": data("return (x, y), (x[:0], y[:0])", "", "test is empty", "at least one record"),
    "data_no_features": data("return (x[:, :0], y), (x, y)", "", "shape (64, 0)", "at least one value"),
    "data_scalar": data("return (x, np.float32(3)), (x, y)", "", "single numbers", "one entry a record"),
    "data_negative_label": data(f"y[3] = -1; {PAIR}", "", "label -1 is out of range", "class indices"),
    "data_float_label": data(f"y = y + 0.5; {PAIR}", "", "label 0.5 is no whole number", "class indices"),
    "data_nan_label": data(f"y = y.astype(float); y[2] = np.nan; {PAIR}", "", "y of record 2 is NaN"),
    "data_one_hot_labels": data(f"y = np.eye(4)[y]; {PAIR}", "", "y has shape (64, 4)", "one class index a record"),
    "data_huge_label": data(f"y[0] = 10**9; {PAIR}", "", "label 1000000000 is out of range", "below 100000"),
    "data_more_gateways_than_records": data(
        PAIR, "--gateways 65 --batch-size 1", "--gateways is 65", "64 training records"
    ),
    "data_rate_above_one": data(PAIR, "--batch-size 17", "--batch-size is 17", "16 records", "lower it"),
    "data_samples_given": data(PAIR, "--samples-per-gateway 9", "--samples-per-gateway is 9", "leave it out"),
    "data_test_of_other_shape": data("return (x, y), (x[:, :3], y)", "", "shape (5,)", "(3,)", "agree"),
    "data_test_of_other_kind": data("return (x, y), (x.astype(int), y)", "--model mlp", "x", "float32"),
    "data_whole_numbers": data(f"x = x.astype(int); {PAIR}", "", "forward pass", "make it float32"),
    "data_several_lengths_differ": data(
        "return ((x, x[:-1]), y), ((x, x), y)", "", "train: x[1] has 63 records and y has 64", "stack rows"
    ),
    "data_several_nan": data(
        "z = x.copy(); z[4, 1] = np.nan; return ({'a': x, 'b': z}, y), ({'a': x, 'b': x}, y)",
        "",
        "train: x['b'] of record 4",
    ),
    "data_several_keys": data(
        "return ({0: x}, y), ({0: x}, y)", "", "train: x has the key 0", "names of the model's arguments"
    ),
    "data_several_empty": data("return ({}, y), ({}, y)", "", "train: x is an empty mapping", "arrays"),
    "data_several_test_of_one": data(
        "return ({'a': x}, y), (x, y)",
        "--model mine:model",
        "shard 0: x is a dict of arrays 'a', elsewhere it is one array",
    ),
    "data_several_for_mlp": data(
        "return ((x, x), y), ((x, x), y)", "", "--model is mlp but x is several inputs", "of your own"
    ),
    "data_several_for_linear": data(
        "return ((x, x), y), ((x, x), y)",
        "--model mine:model",
        "shape ((5,), (5,))",
        "x is a tuple",
        "with 2 arguments",
    ),
    "data_several_names": data(
        "return ({'a': x}, y), ({'a': x}, y)", "--model mine:model", "x is a dict", "with the arguments a"
    ),
    "data_wrong_number_of_shards": data(f"{SHARDS}; return shards[:3], (x, y)", "", "3 shards for --gateways 4"),
    "data_pair_of_lists": data(
        "return (x.tolist(), y.tolist()), (x, y)", "", "2 shards for --gateways 4", "numpy arrays"
    ),
    "data_empty_shard": data(f"{SHARDS}; shards[2] = (x[:0], y[:0]); return shards, (x, y)", "", "shard 2 is empty"),
    "data_shard_no_pair": data(f"{SHARDS}; shards[1] = None; return shards, (x, y)", "", "shard 1 is NoneType", "pair"),
    "data_shard_nan": data(
        f"{SHARDS}; shards[3][0][1] = np.nan; return shards, (x, y)", "", "shard 3", "record 1 is NaN"
    ),
    "data_shard_ragged": data(
        f"{SHARDS}; shards[0] = ([[1], [1, 2]], y); return shards, (x, y)", "", "shard 0", "ragged"
    ),
    "data_shard_of_other_shape": data(
        f"{SHARDS}; shards[1] = (x[:, :2], y); return shards, (x, y)", "", "shard 1", "shape (2,)", "agree"
    ),
    "data_shard_of_other_kind": data(
        f"{SHARDS}; shards[1] = (x.astype(int), y); return shards, (x, y)", "", "shard 1", "int64", "one kind"
    ),
    "data_shards_partitioned": data(
        f"{SHARDS}; return shards, (x, y)", "--partition dirichlet:1", "--partition is 'dirichlet:1'", "leave it out"
    ),
    "data_lazy_of_unknown_size": data(
        "class L:\n    def __len__(self): return 4\n    def __getitem__(self, i): return x, y\nreturn L(), (x, y)",
        "",
        "loaded lazily",
        "--samples-per-gateway",
    ),
    "data_lazy_wrong_number": data(
        "class L:\n    def __len__(self): return 9\n    def __getitem__(self, i): return x, y\nreturn L(), (x, y)",
        "--samples-per-gateway 64",
        "9 shards for --gateways 4",
    ),
    "data_lazy_bad_shard": data(
        "class L:\n    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return x, (y if i < 3 else -y)\nreturn L(), (x, y)",
        "--samples-per-gateway 64 --pool inline",
        "shard of gateway 3",
        "label -3",
    ),
}
MODELS = {
    "model_no_module": Case("--model nowhere:make", ("--model nowhere:make", "does not import")),
    "model_no_function": Case("--model mine:make", ("no function make", "spelling"), "import torch"),
    "model_raises": model("raise KeyError('layers')", "", "make raised KeyError: 'layers'"),
    "model_is_class_name": model("return nn.Linear", "", "returned type", "torch.nn.Module"),
    "model_returns_none": model("pass", "", "returned NoneType", "torch.nn.Module"),
    "model_no_params": model("return nn.ReLU()", "", "no trainable parameter", "requires_grad"),
    "model_frozen": model("return nn.Linear(16, 4).requires_grad_(False)", "", "no trainable parameter"),
    "model_float64": model("return nn.Linear(16, 4).double()", "", "weight is torch.float64", "model.float()"),
    "model_half": model("return nn.Linear(16, 4).half()", "", "weight is torch.float16", "model.float()"),
    "model_lazy_layers": model("return nn.LazyLinear(4)", "", "weight has no shape yet", "sizes given"),
    "model_batch_norm": model(
        "return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))",
        "",
        "1 is BatchNorm1d",
        "GroupNorm",
        "--fix-model",
    ),
    "model_batch_norm_none": model(
        "return nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))", "--noise-level none", "0 is BatchNorm1d"
    ),
    "model_mutates_buffer": model(
        module("self.seen += 1; return self.a(x)", "self.a = nn.Linear(16, 4); self.register_buffer('seen', torch.zeros(1))"),
        "",
        "buffer seen changes",
        "remove it",
    ),
    "model_makes_buffer": model(module("self.register_buffer('b', x.sum()); return self.a(x)"), "", "buffer b changes"),
    "model_couples_records": model(module("return self.a(x - x.mean(dim=0))"), "", "Linear", "other records of its batch"),
    "model_couples_with_dropout": model(
        module("return self.a(F.dropout(x - x.mean(dim=0)))"), "", "other records of its batch", "independent"
    ),
    "model_wrong_inputs": model("return nn.Linear(17, 4)", "", "forward pass", "shape (16,)", "the data's records"),
    "model_too_few_outputs": model("return nn.Linear(16, 3)", "", "label 3 is out of range", "3 outputs", "0 … 2"),
    "model_outputs_flat": model(module("return self.a(x).sum(1)"), "", "outputs have shape (3,)", "[records, classes]"),
    "model_outputs_whole": model(module("return self.a(x).long()"), "", "outputs have shape (3, 4)", "float32"),
    "model_outputs_tuple": model(module("return self.a(x), x"), "", "returned tuple, not a tensor"),
    "model_cannot_be_copied": model(
        module("return self.a(x)", "self.a = nn.Linear(16, 4); self.lock = threading.Lock()"), "", "cannot be copied", "lock"
    ),
    "model_raises_when_it_trains": model(
        module("if torch.is_grad_enabled(): raise ValueError('broke')\n        return self.a(x)"),
        "",
        "on a single record",
        "ValueError: broke",
    ),
    "model_leaves": model(module("raise SystemExit(0)"), "", "forward pass", "SystemExit", "must accept"),
    "model_leaves_when_it_trains": model(
        module("if torch.is_grad_enabled(): raise SystemExit(0)\n        return self.a(x)"),
        "",
        "on a single record",
        "SystemExit",
        "must return",
    ),
    "model_looks_at_values": model(
        module("return self.a(torch.from_numpy(x.numpy()))"), "", "looks at the values of a record", "use torch.where"
    ),
    "model_of_unproven_parts_for_opacus": model(
        module("return F.linear(x, self.a.weight, self.a.bias)"), "--engine opacus", "--engine is opacus", "--engine auto"
    ),
    "model_of_unproven_parts_as_sequence": model(
        module("return self.a(x)"), "--engine sequence", "--engine is sequence", "(M)", "--engine auto"
    ),
    "model_fix_not_enough": model(
        "return nn.Sequential(nn.Linear(17, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))", "--fix-model", "forward pass"
    ),
}  # fmt: skip
CASES = {**FLAGS, **FILES, **DATA, **MODELS}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Work in an empty directory; the fixture's value writes mine.py there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield lambda code: (tmp_path / "mine.py").write_text(code) and None
    sys.modules.pop("mine", None)


def check_one_sentence(stderr: str, words: tuple[str, ...]) -> None:
    """Check that stderr is one sentence of a sensible length that holds the words."""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith(".\n")
    assert "Traceback" not in stderr
    assert len(stderr) < 800
    missing = [word for word in words if word not in stderr]
    assert not missing, f"{missing} not in: {stderr}"


@pytest.mark.parametrize("name", CASES)
def test_main_refuses(
    name: str, project: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if case.code:
        project(case.code)
    before = sorted(tmp_path.rglob("*"))
    code = main([*NOWHERE, *case.argv.split()])
    seen = capsys.readouterr()
    assert code == 2, seen
    check_one_sentence(seen.err, case.words)
    assert seen.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_main_refuses_out_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*NOWHERE, "--out", str(tmp_path / "run")]) == 2
    check_one_sentence(capsys.readouterr().err, ("--out", str(tmp_path / "run"), "not empty", "new or empty directory"))


def test_main_refuses_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    assert main([*NOWHERE, "--out", str(tmp_path / "run")]) == 2
    check_one_sentence(capsys.readouterr().err, ("--out", "is a file", "new or empty directory"))


def test_main_refuses_out_under_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*NOWHERE, "--out", str(tmp_path / "file" / "deep" / "run")]) == 2
    check_one_sentence(capsys.readouterr().err, ("--out", f"under {tmp_path / 'file'}", "which is a file", "choose"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_main_refuses_out_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([*NOWHERE, "--out", str(tmp_path / "run")]) == 2
    check_one_sentence(capsys.readouterr().err, ("--out", "may not be written", "choose"))


def test_main_refuses_an_address_where_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    done = _run(sys.executable, "-m", "fedray", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 2
    check_one_sentence(done.stderr, ("--ray-address 127.0.0.1:1", "cannot be reached", "start a cluster"))


@pytest.mark.slow
def test_main_refuses_a_bad_lazy_shard_in_actors_before_round_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DATA["data_lazy_bad_shard"].code)
    flags = ["--dataset", "mine:data", "--gateways", "4", "--batch-size", "8", "--samples-per-gateway", "64"]
    done = _run(*python("fedray"), *flags, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    check_one_sentence(done.stderr, ("shard of gateway 3", "label -3"))
    assert not (tmp_path / "run").exists()


def test_main_refuses_bad_flags_without_importing_torch() -> None:
    code = "import sys; from fedray.commands.cli import main; main(['--rounds', 'x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)
    assert time.monotonic() - start < 60
    return done


X, Y = np.zeros((64, 5), np.float32), np.arange(64) % 4
CONFIG = fedray.RunConfig(batch_size=8, pool="inline")


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
        fedray.RunConfig(**{field: value})  # type: ignore[arg-type]  # that is the point


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
        fedray.RunConfig(**{name: value})


def test_run_config_takes_paths_as_text(tmp_path: Path) -> None:
    assert fedray.RunConfig(out=str(tmp_path)) == fedray.RunConfig(out=tmp_path)  # type: ignore[arg-type]
    assert fedray.RunConfig(resume=str(tmp_path)).resume == tmp_path  # type: ignore[arg-type]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_main_refuses_cuda_on_a_cluster_without_gpus(
    dry: list[str], outdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cuda", "--out", str(outdir), *dry]) == 2
    check_one_sentence(capsys.readouterr().err, ("--device is cuda", "no GPU", "--device cpu"))
    assert not outdir.exists()


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
