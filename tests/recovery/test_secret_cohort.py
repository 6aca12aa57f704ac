"""Participation: a cohort of a hundred in a million costs what a hundred cost, and nobody can tell who took part."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedray
from fedray.commands.cli import main
from fedray.privacy.accounting import gaussian_epsilon
from tests.privacy.contour import five_event_delta
from tests.recovery.jobs import SMALL, assert_true, entries, in_child, lines, outcome, round_keys, train

MILLION: dict[str, Any] = {
    "gateways": 1_000_000,
    "participation": 1e-4,
    "rounds": 5,
    "local_steps": 2,
    "batch_size": 8,
    "samples_per_gateway": 32,
    "noise_level": "gateway",
    "pool": "inline",
}


def a_million(out: Path, result: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fedray.Orchestrator(config=fedray.RunConfig().resolve(**MILLION, out=out)).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.write_text(json.dumps({"before_kb": before, "peak_kb": peak}))


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("million")
    assert in_child(a_million, path / "run", path / "memory.json") == 0
    return path


def cohorts(run: Path) -> list[list[int]]:
    return [line["cohort"] for line in lines(run / "private.jsonl")]


def test_a_million_gateways_fit_into_a_gigabyte(million: Path) -> None:
    assert json.loads((million / "memory.json").read_text())["peak_kb"] < 1_000_000


def test_a_cohort_of_a_million_is_a_hundred_others_each_round(million: Path) -> None:
    found = cohorts(million / "run")
    assert len(found) == 5
    assert all(50 < len(cohort) < 160 for cohort in found)
    assert len(set(map(tuple, found))) == 5
    assert max(map(max, found)) > 900_000


def test_a_secret_cohort_claims_the_amplification(million: Path) -> None:
    card = json.loads((million / "run" / "privacy.json").read_text())
    claim = card["guarantees"][0]
    assert (claim["unit"], claim["adjacency"]) == ("gateway", "zero-out")
    assert five_event_delta(claim["epsilon"], sigma=1.0, rate=1e-4) <= claim["delta"]
    assert five_event_delta(claim["epsilon"] / 1.01, sigma=1.0, rate=1e-4) > claim["delta"]
    assert card["guarantees"][0]["epsilon"] < 1 < gaussian_epsilon(5**0.5, 1e-5)  # unamplified
    assert_true(million / "run")


def test_no_file_but_the_private_one_tells_the_cohort(million: Path) -> None:
    run = million / "run"
    assert stat.S_IMODE((run / "private.jsonl").stat().st_mode) == 0o600
    public = [file for file in run.rglob("*") if file.is_file() and file.name not in ("private.jsonl", "setup.key")]
    assert not round_keys(run)
    for cohort in cohorts(run):
        ids = [str(gateway) for gateway in cohort if gateway > 10_000]
        for file in public:
            words = set(file.read_text(errors="ignore").replace("[", " ").replace("]", " ").replace(",", " ").split())
            assert not words.intersection(ids), file
    for entry in entries(run):
        assert (entry["event"], entry["gateways"]) == ("charge", [[0, 999_999]])
    for record in lines(run / "metrics.jsonl"):
        expected = 100 * 2 * 8 / record["seconds"]["total"]
        assert record["samples_per_s"] == pytest.approx(expected)


def test_who_took_part_changes_no_public_file_but_the_result(disk: Path) -> None:
    """Two runs with other cohorts have public files of the same form and size."""
    shapes = []
    for seed in (1, 2):
        train(disk / str(seed), gateways=50, participation=0.2, seed=seed)
        run = disk / str(seed)
        ledger = [{**entry, "inputs": 0, "previous": 0} for entry in lines(run / "ledger.jsonl")]
        shapes.append((ledger, [sorted(record) for record in lines(run / "metrics.jsonl")]))
    assert cohorts(disk / "1") != cohorts(disk / "2")
    assert shapes[0] == shapes[1]


def test_output_does_not_tell_the_cohort(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "gateways": 5000}.items()]
    assert main([*flags, "--participation", "0.01", "--out", str(disk / "run")]) == 0
    said = capsys.readouterr()
    timeless = re.sub(r"[\d,]+ samples/s|samples/s +[\d,]+|seconds [\d.]+", "", said.out + said.err)
    words = set(timeless.replace(",", "").split())
    for cohort in cohorts(disk / "run"):
        assert str(len(cohort)) not in words
        assert not {str(gateway) for gateway in cohort if gateway > 100} & words


def test_drops_of_a_secret_cohort_are_not_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedray.algorithms.aggregation import GroupResult
    from fedray.pool.inline_pool import InlinePool
    from tests.recovery.test_attempts import without_last

    collect = InlinePool.collect

    def late(self: InlinePool) -> list[GroupResult]:
        return [without_last(result) for result in collect(self)]

    monkeypatch.setattr(InlinePool, "collect", late)
    run = train(disk / "run", gateways=60, participation=0.5, on_failure="drop")
    assert [(entry["event"], entry["gateways"]) for entry in entries(run.path)] == [
        ("charge", [[0, 59]]),
        ("arrival", []),
    ] * 3
    assert "left_out" not in caplog.text
    # Who is dropped may depend on data: no amplification is claimed.
    assert run.privacy["guarantees"][0]["epsilon"] == pytest.approx(8.386, abs=0.01)
    assert_true(run.path)


def test_an_empty_cohort_releases_noise_and_is_charged(disk: Path) -> None:
    run = train(disk / "run", gateways=3, participation=1e-6, rounds=2)
    assert cohorts(run.path) == [[], []]
    assert run.privacy["steps"] == 4
    assert_true(run.path)


@pytest.mark.parametrize("level", ["sample", "none"])
def test_an_empty_public_cohort_changes_nothing_and_charges_nobody(level: str, disk: Path) -> None:
    run = train(disk / "run", gateways=3, participation=1e-6, rounds=2, noise_level=level)
    assert run.privacy["steps"] == 0
    assert run.history[0]["loss"] == run.history[1]["loss"]
    assert not (run.path / "private.jsonl").exists()
    assert_true(run.path)


def test_public_participation_charges_who_took_part(disk: Path) -> None:
    run = train(disk / "run", gateways=40, participation=0.3, noise_level="sample", rounds=4)
    ledger = lines(run.path / "ledger.jsonl")
    counts = np.zeros(40, int)
    for entry in ledger:
        for first, last in entry["gateways"]:
            counts[first : last + 1] += entry["steps"]
    assert run.privacy["steps"] == counts.max() < 8
    assert_true(run.path)


def test_participation_does_not_depend_on_where_gateways_run(disk: Path) -> None:
    results = []
    for name, per_actor in (("one", 40), ("many", 1)):
        train(disk / name, gateways=40, participation=0.3, gateways_per_actor=per_actor)
        results.append((cohorts(disk / name), outcome(disk / name)["model"]))
    assert results[0] == results[1]
    assert os.listdir(disk / "one" / "checkpoint")
