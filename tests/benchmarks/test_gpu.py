"""The GPU benchmark on a CPU: it runs without Ray and Opacus, keeps partial results, and its models have their sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from device.models import models
from device.report import sizes
from device.rows import ALL, HOOKS, Benchmark, Equality, Row
from families import gate

ROOT = Path(__file__).resolve().parents[2]
# A machine where neither can be imported.
BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "opacus", "dp_accounting", "matplotlib", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without_packages(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def benchmark_without_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = "sys.argv[0] = 'benchmarks/gpu.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    return without_packages(run, "--device", "cpu", "--quick", *arguments)


def test_training_and_privacy_can_be_imported_without_ray_and_opacus() -> None:
    modules = "fedray.training.engines, fedray.training.tracing, fedray.privacy.noise, fedray.orchestrator.plan"
    done = without_packages(f"sys.path.insert(0, 'benchmarks')\nimport {modules}\nimport device.rows, device.report")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_dry_run_measures_everything_without_ray_and_opacus(tmp_path: Path) -> None:
    done = benchmark_without_packages("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert content["complete"]
    assert {one["model"]: one["met"] for one in content["equality"]} == dict.fromkeys(models(True), True)
    for row in content["rows"]:
        if row["system"].startswith("Opacus"):
            assert "Opacus is not here" in row["failure"]
        else:
            assert row["samples_per_s"] > 0


def test_run_that_is_cut_off_keeps_what_it_found(tmp_path: Path) -> None:
    done = benchmark_without_packages("--out", str(tmp_path), "--seconds", str(gpu.GRACE_S + 0.1))
    assert done.returncode == 1, done.stderr
    assert not json.loads(next(tmp_path.glob("*.json")).read_text())["complete"]
    assert "PARTIAL" in next(tmp_path.glob("*.md")).read_text()


def test_rows_that_no_time_is_left_for_say_so() -> None:
    benchmark = Benchmark({"mlp": models(True)["mlp"]}, torch.device("cpu"), deadline=0.0)
    assert all("not measured" in str(row.failure) for row in benchmark.rows())


def test_benchmark_names_its_rows() -> None:
    quick = Benchmark({"mlp": models(True)["mlp"]}, torch.device("cpu"), deadline=0.0, sizes=(2, 4))
    assert [(row.system, row.gateways) for row in quick.rows()][-1] == (ALL, 4)
    assert HOOKS in [row.system for row in quick.rows()]


def test_equality_is_missed_where_the_device_is_apart_or_fails() -> None:
    assert Equality(model="mlp", distance=1e-5).met
    assert not Equality(model="mlp", distance=2e-4).met
    assert not Equality(model="mlp", distance=float("nan")).met
    assert not Equality(model="mlp", failure="out of memory").met


def test_row_counts_the_median_round() -> None:
    assert Row(model="mlp", system=ALL, gateways=2, samples=6, round_s=(1.0, 2.0, 30.0)).samples_per_s == 3.0


def test_models_have_the_sizes_that_the_report_claims() -> None:
    found = {key: sizes(family) for key, family in models(quick=False).items()}
    assert found["resnet"]["parameters"] == pytest.approx(1e6, rel=0.1)
    assert found["lora"]["parameters"] == pytest.approx(10e6, rel=0.1)
    assert found["lora"]["trainable"] < found["lora"]["parameters"] / 100


@pytest.mark.parametrize("key", models(quick=True))
def test_models_give_the_sums_of_single_records(key: str) -> None:
    assert gate.check(models(quick=True)[key]) <= 1e-5


def test_wheels_are_unpacked_onto_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_by_a_wheel.py", "ANSWER = 42")
    gpu.unpack(tmp_path / "wheels", tmp_path / "unpacked")
    assert __import__("carried_by_a_wheel").ANSWER == 42


def test_command_without_a_gpu_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "use --device cpu --quick" in capsys.readouterr().err
