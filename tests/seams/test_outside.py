"""Nine seams, nine implementations of an installed package that fedray does not know."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedray import Orchestrator, Run, RunConfig
from fedray.algorithms.fedavg import FedAvg
from fedray.commands.cli import main
from fedray.config.seams import SEAMS, find
from fedray.config.settings import GROUP_OF, GROUPS, SETTINGS
from fedray.errors import InputError, RunInterruptedError, UserCodeError
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.privacy import accounting
from fedray.privacy.streams import RoundKeys, next_round_key
from fedray.reports.callback import Callback, RoundDone

OUTSIDE = Path(__file__).parent / "outside"
SMALL: dict[str, Any] = {
    "pool": "inline", "device": "cpu", "gateways": 3, "rounds": 3, "local_steps": 4, "batch_size": 16,
    "samples_per_gateway": 128, "seed": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(OUTSIDE))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def _run(out: Path, callbacks: Sequence[Callback] = (), **settings: Any) -> Run:
    own = {name: value for name, value in SMALL.items() if "dataset" not in settings or name != "samples_per_gateway"}
    return Orchestrator(config=RunConfig().resolve(**{**own, "out": out, **settings}), callbacks=callbacks).run()


def _plan(**settings: Any) -> Plan:
    return prepare(RunConfig().resolve(**{**SMALL, **settings}), UserParts())


def _keys(plan: Plan) -> RoundKeys:
    return RoundKeys(round_key=next_round_key(plan.first_round_key), round_index=1)


def _uploads(plan: Plan) -> npt.NDArray[np.float32]:
    """Return what gateways upload in the first round `[G, W]`."""
    pool = plan.new_pool()
    pool.start()
    pool.begin(_keys(plan), plan.layout.flatten(plan.model), range(plan.config.federation.gateways))
    (result,) = pool.collect()
    pool.close()
    assert result.updates is not None
    return result.updates


def _final(run: Run) -> npt.NDArray[np.float64]:
    return np.concatenate([p.detach().numpy().ravel() for p in run.model.parameters()]).astype(np.float64)


@pytest.mark.parametrize("path", sorted(OUTSIDE.glob("*.py")), ids=lambda path: path.stem)
def test_outside_implementations_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30


def test_outside_fills_every_seam() -> None:
    assert {path.stem.removeprefix("outside_") for path in OUTSIDE.glob("*.py")} == set(SEAMS)


@pytest.mark.parametrize("level", ["none", "sample", "gateway"])
def test_outside_task_brings_loss_and_metric(level: str, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", task="rating", rounds=6, noise_level=level, lr=0.05)
    errors = [record["metrics"]["error"] for record in run.history]
    assert errors[-1] < 0.9 * errors[0] or level == "gateway"
    assert run.history[-1]["accuracy"] is None
    assert run.model[-1].out_features == 1  # type: ignore[union-attr,index]  # the reference MLP


@pytest.mark.parametrize("level", ["none", "sample", "batch", "gateway"])
def test_outside_algorithm_is_the_same_in_both_trainers(level: str) -> None:
    """And it is asked: gateways that are pulled back strongly end nearer to where they began."""
    found = {
        (engine, name): _uploads(_plan(algorithm=name, engine=engine, noise_level=level, optimizer="sgd", lr=0.1))
        for engine in ("stacked", "opacus")
        for name in ("fedavg", "pull:5")
    }
    fast, reference = found["stacked", "pull:5"], found["opacus", "pull:5"]
    assert np.linalg.norm(fast - reference) <= 1e-5 * np.linalg.norm(reference)
    far, near = (np.linalg.norm(found["stacked", name]) for name in ("fedavg", "pull:5"))
    assert near < 0.9 * far or level == "gateway"  # clipped to C, both of them


class _Greedy(FedAvg):
    """Remembers what it saw, and mixes gateways where it can."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def local_gradient(self, gradient: torch.Tensor, params: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        self.seen.append(gradient)
        sent += gradient[0]
        return gradient.mean(0, keepdim=True) + sum(self.seen[:-1], torch.zeros(1, 1))


def test_outside_algorithm_sees_one_gateway_alone() -> None:
    """At the `gateway` level another gateway's gradients in its update would break the claim."""
    plan = _plan(noise_level="gateway", gateways=4)
    training = replace(plan.training, algorithm=_Greedy())
    greedy = replace(plan, training=training, setup=replace(plan.setup, training=training))
    together = _uploads(greedy)
    again = _uploads(greedy)
    assert np.array_equal(together, again)  # nothing is remembered from one round to the next
    fewer = replace(greedy, config=greedy.config.resolve(gateways=1))
    assert np.allclose(_uploads(fewer)[0], together[0], rtol=0, atol=1e-6)


