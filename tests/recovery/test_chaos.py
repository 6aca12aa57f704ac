"""Actors and drivers of real Ray runs are killed at random: the result is that of the undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.errors import RunFailedError
from tests.recovery.assassin import JOB, Clock, actor_pids, attack, train
from tests.recovery.jobs import assert_true, entries, lines, outcome
from tests.zygote import launcher, python


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path, clock = tmp_path_factory.mktemp("chaos") / "whole", Clock()
    train(path, [clock])
    return {"outcome": outcome(path), "seconds": clock.seconds}


def survive(disk: Path, runs: int, first_seed: int, undisturbed: dict[str, Any]) -> None:
    """Attack until so many runs have lost an actor, each; all of them, and those that were missed, end as undisturbed."""
    hit = 0
    for seed in range(first_seed, first_seed + 2 * runs + 3):
        path = disk / f"run-{seed}"
        hit += bool(attack(path, seed, undisturbed["seconds"]).lost_in_rounds)
        assert outcome(path) == undisturbed["outcome"]
        if hit == runs:
            assert_true(path)
            return
    pytest.fail(f"only {hit} runs lost an actor")


def test_run_ends_as_undisturbed_when_an_actor_is_killed(undisturbed: dict[str, Any], disk: Path) -> None:
    survive(disk, 1, 0, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", [100, 200, 300, 400])
def test_five_of_twenty_runs_end_as_undisturbed_when_actors_are_killed(
    undisturbed: dict[str, Any], disk: Path, first_seed: int
) -> None:
    survive(disk, 5, first_seed, undisturbed)


def test_ray_and_inline_pools_end_alike_with_equal_groups(undisturbed: dict[str, Any], disk: Path) -> None:
    train(disk / "inline", pool="inline")
    assert outcome(disk / "inline")["model"] == undisturbed["outcome"]["model"]


def test_lost_actor_ends_the_run_without_retries(
    local_ray: None, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kill_in_round(monkeypatch, 3)
    with pytest.raises(
        RunFailedError, match=r"actor of gateways \d-\d was lost in round 3 .*--max-failures 0 is used"
    ) as told:
        train(disk / "run", max_failures=0)
    assert f"Go on with: python -m fedray --resume {disk / 'run'}" in told.value.__notes__
    assert len(lines(disk / "run" / "metrics.jsonl")) == 2
    assert "event=actor_lost round=3 gateways=" in caplog.text


def test_answer_that_does_not_come_ends_the_run_in_time(
    local_ray: None, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is ready on another machine, and is not here when the round must end."""
    import ray

    def never(refs: Any, *, timeout: float | None = None) -> Any:
        if timeout is None:
            return get(refs)
        raise ray.exceptions.GetTimeoutError("still under way")

    get = ray.get
    monkeypatch.setattr(ray, "get", never)
    with pytest.raises(RunFailedError, match=r"gateways \d-\d.* did not finish round 1 within --round-timeout"):
        train(disk / "run")


