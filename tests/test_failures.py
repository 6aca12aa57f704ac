"""Runs that fail or are interrupted, end to end: exit codes, what is said, and what stays readable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedray.commands.cli import main
from tests.zygote import python

FAILS_IN_ROUND_3 = """
import os, pathlib, time
import numpy as np
from torch import nn

HERE = pathlib.Path(__file__).parent

def work(where):
    ledger = HERE / "run" / "ledger.jsonl"  # a round is charged before it begins
    if where in {where} and ledger.exists() and ledger.read_text().count('{{"event": "charge"') == 3:
        building = HERE / f".{{os.getpid()}}"  # two actors fail at once, and may be killed while they write
        building.write_text(str(time.time()))
        building.replace(HERE / f"failed_at-{{os.getpid()}}")
        raise ValueError("the sensor broke")

class Sensor(nn.Module):  # runs in the driver alone: it is traced there, and scored
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
    def forward(self, x):
        work("scoring")
        return self.layer(x)

def records(number):
    rng = np.random.default_rng(0)
    return rng.normal(size=(number, 16)).astype(np.float32), rng.integers(0, 4, number)

class Shards:  # too large to be kept: each round loads them
    def __init__(self, gateways):
        self.gateways = gateways
    def __len__(self):
        return self.gateways
    def __getitem__(self, index):
        work("loading")
        return records(4000)

def make():
    return Sensor()

def data(gateways):
    return Shards(gateways), records(64)
"""
# With so little memory, a shard is kept alone and gateways are trained one after the other.
MINE = [
    *("--dataset", "mine:data", "--samples-per-gateway", "4000", "--batch-size", "3000", "--memory-limit", "1"),
    *("--gateways", "4", "--local-steps", "2"),
]
ENDLESS = [*("--gateways", "2", "--rounds", "100000", "--samples-per-gateway", "64", "--local-steps", "1")]


POOLS = pytest.mark.parametrize("pool", ["inline", pytest.param("ray", marks=pytest.mark.slow)])


@POOLS
def test_main_ends_with_1_when_the_users_data_raise(pool: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILS_IN_ROUND_3.format(where=["loading"]))
    done = subprocess.run(
        [*python("fedray"), *MINE, "--out", "run", "--pool", pool],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    ended = time.time()
    assert done.returncode == 1, done.stderr
    failed_at = [float(path.read_text()) for path in tmp_path.glob("failed_at-*")]
    assert ended - min(failed_at) < 10
    said = [line for line in done.stderr.splitlines() if line.startswith("error: gateway")]
    assert len(said) == 1, done.stderr
    assert "failed in round 3: shard of gateway " in said[0]
    assert "(ValueError: the sensor broke)" in said[0]
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count('raise ValueError("the sensor broke")') == 1
    assert "RayTaskError" not in done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [record["round"] for record in metrics] == [1, 2]
    assert [entry["round"] for entry in ledger if entry["event"] == "charge"] == [
        1,
        2,
        3,
    ]  # what was started is charged
    assert not (tmp_path / "run" / "model.safetensors").exists()


@POOLS
def test_main_ends_with_1_when_the_users_model_cannot_be_scored(pool: str, tmp_path: Path) -> None:
    """In the driver, while actors fail as well: one sentence and one traceback, and none of Ray's."""
    (tmp_path / "mine.py").write_text(FAILS_IN_ROUND_3.format(where=["loading", "scoring"]))
    done = subprocess.run(
        [*python("fedray"), *MINE, "--model", "mine:make", "--pool", pool, "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: scoring round 2 on the held-out data failed: ValueError: the sensor broke"]
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count('raise ValueError("the sensor broke")') == 1
    assert "Unhandled error" not in done.stderr
    assert f"python -m fedray --resume {tmp_path / 'run'}" in done.stderr
    rounds = [json.loads(line)["round"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [1]


@pytest.mark.parametrize(
    ("module", "where", "flags", "said"),
    [
        (
            "leaves_loading",
            "loading",
            [],
            "error: gateway 0 failed in round 3: shard of gateway 0 cannot be loaded (SystemExit: 0)",
        ),
        (
            "leaves_scoring",
            "scoring",
            ["--model", "leaves_scoring:make"],
            "error: scoring round 2 on the held-out data failed: SystemExit: 0",
        ),
    ],
    ids=["loading", "scoring"],
)
def test_main_ends_with_1_when_the_users_code_leaves_the_program(
    module: str,
    where: str,
    flags: list[str],
    said: str,
    outdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what would be exit code 0: data while a gateway trains, and a model while it is scored."""
    leaves = FAILS_IN_ROUND_3.replace('raise ValueError("the sensor broke")', "raise SystemExit(0)")
    (tmp_path / f"{module}.py").write_text(leaves.format(where=[where]))
    monkeypatch.chdir(tmp_path)
    mine = [argument.replace("mine", module) for argument in MINE]
    assert main([*mine, *flags, "--pool", "inline", "--out", str(outdir)]) == 1
    assert said in capsys.readouterr().err


def _restore_interrupt() -> None:
    # A shell that starts the tests in the background has Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("SIGINT", "inline"),
        pytest.param("SIGTERM", "ray", marks=pytest.mark.slow),
        pytest.param("SIGINT", "ray", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "inline", marks=pytest.mark.slow),
    ],
)
def test_main_ends_with_130_when_interrupted(name: str, pool: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*python("fedray"), *ENDLESS, "--out", "run", "--pool", pool],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_restore_interrupt,  # noqa: PLW1509  # the function only resets a signal
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1/"):
            break
    process.send_signal(signal.Signals[name])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) <= 2  # what happened, and how to go on
    rounds = [json.loads(line)["round"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, len(rounds) + 1))
    assert rounds


def test_main_names_gateways_whose_training_diverges(outdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--pool", "inline", "--noise-level", "none", "--optimizer", "sgd", "--lr", "1e30", "--gateways", "2"]
    assert main([*argv, "--samples-per-gateway", "64", "--out", str(outdir)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: gateway 0")
    assert "NaN or infinite values in round 1" in said
    assert "lower --lr" in said


def test_main_says_so_when_nobody_reads_its_output(tmp_path: Path) -> None:
    argv = ["--pool", "inline", "--gateways", "2", "--rounds", "2000", "--noise-level", "gateway", "--out", "run"]
    with subprocess.Popen(
        [sys.executable, "-m", "fedray", *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("round 1/"):
            assert process.poll() is None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said.count("\n") == 1
    assert "error: nobody reads standard output any more; use --quiet, or send it to a file." in said
    assert f"Go on with: python -m fedray --resume {tmp_path / 'run'}" in said
