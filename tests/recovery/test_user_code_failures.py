"""User code that hangs, raises, leaves, makes NaN or asks for too much memory: how the run ends, with fail and with drop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.commands.cli import main
from fedray.pool.inline_pool import InlinePool
from fedray.pool.ray_pool import RayPool
from tests.recovery import faulty_parts
from tests.recovery.jobs import assert_true, entries, lines

GROUPS = [*("--gateways", "4", "--gateways-per-actor", "2", "--rounds", "3", "--local-steps", "2")]


@pytest.fixture(params=[pytest.param("ray", marks=pytest.mark.slow), "inline"])
def pool(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return str(request.param)


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with which faults begin: it appears when round 2 does."""
    path = tmp_path / "marker"
    monkeypatch.setenv(faulty_parts.MARKER, str(path))
    for kind in (InlinePool, RayPool):
        begin = kind.begin

        def marked(self: Any, keys: Any, *rest: Any, begin: Any = begin) -> None:
            if keys.round_index == 2:
                path.touch()
            begin(self, keys, *rest)

        monkeypatch.setattr(kind, "begin", marked)
    return path


def run(out: Path, data: str, pool: str, level: str, *more: str) -> int:
    parts = "tests.recovery.faulty_parts"
    arguments = ["--dataset", f"{parts}:{data}", "--model", f"{parts}:model", "--pool", pool, "--noise-level", level]
    return main([*arguments, *GROUPS, *faulty_parts.FLAGS, "--out", str(out), *more])


ENDS = {
    # data, level: words of the sentence with --on-failure fail; None: documented not to fail
    ("raises", "sample"): ["gateway 1 failed in round 2", "ValueError: the sensor broke"],
    ("leaves", "gateway"): ["gateway 1 failed in round 2", "SystemExit: 0"],
    ("devours", "none"): ["gateway 1 failed in round 2", "MemoryError", "allocate"],
    ("spoils", "sample"): ["gateway 1 failed in round 2", "record 0 is NaN", "clean the data"],
    ("diverges", "none"): ["gateway 1", "NaN or infinite", "in round 2", "--on-failure drop"],
    ("diverges", "sample"): None,  # its records' gradients count as zero
    ("diverges", "gateway"): None,  # its update counts as zero
}


@pytest.mark.parametrize(("data", "level"), ENDS)
def test_failing_gateway_ends_the_run_by_name(
    data: str,
    level: str,
    pool: str,
    outdir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ENDS[data, level]
    code = run(outdir, data, pool, level)
    said = capsys.readouterr().err
    if words is None:
        assert code == 0, said
        assert len(lines(outdir / "metrics.jsonl")) == 3
        return
    assert code == 1
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in error
    assert "python -m fedray --resume" in said.splitlines()[-1]
    assert len(lines(outdir / "metrics.jsonl")) == 1
    assert [entry["round"] for entry in entries(outdir)] == [1, 2]


@pytest.mark.parametrize(
    ("data", "level"), [("raises", "sample"), ("devours", "gateway"), ("spoils", "batch"), ("diverges", "none")]
)
def test_failing_gateway_is_left_out_charged_and_recorded(
    data: str,
    level: str,
    pool: str,
    outdir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(outdir, data, pool, level, "--on-failure", "drop") == 0
    assert [(entry["event"], entry["round"], entry["gateways"]) for entry in entries(outdir)] == [
        ("charge", 1, [[0, 3]]),
        ("charge", 2, [[0, 3]]),
        ("arrival", 2, [[0, 0], [2, 3]]),
        ("charge", 3, [[0, 3]]),
        ("arrival", 3, [[0, 0], [2, 3]]),
    ]
    assert 'event=left_out round=2 gateways=1-1 causes=["gateway 1' in caplog.text
    card = json.loads((outdir / "privacy.json").read_text())
    assert any("in round 2, 3" in line for line in card["not_covered"])
    assert_true(outdir)


def test_failing_gateway_in_an_actor_ends_the_run_by_name(
    local_ray: None, outdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_failing_gateway_ends_the_run_by_name("raises", "sample", "ray", outdir, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fail", "drop"])
def test_hanging_gateway_ends_with_its_time(
    what: str,
    local_ray: None,
    outdir: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each round waits for the hung actor once, kills it, and starts another one for the next round."""
    limit_s = 6.0
    began = time.monotonic()
    code = run(outdir, "hangs", "ray", "none", "--round-timeout", f"{limit_s}", "--on-failure", what)
    took = time.monotonic() - began
    rounds = 1 if what == "fail" else 2
    assert took < rounds * (limit_s + 10) + 20  # and the start
    said = capsys.readouterr().err
    if what == "fail":
        assert code == 1
        assert "error: gateways 0-1 did not finish round 2 within --round-timeout 6 s; raise it, or use" in said
        assert len(lines(outdir / "metrics.jsonl")) == 1
    else:
        assert code == 0
        arrivals = [entry for entry in lines(outdir / "ledger.jsonl") if entry["event"] == "arrival"]
        assert [(entry["round"], entry["gateways"]) for entry in arrivals] == [(2, [[2, 3]]), (3, [[2, 3]])]
    assert "event=timeout round=2 gateways=0-1 limit_s=6" in caplog.text
    hung = int(Path(f"{marker}.pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{hung}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nobody_arrives_and_the_run_says_so(outdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(outdir, "diverges_everywhere", "inline", "none", "--on-failure", "drop") == 1
    assert "error: no gateway arrived in round 2, so there is nothing to average." in capsys.readouterr().err


def test_update_beyond_max_update_norm_is_refused_and_attributed(
    pool: str, outdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--optimizer", "sgd", "--max-update-norm", "5", "--lr", "0.5"]  # gateway 1's records are large
    assert run(outdir, "sound", pool, "none", *more) == 1
    said = capsys.readouterr().err
    assert "error: gateway 1 has an update of norm" in said
    assert "in round 1, past --max-update-norm 5" in said