@pytest.mark.slow
def test_lost_actor_is_dropped_and_comes_back_in_the_next_round(
    local_ray: None, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_in_round(monkeypatch, 2)
    run = train(disk / "run", rounds=4, max_failures=0, on_failure="drop")
    arrivals = [entry for entry in lines(run.path / "ledger.jsonl") if entry["event"] == "arrival"]
    assert [entry["round"] for entry in arrivals] == [2]
    assert arrivals[0]["gateways"] in ([[0, 1]], [[2, 3]])
    assert_true(run.path)


def kill_in_round(monkeypatch: pytest.MonkeyPatch, round_index: int) -> None:
    """Kill one actor right after a round has been sent to it."""
    from fedray.pool.ray_pool import RayPool

    begin = RayPool.begin

    def deadly(self: RayPool, keys: Any, *rest: Any) -> None:
        if keys.round_index == round_index:
            os.kill(actor_pids()[0], signal.SIGKILL)
        begin(self, keys, *rest)

    monkeypatch.setattr(RayPool, "begin", deadly)


@pytest.mark.slow
def test_resume_ends_as_undisturbed_when_a_driver_on_ray_is_killed(undisturbed: dict[str, Any], disk: Path) -> None:
    """Whole processes with a Ray of their own, which must not outlive them."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in JOB.items()]
    rng = random.Random(3)
    for number in range(2):
        run = disk / f"run-{number}"
        command = [*python("fedray"), *flags, "--out", str(run)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        driver = subprocess.Popen(command, cwd=disk, env=environment, stdout=subprocess.DEVNULL)
        while not (run / "metrics.jsonl").exists() or len(lines_so_far(run)) < 1 + number:
            assert driver.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        driver.kill()
        driver.wait()
        fedray.Orchestrator(config=fedray.RunConfig().resolve(resume=run)).run()
        assert outcome(run)["model"] == undisturbed["outcome"]["model"]
        assert outcome(run)["ledger"] == undisturbed["outcome"]["ledger"]
        assert outcome(run)["metrics"] == undisturbed["outcome"]["metrics"]


def lines_so_far(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines()


def _node_loss(place: Path, launcher: str, report: Any) -> None:
    """Lose a node in the middle of a round; let another one join only after the loss was seen."""
    import ray
    from ray.cluster_utils import Cluster

    from fedray.pool import ray_pool

    sys.executable = launcher
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 10**8,
            "include_dashboard": False,
            "temp_dir": str(place),
        },
    )
    doomed = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    begin, restart = ray_pool.RayPool.begin, ray_pool.RayPool._restart
    seen: dict[str, Any] = {"lost": [], "joined": None}

    def lose(self: Any, keys: Any, *rest: Any) -> None:
        begin(self, keys, *rest)
        if keys.round_index == 3:
            cluster.remove_node(doomed, allow_graceful=False)

    def seen_restart(self: Any, index: int, error: Any, round_index: int, deadline: float) -> str:
        seen["lost"].append((round_index, type(error).__name__))
        # No slot is left but on a node that joins now.
        seen["joined"] = cluster.add_node(num_cpus=1, object_store_memory=10**8).node_id
        kind = restart(self, index, error, round_index, deadline)
        seen["used"] = [
            state["node_id"] if isinstance(state, dict) else state.node_id for state in [where(self, index)]
        ]
        return kind

    def where(pool: Any, index: int) -> Any:
        actor = pool._actors.by_group[index]
        node_id = ray.get(actor.__ray_call__.remote(lambda _self: ray.get_runtime_context().get_node_id()))
        return {"node_id": node_id}

    ray_pool.RayPool.begin = lose  # type: ignore[method-assign]
    ray_pool.RayPool._restart = seen_restart  # type: ignore[method-assign]
    run = train(place / "run", rounds=6, local_steps=400, round_timeout=120)
    report.send({**seen, "rounds": len(run.history)})
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_run_goes_on_when_a_node_is_lost_and_uses_one_that_joins_later(tmp_path: Path) -> None:
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="fc", dir="/tmp"))  # Ray's socket paths must be short
    here, there = multiprocessing.Pipe()
    try:
        child = multiprocessing.get_context("spawn").Process(target=_node_loss, args=(place, launcher(), there))
        child.start()
        there.close()
        child.join(240)
        assert child.exitcode == 0
        told = here.recv()
        assert [round_index for round_index, _ in told["lost"]] == [3]
        assert told["used"] == [told["joined"]]
        assert told["rounds"] == 6
        train(tmp_path / "whole", rounds=6, local_steps=400, pool="inline")
        assert outcome(place / "run")["model"] == outcome(tmp_path / "whole")["model"]
        # But for the inputs' digests: an actor has another share of the memory than a process of its own.
        charged = [
            [{**entry, "inputs": 0, "previous": 0} for entry in entries(run)]
            for run in (place / "run", tmp_path / "whole")
        ]
        assert charged[0] == charged[1]
    finally:
        if child.is_alive():
            child.kill()
        shutil.rmtree(place, ignore_errors=True)
