"""Bad data of a --dataset: exit code 2 and one sentence, before anything is started or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.arguments import changed
from tests.bad_input.cases import Case, check_one_sentence, check_refusal, indent, run_command
from tests.zygote import python


def data(body: str, argv: str = "", *words: str) -> Case:
    """Return a case whose --dataset has this body; x and y are good arrays of 64 records and 4 classes."""
    good = "x = np.zeros((64, 5), np.float32); y = np.arange(64) % 4"
    code = f"import numpy as np, torch\ndef data(gateways):\n    {good}\n" + indent(body)
    code += "def model():\n    return torch.nn.Linear(5, 4)\n"
    base = ["--dataset", "mine:data", "--gateways", "4", "--batch-size", "8"]
    return Case(" ".join(changed(base, *argv.split())), words, code)


PAIR = "return (x, y), (x, y)"
SHARDS = "shards = [(x.copy(), y.copy()) for _ in range(4)]"
CASES = {
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


@pytest.mark.parametrize("name", CASES)
def test_main_refuses(
    name: str, project: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], project, tmp_path, capsys)


@pytest.mark.slow
def test_main_refuses_a_bad_lazy_shard_in_actors_before_round_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CASES["data_lazy_bad_shard"].code)
    flags = ["--dataset", "mine:data", "--gateways", "4", "--batch-size", "8", "--samples-per-gateway", "64"]
    done = run_command(*python("fedray"), *flags, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    check_one_sentence(done.stderr, ("shard of gateway 3", "label -3"))
    assert not (tmp_path / "run").exists()
