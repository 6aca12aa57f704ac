"""Proofs of the noise: its law (T1), and that nothing shares it (T2)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray import Orchestrator, RunConfig
from fedray.errors import GatewayError, RunInterruptedError
from fedray.privacy import mechanism, noise
from fedray.privacy.noise import LocalNoise
from fedray.reports.callback import Callback, RoundDone
from fedray.rundir.directory import RunDirectory
from tests.privacy import checks
from tests.privacy.proofs.releases import releases_are_as_declared
from tests.privacy.worlds import (
    NUM_FEATURES,
    data_free_run,
    fresh,
    keys_of,
    model_of,
    observe,
    product_loss,
    random_shard,
    spec_of,
    training_of,
    wide_model,
)

COORDINATES = 120_000


# --- T1: noise law ---------------------------------------------------------------------------------------------------


def local_noise_law(engine: str, level: str) -> None:
    """T1, local noise seen through the trainer's observer: 120 000 coordinates of released − clipped are N(0, sigma·C)."""
    spec = spec_of(level, local_steps=20)
    model = wide_model(COORDINATES // 20)
    shard = random_shard(16, num_outputs=COORDINATES // 20 // (NUM_FEATURES + 1))
    observed = observe(engine, model, training_of(spec), {3: shard}, keys_of(1))
    releases_are_as_declared(observed, spec)
    added = observed.noise()
    assert added.size == COORDINATES
    checks.check_noise_law(added, spec.noise_std)


def aggregate_noise_law() -> None:
    """T1, noise of the aggregate: (released · expected cohort − sum) is N(0, sigma·C), once for the whole sum."""
    spec = spec_of("gateway")
    total = np.random.default_rng(0).normal(size=COORDINATES)
    released = mechanism.aggregate(spec, keys_of(1), total, 4.0, ((0, 3),))
    checks.check_noise_law(released * spec.expected_cohort - total, spec.noise_std)


def run_noise_law(engine: str, level: str, out: Path) -> None:
    """T1, noise of a whole run without data in the way: what the parameters moved by is noise of the claimed size.

    Hardly anybody is sampled (q = .002, four records), and at the `gateway` level the learning rate is too small to move
    anything. B is large enough for the run not to look up other sigmas.
    """
    orchestrator = data_free_run(
        COORDINATES,
        noise_level=level,
        rounds=1,
        lr=0.5 if level != "gateway" else 1e-30,
        seed=fresh(4),
        engine=engine,
        out=out,
    )
    layout = orchestrator.plan.layout
    before = layout.flatten(orchestrator.plan.model).astype(np.float64)
    moved = layout.flatten(orchestrator.run().model) - before
    factor = 1 / 2 if level == "gateway" else 0.5 * math.sqrt(3 / 2) / (25 if level == "sample" else 1)
    checks.check_noise_law(moved, 0.7 * 20.0 * factor)


# --- T2: independence ------------------------------------------------------------------------------------------------


def local_noise_independence(engine: str, level: str) -> None:
    """T2, through the observer: noise of different gateways, steps, rounds and attempts is uncorrelated."""
    spec = spec_of(level)
    num_params = 3000
    model = wide_model(num_params)
    shards = {g: random_shard(4, seed=g, num_outputs=num_params // (NUM_FEATURES + 1)) for g in (0, 1, 5)}
    rows = [
        observe(engine, model, training_of(spec), shards, keys_of(2, index, attempt)).noise()
        for index, attempt in ((1, 0), (1, 1), (2, 0), (11, 0))
    ]
    checks.check_independence(np.concatenate(rows))


def stream_independence() -> None:
    """T2, at the source: gateways, steps, rounds, attempts, purposes and arrived sets each have noise of their own."""
    spec, length = spec_of("sample"), 5000
    rows: list[npt.NDArray[np.float32]] = []
    for index, attempt in ((1, 0), (1, 1), (2, 0), (3, 0)):
        keys = keys_of(3, index, attempt)
        local = LocalNoise(spec, keys, range(4))
        for step in range(3):
            out = np.empty((4, length), np.float32)
            local.fill(step, out)
            rows.extend(out)
        for arrived in (((0, 3),), ((0, 2),), ((0, 1), (3, 3)), ((0, 0), (2, 3)), ()):
            rows.append(noise.aggregate_noise(spec, keys, arrived, length))
        rows.extend(keys.stream(purpose, 0).normals(0, length) for purpose in ("batches", "model draws", "new purpose"))
    checks.check_independence(np.stack(rows))


class _Stop(Callback):
    """Ctrl-C after the first round."""

    def on_round(self, done: RoundDone) -> None:
        raise KeyboardInterrupt


def resumed_noise_is_fresh(level: str, out: Path) -> None:
    """T2 over a real stop, resume and two extensions: no round's noise has anything of an earlier one's.

    As in `run_noise_law`, what the parameters move by in a round is its noise.
    """
    num_params = 24_000

    def params() -> npt.NDArray[np.float64]:
        return RunDirectory(out).restore().checkpoint.params.astype(np.float64)

    lr = 0.5 if level == "sample" else 1e-30
    first = data_free_run(num_params, [_Stop()], noise_level=level, rounds=2, lr=lr, seed=fresh(6), out=out)
    seen = [first.plan.layout.flatten(first.plan.model).astype(np.float64)]
    try:
        first.run()
    except RunInterruptedError:
        seen.append(params())
    else:
        raise AssertionError("the run was not cut off: the proof would prove nothing")
    for rounds in (2, 3, 4):
        data_free_run(num_params, resume=out, rounds=rounds).run()
        seen.append(params())
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 4
    checks.check_independence(np.diff(np.stack(seen), axis=0))


class Fuse:
    """Two gateways' shards, loaded in every round, until the fuse is blown."""

    num_records = 20_000  # so many that only one shard is kept
    blown = False

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if Fuse.blown:
            raise ValueError("blown")
        shard = random_shard(Fuse.num_records, seed=index)
        return shard.x.numpy(), shard.y.numpy()


class _Blow(Callback):
    def on_round(self, done: RoundDone) -> None:
        Fuse.blown = True


def retry_has_other_noise(out: Path) -> None:
    """T2: a round that failed and is repeated in other groups, which may round differently, is charged a second time.

    The attempt is in every noise key ("T2 streams"), so a second attempt is other noise.
    """

    def run(*callbacks: Callback, **settings: Any) -> None:
        config = RunConfig().resolve(
            pool="inline", device="cpu", samples_per_gateway=Fuse.num_records, memory_limit=1, **settings
        )
        Orchestrator(Fuse(), model=lambda: model_of("mlp"), loss=product_loss, config=config, callbacks=callbacks).run()

    Fuse.blown = False
    try:
        run(_Blow(), noise_level="sample", rounds=2, local_steps=2, batch_size=4, seed=5, out=out)
    except GatewayError:
        Fuse.blown = False
    else:
        raise AssertionError("round 2 did not fail: the proof would prove nothing")
    run(resume=out, gateways_per_actor=1)
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 0), (2, 0), (2, 1)]
    assert json.loads((out / "privacy.json").read_text())["steps"] == 3 * 2
