"""Gateways on several nodes: where they run, the same results everywhere, and errors instead of waiting for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import Nodes, cluster, fedray, notes, spy

pytestmark = pytest.mark.slow

JOB = [
    *("--dataset", "spy:data", "--seed", "5", "--gateways", "8", "--gateways-per-actor", "2", "--rounds", "2"),
    *("--local-steps", "3", "--batch-size", "8", "--samples-per-gateway", "64", "--device", "cpu"),
]
HEAD = {"num_cpus": 0}
ONE_GPU = {"num_cpus": 0.0, "num_gpus": 1.0}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Final model of the job in one process of one machine."""
    folder = tmp_path_factory.mktemp("single")
    spy(folder)
    done = fedray(*JOB, "--pool", "inline", "--out", "run", cwd=folder)
    assert done.code == 0, done.err
    return (folder / "run" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Nodes]:
    """A head without cores and two nodes with two cores and a logical GPU each."""
    with cluster(HEAD, {"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 2, "num_gpus": 1}) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[Nodes]:
    """A node with two cores and two logical GPUs."""
    with cluster({"num_cpus": 2, "num_gpus": 2}) as nodes:
        yield nodes


def test_two_nodes_end_at_the_single_machines_parameters(tmp_path: Path, single: bytes) -> None:
    seen = spy(tmp_path)
    with cluster({"num_cpus": 2}, {"num_cpus": 2}) as nodes:
        done = fedray(*JOB, "--ray-address", nodes.address, "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert Counter(node for node, _ in notes(seen)) == {nodes.ids[0]: 2, nodes.ids[1]: 2}
    assert "on 2 nodes" in done.out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == single


def test_three_nodes_end_at_the_single_machines_parameters(tmp_path: Path, single: bytes, three_nodes: Nodes) -> None:
    seen = spy(tmp_path)
    done = fedray(*JOB, "--ray-address", three_nodes.address, "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert Counter(node for node, _ in notes(seen)) == {three_nodes.ids[1]: 2, three_nodes.ids[2]: 2}  # head: none
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == single


def test_nodes_gpus_are_shared_in_equal_fractions(tmp_path: Path, single: bytes, three_nodes: Nodes) -> None:
    seen = spy(tmp_path)
    argv = [*JOB, "--device", "auto"]  # the last --device counts
    done = fedray(*argv, "--ray-address", three_nodes.address, "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    found = notes(seen)
    assert Counter(node for node, _ in found) == {three_nodes.ids[1]: 2, three_nodes.ids[2]: 2}
    assert {resources["GPU"] for _, resources in found} == {0.5}
    assert {resources["CPU"] for _, resources in found} == {1.0}
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == single


def test_sixteen_gateways_share_one_gpu(tmp_path: Path, two_gpus: Nodes) -> None:
    """And sixteen actors end as one process does, byte for byte."""
    seen = spy(tmp_path)
    argv = [*JOB, "--noise-level", "sample", "--gateways", "16", "--gateways-per-actor", "auto", "--device", "auto"]
    with two_gpus.holding(ONE_GPU):
        done = fedray(*argv, "--ray-address", two_gpus.address, "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [resources["GPU"] for _, resources in notes(seen)] == [0.0625] * 16
    alone = ["--gateways-per-actor", "1", "--device", "cpu", "--pool", "inline", "--out", "alone"]
    assert fedray(*argv, *alone, cwd=tmp_path).code == 0
    ended, inline = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "alone"))
    assert ended == inline


def test_gpus_in_pieces_fail_fast_with_needs_against_haves(tmp_path: Path, two_gpus: Nodes) -> None:
    """What 0.4 GPU each would be: two GPUs of which others hold 0.6 each, so 0.8 are free, but not on one GPU."""
    argv = ["--gateways", "5", "--placement-timeout", "3", "--out", "run"]
    held = {"num_cpus": 0, "num_gpus": 0.6}
    with two_gpus.holding(held, held):
        done = fedray(*argv, "--ray-address", two_gpus.address, cwd=tmp_path)
    assert done.code == 2
    assert done.seconds < 60  # mostly starting Python; Ray itself would wait for ever
    assert done.err.count("\n") == 1
    assert "5 actors need 1 × 0.8 of one GPU with 2 CPU beside it" in done.err
    assert "0.8 of 2 GPU, 2 of 2 CPU" in done.err
    assert "--placement-timeout 3 s" in done.err
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_all_held_fail_at_once(tmp_path: Path, two_gpus: Nodes) -> None:
    argv = ["--gateways", "5", "--placement-timeout", "300"]
    with two_gpus.holding(ONE_GPU, ONE_GPU):
        done = fedray(*argv, "--ray-address", two_gpus.address, cwd=tmp_path)
    assert done.code == 2
    assert done.seconds < 60
    assert "the cluster has no GPU for gateways" in done.err
    assert "0 of 2 GPU, 2 of 2 CPU" in done.err


def test_what_somebody_else_holds_is_left_to_him(tmp_path: Path, two_gpus: Nodes) -> None:
    """The driver of a job with an entrypoint resource, for one, holds a share of a GPU and a core."""
    seen = spy(tmp_path)
    argv = [*JOB, "--gateways-per-actor", "auto", "--device", "auto", "--gateways", "3", "--out", "run"]
    with two_gpus.holding(ONE_GPU, {"num_cpus": 0.5, "num_gpus": 0.1}):
        done = fedray(*argv, "--ray-address", two_gpus.address, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [(resources["GPU"], resources["CPU"]) for _, resources in notes(seen)] == [(0.3, 0.5)] * 3
