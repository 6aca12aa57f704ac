"""Ray that stops, dies or listens: the driver's own sentence comes last, in time; nobody else is listened to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
JOB = [
    *(sys.executable, "-m", "fedray", "--gateways", "2", "--rounds", "100000", "--local-steps", "256", "--seed", "1"),
    *("--round-timeout", "4", "--out", "run"),
]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run under way, with a Ray of its own."""
    process = subprocess.Popen(JOB, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def _descendants(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *_descendants(child)]
    return found


def _named(pid: int, word: str) -> int:
    """Return the descendant of a process whose program is called so."""
    for child in _descendants(pid):
        program = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0].decode()
        if Path(program).name == word:
            return child
    raise AssertionError(f"no {word} below {pid}")


@pytest.mark.parametrize(("word", "name"), [("raylet", "SIGSTOP"), ("raylet", "SIGKILL"), ("gcs_server", "SIGKILL")])
def test_a_ray_that_stops_or_dies_ends_the_run_with_the_remedy(
    word: str, name: str, run: subprocess.Popen[str], tmp_path: Path
) -> None:
    began = time.monotonic()
    os.kill(_named(run.pid, word), getattr(signal, name))
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert run.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: Ray")
    assert last.endswith(f"Go on with: python -m fedray --resume {tmp_path / 'run'}")
    done = subprocess.run(
        [sys.executable, "-m", "fedray", "--resume", "run", "--pool", "inline", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _listening(pids: set[int]) -> list[str]:
    """Return the addresses at which processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].rpartition(":")[0])
    return found


def test_a_local_ray_listens_on_loopback_alone(run: subprocess.Popen[str]) -> None:
    addresses = _listening({run.pid, *_descendants(run.pid)})
    assert addresses
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(addresses) <= loopback, f"someone listens elsewhere: {sorted(set(addresses) - loopback)}"


def test_the_session_of_a_local_ray_is_private_and_goes_with_it(run: subprocess.Popen[str], tmp_path: Path) -> None:
    (folder,) = Path(tempfile.gettempdir()).glob(f"fedray-ray-{run.pid}-*")
    assert folder.stat().st_mode & 0o777 == 0o700  # so that nobody else comes to what lies in it, sockets and all
    assert list(folder.rglob("plasma_store*"))
    run.kill()
    run.wait()
    time.sleep(1.0)
    small = [*JOB[:3], "--gateways", "1", "--rounds", "1", "--local-steps", "1", "--quiet", "--out", "other"]
    subprocess.run(small, cwd=tmp_path, check=True, capture_output=True)
    assert not folder.exists()
    assert not list(Path(tempfile.gettempdir()).glob("fedray-ray-*-*")) or os.environ.get("PYTEST_XDIST_WORKER")
