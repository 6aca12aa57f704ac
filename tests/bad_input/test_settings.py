"""Bad flags, config files, directories and addresses: exit code 2 and one sentence, before anything is started or written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedray.commands.cli import main
from fedray.config.settings import SETTINGS
from tests.bad_input.cases import NOWHERE, Case, check_one_sentence, check_refusal, run_command

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
    "unknown_partition": Case("--partition shards", ("--partition is 'shards'", "iid, dirichlet:ALPHA or module:name")),
    "zero_alpha": Case("--partition dirichlet:0", ("--partition is 'dirichlet:0'", "ALPHA > 0")),
    "text_alpha": Case("--partition dirichlet:x", ("--partition is 'dirichlet:x'", "ALPHA > 0")),
    "missing_alpha": Case("--partition dirichlet", ("--partition is 'dirichlet'", "ALPHA > 0")),
    "unknown_dataset": Case("--dataset mnist", ("--dataset is 'mnist'", SETTINGS["dataset"].words)),
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
CASES = {**FLAGS, **FILES}


@pytest.mark.parametrize("name", CASES)
def test_main_refuses(
    name: str, project: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], project, tmp_path, capsys)


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
    done = run_command(sys.executable, "-m", "fedray", "--ray-address", "127.0.0.1:1")
    assert done.returncode == 2
    check_one_sentence(done.stderr, ("--ray-address 127.0.0.1:1", "cannot be reached", "start a cluster"))


def test_main_refuses_bad_flags_without_importing_torch() -> None:
    code = "import sys; from fedray.commands.cli import main; main(['--rounds', 'x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_main_refuses_cuda_on_a_cluster_without_gpus(
    dry: list[str], outdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cuda", "--out", str(outdir), *dry]) == 2
    check_one_sentence(capsys.readouterr().err, ("--device is cuda", "no GPU", "--device cpu"))
    assert not outdir.exists()
