"""Settings in groups, by their names alone, and in the form of 0.1."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest

import fedray
from fedray.commands.cli import main, parse
from fedray.config.federation import FederationSettings
from fedray.config.privacy import PrivacySettings
from fedray.config.settings import GROUP_OF, GROUPS, RunConfig
from fedray.errors import InputError

CHANGED = RunConfig().resolve(gateways=4, noise_level="batch", lr=0.5, seed=3, device="cpu", partition="dirichlet:2")


def test_settings_have_names_that_differ() -> None:
    assert len(GROUP_OF) == sum(len(group.__dataclass_fields__) for group in GROUPS.values())


def test_run_config_takes_groups() -> None:
    config = RunConfig(federation=FederationSettings(gateways=4), privacy=PrivacySettings(noise_level="batch"))
    assert config == RunConfig().resolve(gateways=4, noise_level="batch")


def test_resolve_takes_groups_and_names_together() -> None:
    config = RunConfig().resolve(federation=FederationSettings(gateways=4, rounds=2), rounds=3)
    assert (config.federation.gateways, config.federation.rounds) == (4, 3)


def test_resolve_refuses_what_is_no_setting() -> None:
    with pytest.raises(TypeError, match="gateway is no setting"):
        RunConfig().resolve(gateway=4)


def test_run_config_is_frozen_and_can_be_copied_and_sent() -> None:
    with pytest.raises(AttributeError):
        CHANGED.federation.gateways = 3  # type: ignore[misc]  # that is the point
    assert pickle.loads(pickle.dumps(CHANGED)) == copy.deepcopy(CHANGED) == CHANGED


def test_flat_names_work_with_one_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"RunConfig\(\).resolve\(gateways=…, lr=…\)") as warned:
        config = fedray.RunConfig(gateways=4, lr=0.5)  # type: ignore[call-arg]  # the form of 0.1
    assert config == RunConfig().resolve(gateways=4, lr=0.5)
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_flat_names_are_checked() -> None:
    with pytest.warns(DeprecationWarning, match="groups"), pytest.raises(InputError, match="--gateways is 0"):
        fedray.RunConfig(gateways=0)  # type: ignore[call-arg]  # the form of 0.1


def test_flat_reads_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="config.federation.gateways"):
        assert CHANGED.gateways == 4  # type: ignore[attr-defined]  # the form of 0.1


def test_run_config_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no setting 'nonsense'"):
        _ = CHANGED.nonsense  # type: ignore[attr-defined]  # that is the point


def test_groups_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunConfig(federation=FederationSettings(gateways=4)).federation.gateways == 4


def test_config_file_takes_groups_and_names_alone(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        "lr = 0.5\nseed = 3\n[federation]\ngateways = 4\n[privacy]\nnoise-level = 'batch'\n"
    )
    found = parse(["--config", str(tmp_path / "run.toml"), "--device", "cpu", "--partition", "dirichlet:2"])
    assert found == CHANGED


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[federation]\nlr = 1.0\n", r"lr stands under \[federation\]; it belongs under \[training\], or above all"),
        ("gateways = 3\n[federation]\ngateways = 4\n", "gives gateways twice"),
        ("[federation]\ngateway = 4\n", r"gateway is no setting \(did you mean --gateways\?\)"),
        ("federation = 3\n", "federation is no setting"),
        ("[privacy]\nnoise_level = 'nothing'\n", "noise_level is 'nothing'; it must be one of none, batch"),
        ("[machine]\nquiet = 1\n", r"quiet stands under \[machine\]"),
        ("[run]\nquiet = 1\n", "quiet is 1; it must be true or false"),
        ('{"config": 3}', "config is no setting"),
        ('{"config"', "cannot be read"),
        ('{"format": 99, "config": {}, "versions": {"fedray": "9.0"}}', "by fedray 9.0 in format 99"),
    ],
)
def test_config_file_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        parse(["--config", str(tmp_path / "run.toml")])


def test_config_file_may_be_the_config_of_a_run(tmp_path: Path) -> None:
    """A run like it, with the noise that its target epsilon asks for, ends with the same model."""
    small = ["--quiet", "--pool", "inline", "--gateways", "2", "--rounds", "2", "--local-steps", "2", "--seed", "1"]
    small += ["--samples-per-gateway", "64", "--batch-size", "8", "--target-epsilon", "9"]
    assert main([*small, "--out", str(tmp_path / "one")]) == 0
    assert main(["--config", str(tmp_path / "one" / "config.json"), "--out", str(tmp_path / "two")]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
