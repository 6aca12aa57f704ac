"""--dry-run on a cluster: what it checks on each node, and whom it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import Nodes, cluster, fedray

pytestmark = pytest.mark.slow

MODULE = "from torch import nn\n\ndef make():\n    return nn.Linear(16, 4)\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that stands for an image with the user's module."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "mine.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that stands for an image with an older state of the user's module."""
    folder = tmp_path_factory.mktemp("older")
    (folder / "mine.py").write_text("# old\n" + MODULE)
    return folder


@pytest.fixture(scope="module")
def uneven(library: Path, older: Path) -> Iterator[Nodes]:
    """Three nodes: the head has the user's module, the second lacks it, the third has an older one."""
    with cluster(
        {"num_cpus": 1, "env": {"PYTHONPATH": str(library)}},
        {"num_cpus": 1},
        {"num_cpus": 1, "env": {"PYTHONPATH": str(older)}},
    ) as nodes:
        yield nodes


def test_dry_run_names_the_nodes_without_the_users_module(uneven: Nodes, library: Path, tmp_path: Path) -> None:
    argv = ["--dry-run", "--model", "mine:make", "--ray-address", uneven.address]
    done = fedray(*argv, cwd=tmp_path, env={"PYTHONPATH": str(library)})
    assert done.code == 2, done.out
    assert done.err.count("\n") == 1
    assert re.search(rf"node \S+ \({uneven.ids[1][:8]}\) cannot import mine \(ModuleNotFoundError", done.err)
    assert re.search(rf"node \S+ \({uneven.ids[2][:8]}\) has another mine than the driver", done.err)
    assert uneven.ids[0][:8] not in done.err
    assert "--working-dir" in done.err
    assert not list(tmp_path.iterdir())


def test_dry_run_says_what_every_node_has(uneven: Nodes, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(MODULE)  # the driver's directory is importable everywhere on one machine
    out = tmp_path / "runs" / "one"
    argv = ["--dry-run", "--model", "other:make", "--gateways", "3", "--out", str(out)]
    done = fedray(*argv, "--ray-address", uneven.address, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "3 actors × 1 gateway, 1 CPU each" in done.out
    assert re.search(r"versions: Python 3\.\S+, ray 2\.\S+, torch 2\.\S+, fedray \S+ on all nodes", done.out)
    assert "modules: other: the same on all nodes" in done.out
    assert f"files: {tmp_path}: writable on 3 of 3 nodes" in done.out
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["other.py"]


def test_dry_run_refuses_a_run_directory_that_cannot_be_made(uneven: Nodes, tmp_path: Path) -> None:
    done = fedray("--dry-run", "--out", "/proc/run", "--ray-address", uneven.address, cwd=tmp_path)
    assert done.code == 2
    assert "--out" in done.err
    assert "cannot be created" in done.err


def test_cluster_with_another_token_is_refused_with_a_sentence(uneven: Nodes, tmp_path: Path) -> None:
    done = fedray("--dry-run", "--ray-address", uneven.address, cwd=tmp_path, env={"RAY_AUTH_TOKEN": "wrong" * 8})
    assert done.code == 2, done.err
    assert "RAY_AUTH_TOKEN" in done.err.splitlines()[-1]