class _Two(FedAvg):
    uploads = ("update", "square")

    def after_local(self, params: torch.Tensor, sent: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"update": params - sent, "square": 100 * (params - sent) ** 2}

    def server(self, params: Any, means: Any, optimizer: Any, state: Any) -> Any:
        return super().server(params, means, optimizer, {})[0], {"square": means["square"]}


def test_several_uploads_are_clipped_as_one_vector() -> None:
    plan = _plan(noise_level="gateway", clip_norm=0.5)
    training = replace(plan.training, algorithm=_Two())
    uploads = _uploads(replace(plan, training=training, setup=replace(plan.setup, training=training)))
    assert uploads.shape == (3, 2 * plan.layout.num_params)
    assert np.linalg.norm(uploads, axis=1) == pytest.approx(0.5, rel=1e-4)


def test_several_uploads_are_noised_and_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.py").write_text("from tests.seams.test_outside import _Two as Two\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = _run(tmp_path / "run", algorithm="two:Two", noise_level="gateway", noise_multiplier=3.0, clip_norm=2.0)
    newest = max((run.path / "checkpoint").glob("0*.safetensors"))
    from safetensors.numpy import load_file

    square = load_file(newest)["server.square"]
    assert np.std(square) == pytest.approx(3.0 * 2.0 / 3, rel=0.1)  # the noise of the sum over three gateways


def test_outside_aggregator_is_used(tmp_path: Path) -> None:
    plan = _plan(aggregator="median", noise_level="sample", rounds=1)
    expected = plan.layout.flatten(plan.model) + np.median(_uploads(plan).astype(np.float64), axis=0)
    run = _run(tmp_path / "run", aggregator="median", noise_level="sample", rounds=1)
    assert np.allclose(_final(run), expected, rtol=0, atol=1e-6)


def test_outside_aggregator_of_rows_is_refused_where_noise_is_for_a_sum() -> None:
    with pytest.raises(InputError, match="--aggregator is median with --noise-level gateway, whose noise and epsilon"):
        _plan(aggregator="median", noise_level="gateway")


class _Stops(Callback):
    def on_round(self, done: RoundDone) -> None:
        if done.record["round"] == 2:
            raise KeyboardInterrupt


