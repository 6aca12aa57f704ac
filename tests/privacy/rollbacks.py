"""Proofs that equal noise never meets other inputs where a run directory is copied, rolled back or repeated (T2).

Nobody can tell from a directory whether another process has gone on from a copy of it. So two processes that do may only
agree where they repeat what both find charged, with the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray import Orchestrator, RunConfig
from fedray.algorithms.aggregation import GroupResult
from fedray.errors import RunInterruptedError
from fedray.pool.inline_pool import InlinePool
from fedray.reports.callback import Callback, RoundDone
from tests.privacy import checks
from tests.privacy.worlds import data_free_run

NUM_PARAMS = 24_000
Releases = dict[tuple[Any, ...], npt.NDArray[np.float64]]
"""What was released, by all that may decide it: two releases of one entry may be equal, all others share no noise."""


class StopAfter(Callback):
    """Ctrl-C when this many rounds are published; the next one is charged by then."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def on_round(self, done: RoundDone) -> None:
        """Count."""
        if done.record["round"] == self._rounds:
            raise KeyboardInterrupt


@contextmanager
def watched(found: Releases, lost_in: Collection[int] = ()) -> Iterator[None]:
    """Note what each gateway sends and what each round moves the parameters by; lose gateway 1 in some rounds."""
    begin, collect = InlinePool.begin, InlinePool.collect
    last: list[tuple[tuple[Any, ...], npt.NDArray[np.float32]]] = []

    def see_begin(self: InlinePool, keys: Any, params: npt.NDArray[np.float32], cohort: Any) -> None:
        for key, before in last:
            _note(found, ("moved", *key), params.astype(np.float64) - before)
        last.clear()
        begin(self, keys, params, cohort)

    def see_collect(self: InlinePool) -> list[GroupResult]:
        keys, params, _ = self._round
        results = collect(self)
        if keys.round_index in lost_in:
            results = [_without(result, 1) for result in results]
        inputs = keys.round_index, hashlib.sha256(params.tobytes()).hexdigest()
        for result in results:
            assert result.updates is not None
            for gateway, update in zip(result.gateways, result.updates, strict=True):
                _note(found, ("sent", *inputs, gateway), update.astype(np.float64))
        last.append(((*inputs, tuple(g for result in results for g in result.gateways)), params.copy()))
        return results

    InlinePool.begin, InlinePool.collect = see_begin, see_collect  # type: ignore[method-assign]
    try:
        yield
    finally:
        InlinePool.begin, InlinePool.collect = begin, collect  # type: ignore[method-assign]


def _note(found: Releases, key: tuple[Any, ...], value: npt.NDArray[np.float64]) -> None:
    assert key not in found or np.array_equal(found[key], value), f"two releases from the same inputs differ: {key}"
    found[key] = value


def _without(result: GroupResult, gateway: int) -> GroupResult:
    rows = [row for row, member in enumerate(result.gateways) if member != gateway]
    assert result.updates is not None
    return replace(result, gateways=tuple(result.gateways[row] for row in rows), updates=result.updates[rows])


def _stop_after(done: int, **settings: Any) -> None:
    try:
        data_free_run(NUM_PARAMS, [StopAfter(done)], **settings).run()
    except RunInterruptedError:
        return
    raise AssertionError("the run was not cut off: the proof would prove nothing")


def copies_share_no_noise(level: str, out: Path, *, stops: int = 1, backup: bool = False) -> None:
    """T2 over two copies of an unseeded run, in one of which a gateway is late: where inputs differ, so does all noise.

    As in `proofs.noise.run_noise_law`, data play no part: what is released is noise.

    Args:
        level: The noise level.
        out: The run directory.
        stops: How often the run had been cut off, and taken up again, before the copy was made.
        backup: Whether the second process gets the files back under the first one's path, after it.
    """
    lr = 1e-30 if level == "gateway" else 0.5
    _stop_after(1, noise_level=level, rounds=4 + stops, lr=lr, out=out, on_failure="drop")
    for number in range(1, stops):
        _stop_after(number + 1, resume=out)
    copy = out.with_name("copy")
    shutil.copytree(out, copy)
    found: Releases = {}
    with watched(found):
        data_free_run(NUM_PARAMS, resume=out).run()
    if backup:
        shutil.rmtree(out)
        copy.rename(out)
    other = out if backup else copy
    with watched(found, lost_in=(stops + 1,)):
        data_free_run(NUM_PARAMS, resume=other).run()
    kind = "moved" if level == "gateway" else "sent"
    releases = {key: value for key, value in found.items() if key[0] == kind}
    later = {key[2] for key in releases if key[1] == stops + 2}
    assert len(later) == 2, "the copies did not diverge: the proof would prove nothing"
    checks.check_independence(np.stack(list(releases.values())))


def each_attempt_draws_its_own_cohort(out: Path) -> None:
    """T2: a secret cohort is charged as sampled anew in each attempt, so an attempt's tells nothing about another's.

    Four thousand gateways at participation 1/2; rounds 2 and 3 are repeated in other groups.
    """
    settings: dict[str, Any] = {"gateways": 4000, "participation": 0.5, "noise_level": "gateway", "seed": 5}
    settings |= {"rounds": 3, "local_steps": 1, "batch_size": 1, "samples_per_gateway": 4, "out": out}
    try:
        Orchestrator(
            config=RunConfig().resolve(**settings, pool="inline", device="cpu"), callbacks=[StopAfter(2)]
        ).run()
    except RunInterruptedError:
        pass
    else:
        raise AssertionError("the run was not cut off: the proof would prove nothing")
    newest = max((out / "checkpoint").glob("0*.safetensors"))
    newest.unlink()  # as if the crash had come before it: round 2 is done again
    Orchestrator(config=RunConfig().resolve(resume=out, pool="inline", device="cpu", gateways_per_actor=1000)).run()
    lines = [json.loads(line) for line in (out / "private.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    present = np.zeros((len(lines), settings["gateways"]))
    for row, line in zip(present, lines, strict=True):
        row[line["cohort"]] = 1.0
    checks.check_independence(present - settings["participation"])
    charges = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"]) for line in charges] == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert all(line["gateways"] == [[0, 3999]] for line in charges)
