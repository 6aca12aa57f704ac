"""Attack T5: tells from updates alone whether a real record was in the shard; nothing inside the trainer is observed.

Needs no shape of the noise: it counts how often the two worlds are told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedray.audit import power
from fedray.audit.bounds import Scores, count, game_bound, gaussian_bound
from fedray.audit.canaries import Directions, clipped, mislabelled, out_of_distribution, record_gradients
from fedray.audit.finding import Finding
from fedray.audit.lab import LARGEST_PLAYABLE_MU, Lab, SameShard
from fedray.audit.neighbours import chosen
from fedray.data.shards import Shard, joined
from fedray.privacy.levels import Adjacency, Unit
from fedray.training.trainer import Trainer

Float64Array = npt.NDArray[np.float64]
_FREE = 14  # directions that are read for the scale of the noise
_STEP = 3e-4  # how far a coordinate moves a step: far enough for float32, so little that gradients stay what they were
_OTHERS = 3  # records beside the canary, which the attacker knows


@dataclass(frozen=True, kw_only=True)
class Canary:
    """What the attacker looks for.

    Args:
        kind: The kind of its records.
        records: What the gateway trains on in the world with the canary.
        direction: `[P]`, unit length, along which it looks.
        shift: How far the canary, honestly clipped, moves the sum along it, in units of C.
    """

    kind: str
    records: Shard
    direction: Float64Array
    shift: float


def attack_records(lab: Lab) -> list[Finding]:
    """Play T5 with records that stand out, forced into every batch by the real sampler at rate 1.

    `sample`: the record is in the shard beside a few known ones, or not: sqrt(L)/sigma. `batch`: the shard holds such
    records only, or the gateway stays silent (zero-out): sqrt(L)/sigma.
    """
    canary = canary_of(lab)
    if canary is None:
        return []  # the model does not see these records at all: there is nothing to recognise
    steps = lab.attacked_steps(lab.spec.local_steps)
    free = Directions(lab.num_params, lab.rng("free")).first(_FREE)
    directions = np.concatenate([canary.direction[None].astype(np.float32), free])
    known = np.zeros(len(directions))
    if lab.by_record:
        gradients = record_gradients(lab.model, lab.plan.training.loss, _others(lab))
        known = directions.astype(np.float64) @ clipped(gradients, lab.clip_norm).sum(axis=0)

    lr = _STEP * lab.divisor / (lab.sigma * lab.clip_norm)
    spec = replace(lab.spec, local_steps=steps, sample_rate=1.0)
    drawing_all = lab.trainer(spec, plain_steps=lr)

    def read(world: str, records: Shard, runs: int, trainer: Trainer = drawing_all) -> Float64Array:
        parts = [
            updates @ directions.T
            for updates in lab.train(trainer, lab.keys(f"records {world}", runs), runs, SameShard(records))
        ]
        released = np.concatenate(parts).astype(np.float64) * (-lab.divisor / lr)
        return (released - steps * known) / lab.clip_norm

    runs = lab.affordable_runs(lambda pilot: read("pilot", canary.records, pilot))
    # At `batch`, the other world's gateway sends noise only: rate 0 makes every batch empty.
    silent = drawing_all if lab.by_record else lab.trainer(replace(spec, sample_rate=0.0), plain_steps=lr)
    absent = read("absent", _others(lab), runs, silent)
    present = read("present", canary.records, runs)
    return [_finding(lab, canary, present[:, 0], absent[:, 0], absent[:, 1:], steps)]


def canary_of(lab: Lab) -> Canary | None:
    """Return the longest canary; None when gradients of all kinds are zero."""
    found = [_canary(lab, "out-of-distribution"), _canary(lab, "mislabelled")]
    best = max(found, key=lambda canary: canary.shift)
    return best if best.shift > 0 else None


def _canary(lab: Lab, kind: str) -> Canary:
    make = mislabelled if kind == "mislabelled" else out_of_distribution
    shard = lab.shards[0]
    number = 1 if lab.by_record else min(lab.spec.batch_size, shard.num_records)
    records = make(lab.model, shard, number, lab.rng(kind), lab.plan.class_labels)
    gradients = record_gradients(lab.model, lab.plan.training.loss, records)
    if not lab.by_record:
        gradients = gradients.sum(axis=0, keepdims=True) / lab.spec.batch_size
    moved = clipped(gradients, lab.clip_norm)[0]
    length = float(np.linalg.norm(moved))
    return Canary(
        kind=kind,
        records=joined([_others(lab), records]) if lab.by_record else records,
        direction=moved / max(length, 1e-300),
        shift=length / lab.clip_norm,
    )


def _others(lab: Lab) -> Shard:
    shard = lab.shards[0]
    return chosen(shard, np.arange(min(_OTHERS, shard.num_records)))


def _finding(
    lab: Lab, canary: Canary, present: Float64Array, absent: Float64Array, free: Float64Array, steps: int
) -> Finding:
    unit: Unit = "record" if lab.by_record else "gateway"
    adjacency: Adjacency = lab.adjacency if lab.by_record else "zero-out"
    claim, runs = math.sqrt(steps) / lab.sigma, len(present)
    if claim <= LARGEST_PLAYABLE_MU:
        bound = game_bound(count(present, absent, canary.shift * steps / 2))
        leak = power.game_leak(claim, runs, runs, canary.shift)
        how = f"counting over {runs} runs a world"
    else:
        scores = Scores()
        scores.add(present / steps, free / steps)
        bound = gaussian_bound(scores)
        leak = power.gaussian_leak(claim, runs, free.size, effect=canary.shift)
        how = f"Gaussian reading over {runs} runs (a game would be won nearly always at this sigma)"
    what = (
        "is one record more" if unit == "record" else "is a shard of such records; the other world's gateway is silent"
    )
    return Finding(
        name=f"T5 canary {'record' if unit == 'record' else 'shard'}",
        level=lab.spec.noise_level,
        unit=unit,
        adjacency=adjacency,
        claim=claim,
        lower_bound=bound,
        smallest_leak_caught=leak,
        text=f"{how}, {steps} local step{'s' * (steps > 1)}, nothing observed inside the trainer: what was released is read "
        f"off the update. The canary ({canary.kind}) {what}; honestly clipped it moves the sum by {canary.shift:.3g}·C along "
        f"the attacker's direction. Claim: mu = sqrt({steps})/sigma.",
    )