def test_outside_server_optimizer_keeps_its_state_over_a_stop(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", server_optimizer="heavy-ball", rounds=5)
    plain = _run(tmp_path / "plain", rounds=5)
    assert not np.allclose(_final(whole), _final(plain))
    with pytest.raises(RunInterruptedError):
        _run(tmp_path / "cut", [_Stops()], server_optimizer="heavy-ball", rounds=5)
    resumed = Orchestrator(config=RunConfig().resolve(resume=tmp_path / "cut")).run()
    assert _final(resumed).tobytes() == _final(whole).tobytes()


def test_outside_server_optimizer_goes_on_in_an_extended_run(tmp_path: Path) -> None:
    whole = _run(tmp_path / "run", server_optimizer="heavy-ball", noise_level="none", rounds=2)
    velocity = copy.deepcopy(_final(whole))
    longer = Orchestrator(config=RunConfig().resolve(resume=tmp_path / "run", rounds=3)).run()
    assert not np.allclose(_final(longer), velocity)


def test_outside_clipping_lengthens_short_vectors_and_leaves_no_ball() -> None:
    fixed, automatic = (
        _uploads(_plan(noise_level="gateway", clip=clip, clip_norm=50.0)) for clip in ("fixed", "automatic")
    )
    assert np.linalg.norm(fixed, axis=1).max() < 20
    lengths = np.linalg.norm(automatic, axis=1)
    assert (lengths > 49).all()
    assert (lengths <= 50 * (1 + 1e-5)).all()


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_outside_clipping_is_the_same_in_both_trainers(level: str) -> None:
    fast, reference = (
        _uploads(_plan(clip="automatic", engine=engine, noise_level=level, optimizer="sgd"))
        for engine in ("stacked", "opacus")
    )
    assert np.linalg.norm(fast - reference) <= 1e-5 * np.linalg.norm(reference)
    assert not np.allclose(fast, _uploads(_plan(noise_level=level, optimizer="sgd")))


@pytest.mark.parametrize("level", ["sample", "gateway"])
def test_outside_noise_shape_adds_noise_and_is_charged_by_its_least(level: str, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", noise_shape="fading", noise_level=level)
    plain = _run(tmp_path / "plain", noise_level=level)
    assert run.privacy["guarantees"] == plain.privacy["guarantees"]
    assert not np.allclose(_final(run), _final(plain))
    assert main(["verify", str(run.path)]) == 0


def test_outside_noise_shape_of_more_noise_costs_less() -> None:
    class Twice:
        least = 2.0

        def scale(self, round_index: int, step: int) -> float:
            return float("nan")

    plan = _plan(noise_level="sample")
    spec = replace(plan.spec, noise_shape=Twice())
    doubled = replace(plan.spec, noise_multiplier=2.0)
    assert accounting.first_epsilon(spec, plan.charges) == accounting.first_epsilon(doubled, plan.charges)


def test_outside_source_and_partitioner_make_a_federation(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", dataset="stripes", partition="sorted", gateways=2, rounds=5, lr=0.05)
    assert run.history[-1]["accuracy"] > 0.8
    plan = prepare(RunConfig().resolve(pool="inline", gateways=2, dataset="stripes", partition="sorted"), UserParts())
    assert [set(plan.federation.shards[i][1].tolist()) for i in (0, 1)] in ([{0}, {0, 1}], [{0, 1}, {1}], [{0}, {1}])
    assert plan.federation.disjoint


def test_outside_callback_follows_and_stops(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", track="lines", rounds=30, samples_per_gateway=512, batch_size=64)
    written = (run.path / "lines.txt").read_text().splitlines()
    assert written == [f"{number} 676" for number in range(1, len(run.history) + 1)]
    assert run.stopped == "good enough"
    assert len(run.history) < 30
    assert run.history[-2]["accuracy"] > 0.8  # the round that was under way is finished, as it is charged


def test_outside_names_may_be_given_as_module_and_name(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", server_optimizer="heavy-ball")
    other = _run(tmp_path / "other", server_optimizer="outside_server_optimizer:HeavyBall")
    assert _final(one).tobytes() == _final(other).tobytes()


@pytest.mark.parametrize("seam", SEAMS)
def test_settings_name_what_fedray_has(seam: str) -> None:
    """In the words of errors and in --help: whoever adds a name must say it there."""
    setting = SEAMS[seam].setting
    group = GROUPS[GROUP_OF[setting]]
    source = Path(sys.modules[group.__module__].__file__ or "").read_text()
    documented = re.search(rf'^    {setting}: .*\n    """(.+)"""$', source, flags=re.MULTILINE)
    assert documented
    for name in SEAMS[seam].own:
        assert name in SETTINGS[setting].words
        assert name in documented[1]


@pytest.mark.parametrize("seam", SEAMS)
def test_find_names_what_packages_offer(seam: str) -> None:
    with pytest.raises(InputError, match=r"is 'nonsense'; it must be .* \(packages offer [a-z-]+\)"):
        find(seam, "nonsense")


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam not in ("source", "callback")])
def test_prepare_refuses_what_does_not_fill_the_seam(seam: str) -> None:
    setting = SEAMS[seam].setting
    with pytest.raises(
        InputError, match=rf"--{setting.replace('_', '-')} 'builtins:object' is object, no \w+; it has no "
    ):
        _plan(**{setting: "builtins:object"})


@pytest.mark.slow
def test_outside_implementations_run_together_on_ray(outdir: Path) -> None:
    """Actors find them as the driver does: in whatever is installed."""
    command = [sys.executable, "-m", "fedray", "--gateways", "2", "--rounds", "2", "--local-steps", "2", "--quiet"]
    command += ["--dataset", "stripes", "--partition", "sorted", "--task", "rating", "--algorithm", "pull:0.5"]
    command += [
        "--aggregator",
        "median",
        "--server-optimizer",
        "heavy-ball",
        "--clip",
        "automatic",
        "--noise-shape",
        "fading",
    ]
    command += ["--track", "lines", "--batch-size", "16", "--seed", "1", "--gateways-per-actor", "1"]
    found = []
    for pool in ("ray", "inline"):
        done = subprocess.run(
            [*command, "--pool", pool, "--out", str(outdir / pool)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(OUTSIDE), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append((outdir / pool / "model.safetensors").read_bytes())
        assert json.loads((outdir / pool / "config.json").read_text())["config"]["algorithm"] == "pull:0.5"
    assert found[0] == found[1]


class _Bad:
    def __init__(self, result: object) -> None:
        self._result = result

    def step(self, params: Any, update: Any, state: Any) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.mark.parametrize(
    "result",
    [
        ZeroDivisionError("no"),
        (np.zeros(3, np.float32), {}),
        (np.zeros(676), {}),
        (None, {}),
        (np.zeros(676, np.float32), {"state": np.array(["text"])}),
        3,
    ],
    ids=["raises", "shape", "type", "none", "text", "number"],
)
def test_a_server_optimizer_that_fails_ends_the_run_in_a_sentence(result: object, tmp_path: Path) -> None:
    orchestrator = Orchestrator(config=RunConfig().resolve(**SMALL, out=tmp_path / "run"))
    orchestrator.plan = replace(orchestrator.plan, server_optimizer=_Bad(result))
    with pytest.raises(UserCodeError, match="aggregating the uploads failed: "):
        orchestrator.run()
    resumed = Orchestrator(config=RunConfig().resolve(resume=tmp_path / "run")).run()
    assert len(resumed.history) == 3
