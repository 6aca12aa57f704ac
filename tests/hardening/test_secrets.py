"""Keys stay where they belong: not in logs, reports, errors, pickles, process lists or files that others read."""

from __future__ import annotations

import base64
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedray import RunConfig
from fedray.commands.cli import main
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.privacy.streams import RoundKeys, first_round_key, new_root_key, next_round_key, setup_key
from fedray.rundir.checkpoint import Checkpoint

SEED, ROUNDS = 5, 3
JOB = [
    *(
        "--pool",
        "inline",
        "--gateways",
        "3",
        "--rounds",
        str(ROUNDS),
        "--local-steps",
        "2",
        "--samples-per-gateway",
        "64",
    ),
    *("--batch-size", "8", "--seed", str(SEED), "--noise-level", "gateway", "--participation", "0.9"),
]


def _spellings(key: bytes) -> Iterator[bytes]:
    yield from (key, key.hex().encode(), key.hex().upper().encode(), base64.b64encode(key), repr(key)[2:-1].encode())


def _round_keys() -> list[bytes]:
    keys = [first_round_key(new_root_key(SEED))]
    for _ in range(ROUNDS + 1):
        keys.append(next_round_key(keys[-1]))
    return keys


def _holds(data: bytes, keys: list[bytes]) -> bool:
    return any(spelling in data for key in keys for spelling in _spellings(key))


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, bytes]:
    """A finished run and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "fedray", *JOB, "--out", "run"], cwd=tmp_path, capture_output=True, check=True
    )
    assert main(["report", str(tmp_path / "run")]) == 0
    return tmp_path / "run", done.stdout + done.stderr


def test_a_finished_run_holds_no_round_key_and_its_setup_key_in_one_file(run: tuple[Path, bytes]) -> None:
    folder, printed = run
    secret = [new_root_key(SEED), *_round_keys()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path.name for path in files if _holds(path.read_bytes(), secret)] == []
    setup = [setup_key(new_root_key(SEED))]
    assert [path.name for path in files if _holds(path.read_bytes(), setup)] == ["setup.key"]
    assert not _holds(printed, [*secret, *setup])


def _plan() -> Plan:
    return prepare(RunConfig().resolve(pool="inline", gateways=2, seed=SEED), UserParts())


def test_keys_are_not_in_what_an_error_or_a_log_would_show() -> None:
    plan, keys = _plan(), _round_keys()
    shown = [
        repr(plan), repr(RoundKeys(round_key=keys[1], round_index=1)),
        repr(Checkpoint(round=1, params=plan.layout.flatten(plan.model), round_key=keys[1], card={})),
    ]  # fmt: skip
    assert not _holds("".join(shown).encode(), [*keys, plan.setup_key])


def test_actors_are_not_sent_keys_of_the_run() -> None:
    """Each round sends its own; what they get once holds none."""
    plan = _plan()
    assert not _holds(pickle.dumps(plan.setup), [*_round_keys(), plan.setup_key, new_root_key(SEED)])


def test_whoever_holds_keys_leaves_no_core_dump(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from fedray.commands.cli import main\n"
        f"code = main({[*JOB, '--quiet', '--out', 'run']!r})\n"
        "sys.exit(code or resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no core dumps are allowed here")
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -S -c 1000 2>/dev/null; exec "$@"', "sh", sys.executable, "-c", code],
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0
