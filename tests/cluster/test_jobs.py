"""`ray job submit` on a real one-node cluster: exit codes, readable logs, stopping and resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import fedray
from tests.zygote import python

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
JOB = [
    *("--dataset", "mine:data", "--model", "mine:make", "--gateways", "4", "--gateways-per-actor", "2", "--seed", "5"),
    # With so little memory, a shard is kept alone and gateways are trained one after the other: each round loads shards.
    *("--local-steps", "2", "--batch-size", "3000", "--samples-per-gateway", "4000", "--memory-limit", "1"),
]
MINE = """
import pathlib, time
import numpy as np
from torch import nn

class Layer(nn.Module):  # runs in the driver, which scores each round
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
    def forward(self, x):
        if pathlib.Path("{slow}").exists():
            time.sleep(0.1)
        return self.layer(x)

def make():
    return Layer()

class Shards:
    def __init__(self, gateways):
        self.gateways = gateways
    def __len__(self):
        return self.gateways
    def __getitem__(self, index):
        if pathlib.Path("{broken}").exists():
            raise ValueError("the sensor broke")
        return records(4000, index)

def records(number, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, 16)).astype(np.float32), rng.integers(0, 4, number)

def data(gateways):
    return Shards(gateways), records(64, 999)
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A running one-node cluster: the URL of its dashboard, which takes jobs."""

    url: str

    def job(self, *arguments: str, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `ray job`, as docs/cluster.md does."""
        verb, *rest = arguments
        return subprocess.run(
            [RAY, "job", verb, "--address", self.url, *rest],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def submit(self, name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Submit `python -m fedray` and wait until it ends."""
        options = ["--submission-id", name, "--working-dir", "."]
        return self.job("submit", *options, "--", "python", "-m", "fedray", *arguments, cwd=cwd)

    def ask(self, path: str) -> dict[str, Any]:
        """Ask the dashboard about a job, as `ray job status` and `ray job logs` do, which take seconds to start."""
        request = urllib.request.Request(f"{self.url}/api/jobs/{path}")
        request.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def logs(self, name: str) -> str:
        """Return what a job has printed."""
        return str(self.ask(f"{name}/logs")["logs"])

    def wait(self, name: str, status: str) -> None:
        """Wait until a job has come to this end."""
        _wait(lambda: bool(self.ask(name)["status"] == status), f"job {name} is {status}", 180)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head --block` with token authentication on ports of its own."""
    place = tempfile.mkdtemp(prefix="fj", dir="/tmp")
    dashboard = _free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [
            *(*python("ray.scripts.scripts"), "start", "--head", "--block", "--temp-dir", place),
            *("--num-cpus", "2", "--num-gpus", "1"),
            *("--port", str(_free_port()), "--dashboard-port", str(dashboard)),
            *("--dashboard-agent-listen-port", str(_free_port()), "--ray-client-server-port", str(_free_port())),
            *("--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "150000000"),
        ],
        env={**os.environ, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        found = Head(url)
        _wait(lambda: _answers(found), "the dashboard answers", 90)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(place, ignore_errors=True)


def _answers(head: Head) -> bool:
    try:
        head.ask("")
    except OSError:
        return False
    return True


def _wait(holds: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        time.sleep(0.2)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A user's working directory, with a model that can be made slow while it is scored, and data that can break."""
    return _work(tmp_path)


def _work(place: Path) -> Path:
    folder = place / "work"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE.format(slow=place / "slow", broken=place / "broken"))
    return folder


@pytest.fixture(scope="module")
def well(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of job "well", which has ended well; its run directory is beside it."""
    work = _work(tmp_path_factory.mktemp("well"))
    options = ["--device", "cpu", "--rounds", "2", "--out", str(work.parent / "run")]
    done = head.submit("well", *JOB, *options, cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_head_refuses_who_has_no_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=5)
    refused.value.close()
    assert refused.value.code == 401


def test_job_that_ends_well_exits_with_0_and_logs_what_a_terminal_shows(head: Head, well: Path) -> None:
    out = well.parent / "run"
    assert (out / "model.safetensors").exists()
    printed = head.job("logs", "well", cwd=well).stdout
    log = "".join(line for line in printed.splitlines(keepends=True) if " cli.py:" not in line)  # the command's own
    assert "\x1b" not in log
    for words in ("4 gateways, 2 rounds × 2 local steps", "round 2/2  accuracy", "epsilon ", f"files: {out}"):
        assert words in log
    own = [line for line in log.splitlines() if re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING|ERROR) ", line)]
    assert len(own) <= 2, own  # Ray's own lines do not drown ours


def test_job_equals_the_same_command_in_one_process(well: Path, tmp_path: Path) -> None:
    argv = [*JOB, "--rounds", "2", "--pool", "inline", "--out", str(tmp_path / "inline")]
    assert fedray(*argv, cwd=well).code == 0
    job, inline = ((place / "model.safetensors").read_bytes() for place in (well.parent / "run", tmp_path / "inline"))
    assert job == inline


def test_job_with_bad_input_exits_with_1_and_one_line(head: Head, work: Path) -> None:
    """`ray job submit` turns every failure into exit code 1; the sentence is in the log."""
    done = head.submit("bad", "--gateways", "0", cwd=work)
    assert done.returncode == 1
    log = head.logs("bad")
    assert "error: --gateways is 0; it must be a whole number of at least 1 and at most 10,000,000." in log
    assert "Traceback" not in log


def test_job_whose_data_fail_exits_with_1_and_the_users_traceback(head: Head, work: Path) -> None:
    argv = [*JOB, "--device", "cpu", "--rounds", "400", "--out", str(work.parent / "run")]
    (work.parent / "slow").touch()
    submitted = head.job(
        *("submit", "--submission-id", "broken", "--working-dir", ".", "--no-wait"),
        *("--", "python", "-m", "fedray", *argv),
        cwd=work,
    )
    assert submitted.returncode == 0, submitted.stderr
    _wait(lambda: _lines(work.parent / "run" / "metrics.jsonl") > 0, "round 1 is done", 120)
    (work.parent / "broken").touch()
    head.wait("broken", "FAILED")
    log = head.logs("broken")
    assert log.count('raise ValueError("the sensor broke")') == 1
    assert re.search(r"error: gateway .* failed in round \d+: shard of .*\(ValueError: the sensor broke\)", log)


def test_stopped_job_can_be_resumed_to_the_same_result(head: Head, work: Path) -> None:
    out, argv = work.parent / "run", [*JOB, "--rounds", "60"]
    (work.parent / "slow").touch()
    submitted = head.job(
        *("submit", "--submission-id", "stopped", "--working-dir", ".", "--no-wait"),
        *("--", "python", "-m", "fedray", *argv, "--device", "cpu", "--out", str(out)),
        cwd=work,
    )
    assert submitted.returncode == 0, submitted.stderr
    _wait(lambda: _lines(out / "metrics.jsonl") > 1, "round 2 is done", 120)
    head.job("stop", "stopped", cwd=work)
    head.wait("stopped", "STOPPED")
    done_before = _lines(out / "metrics.jsonl")
    assert 1 < done_before < 60
    assert f"--resume {out}" in head.logs("stopped")
    (work.parent / "slow").unlink()
    resumed = head.submit("resumed", "--resume", str(out), cwd=work)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 61))
    assert fedray(*argv, "--pool", "inline", "--out", str(work.parent / "inline"), cwd=work).code == 0
    ended, whole = ((folder / "model.safetensors").read_bytes() for folder in (out, work.parent / "inline"))
    assert ended == whole


def test_drivers_share_of_the_gpu_is_left_to_it(head: Head, work: Path) -> None:
    done = head.job(
        *("submit", "--submission-id", "share", "--working-dir", ".", "--entrypoint-num-gpus", "0.1"),
        *("--entrypoint-num-cpus", "0.4", "--", "python", "-m", "fedray", "--dry-run", "--gateways", "16"),
        cwd=work,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = head.logs("share")
    assert "16 actors × 1 gateway, 0.1 CPU, 0.0562 GPU each" in log
    assert "0.9 of 1 GPU, 1.6 of 2 CPU" in log
