"""Attacks on local noise with real records as canaries (T5): clipping itself is under attack, not the noise alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedray.audit import power
from fedray.audit.bounds import Scores, count, game_bound, gaussian_bound
from fedray.audit.canaries import (
    Directions,
    clipped,
    layer_by_layer,
    mislabelled,
    out_of_distribution,
    record_gradients,
)
from fedray.audit.directions import LARGEST_PLAYABLE_MU, few_records
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab, SameShard
from fedray.data.shards import Shard, joined
from fedray.privacy.levels import Adjacency, Unit, level_of

Float64Array = npt.NDArray[np.float64]
_FREE = 14  # directions that are read for the scale of the noise
_STEP = 3e-4  # how far a coordinate moves a step: far enough for float32, so little that gradients stay what they were


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One direction along which the attacker looks for one canary.

    Args:
        kind: Of the canary.
        records: What the gateway trains on in the world with the canary.
        direction: `[P]`, unit length.
        shift: How far the canary, honestly clipped, moves the sum along it.
        note: Says which direction it is.
    """

    kind: str
    records: Shard
    direction: Float64Array
    shift: float
    note: str


def attack_records(lab: Lab) -> list[Finding]:
    """Play T5 with records that stand out, forced into every batch by the real sampler at rate 1.

    `sample`: the record is in the shard beside a few known ones, or not: sqrt(L)/sigma. `batch`: the shard holds such
    records only, or the gateway stays silent (zero-out): sqrt(L)/sigma.
    """
    by_record = level_of(lab.spec).local == "record"
    ways = [way for kind, make in _KINDS for way in _ways(lab, kind, make)]
    if not ways:
        return []  # the model does not see these records at all: there is nothing to recognise
    steps = lab.attacked_steps(lab.spec.local_steps)
    free = Directions(lab.num_params, lab.rng("free")).first(_FREE)
    directions = np.concatenate([np.stack([way.direction for way in ways]).astype(np.float32), free])
    known = np.zeros(len(directions))
    if by_record:
        gradients = record_gradients(lab.plan.model, lab.plan.training.loss, few_records(lab))
        known = directions.astype(np.float64) @ clipped(gradients, lab.clip_norm).sum(axis=0)

    def read(world: str, records: Shard, runs: int, rate: float = 1.0) -> Float64Array:
        return (_readings(lab, world, records, directions, steps, runs, rate) - steps * known) / lab.clip_norm

    runs = lab.affordable_runs(lambda pilot: read("pilot", ways[0].records, pilot))
    # At `batch`, the other world's gateway sends noise only: rate 0 makes every batch empty.
    absent = read("absent", few_records(lab), runs, 1.0 if by_record else 0.0)
    present = {kind: read(kind, records, runs) for kind, records in {way.kind: way.records for way in ways}.items()}
    return [
        _finding(lab, way, present[way.kind][:, column], absent[:, column], absent[:, len(ways) :], steps)
        for column, way in enumerate(ways)
    ]


_KINDS: tuple[tuple[str, Callable[..., Shard]], ...] = (
    ("mislabelled", mislabelled),
    ("out-of-distribution", out_of_distribution),
)


def _ways(lab: Lab, kind: str, make: Callable[..., Shard]) -> list[_Way]:
    """Return where to look for a canary of this kind; nothing when its gradient is zero."""
    shard, by_record = lab.shards[0], level_of(lab.spec).local == "record"
    number = 1 if by_record else min(lab.spec.batch_size, shard.num_records)
    canary = make(lab.plan.model, shard, number, lab.rng(kind), lab.plan.class_labels)
    gradients = record_gradients(lab.plan.model, lab.plan.training.loss, canary)
    if by_record:
        moved, records = clipped(gradients, lab.clip_norm)[0], joined([few_records(lab), canary])
    else:
        mean = gradients.sum(axis=0, keepdims=True) / lab.spec.batch_size
        moved, records = clipped(mean, lab.clip_norm)[0], canary
    length = float(np.linalg.norm(moved))
    if length == 0:
        return []
    layered = layer_by_layer(moved, lab.plan.layout)
    return [
        _Way(kind=kind, records=records, direction=moved / length, shift=length, note=""),
        _Way(kind=kind, records=records, direction=layered, shift=float(moved @ layered), note=", layer by layer"),
    ]


def _finding(
    lab: Lab, way: _Way, present: Float64Array, absent: Float64Array, free: Float64Array, steps: int
) -> Finding:
    unit: Unit = "record" if level_of(lab.spec).local == "record" else "gateway"
    adjacency: Adjacency = level_of(lab.spec).claims(lab.spec)[0].adjacency if unit == "record" else "zero-out"
    claim, effect, runs = math.sqrt(steps) / lab.sigma, way.shift / lab.clip_norm, len(present)
    if claim <= LARGEST_PLAYABLE_MU:
        bound = game_bound(count(present, absent, effect * steps / 2))
        leak = power.game_leak(claim, runs, runs, effect)
        how = f"counting over {runs} runs a world"
    else:
        scores = Scores()
        scores.add(present / steps, free / steps)
        bound = gaussian_bound(scores)
        leak = power.gaussian_leak(claim, runs, free.size, effect=effect)
        how = f"Gaussian reading over {runs} runs (a game would be won nearly always at this sigma)"
    what = (
        "is one record more" if unit == "record" else "is a shard of such records; the other world's gateway is silent"
    )
    return Finding(
        name=f"T5 {way.kind} {unit}{way.note}",
        level=lab.spec.noise_level,
        unit=unit,
        adjacency=adjacency,
        claim=claim,
        lower_bound=bound,
        smallest_leak_caught=leak,
        text=f"{how}, {steps} local step{'s' * (steps > 1)}, nothing observed inside the trainer: what was released is read "
        f"off the update. The canary {what}; honestly clipped it moves the sum by {effect:.3g}·C along the attacker's "
        f"direction. Claim: mu = sqrt({steps})/sigma.",
    )


def _readings(
    lab: Lab,
    world: str,
    records: Shard,
    directions: npt.NDArray[np.float32],
    steps: int,
    runs: int,
    rate: float,
) -> Float64Array:
    """Return `[runs, D]`: released sums of local training on these records, added up over the steps, along directions."""
    divisor = float(lab.spec.batch_size) if level_of(lab.spec).local == "record" else 1.0
    lr = _STEP * divisor / (lab.sigma * lab.clip_norm)
    trainer = lab.trainer(replace(lab.spec, local_steps=steps, sample_rate=rate), plain_steps=lr)
    keys = lab.keys(f"records {world}", runs)
    parts = [updates @ directions.T for updates in lab.train(trainer, keys, runs, SameShard(records))]
    return np.concatenate(parts).astype(np.float64) * (-divisor / lr)
