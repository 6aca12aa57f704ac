"""Attacks T4 and T13: exchange one record; its own gateway's sum may move by at most the claim, nothing else at all.

No statistics: neighbouring worlds (versions of all shards that differ in one gateway's records) are trained with the
same keys at the same parameters and compared. Worlds have batches of every size up to 2B that hold all records, several
gateways side by side, several steps, trained and perturbed parameters; besides, the real shards are trained at the
run's own rate. Each world is read twice: by an observer inside of the trainer, and off the updates of a trainer that
nobody observes, since that is what a run uses.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit.finding import Finding
from fedray.audit.lab import QUIET, Float32Array, Lab
from fedray.audit.movement import TOLERANCE, Movement, distance, findings_of, rounding
from fedray.audit.neighbours import Substitutes, World, chosen, exchanged, worlds_around
from fedray.privacy.levels import Unit
from fedray.privacy.streams import RoundKeys
from fedray.training.trainer import Release, Trainer

SIDE_BY_SIDE = 3  # gateways in a group
_STEPS = 2  # what a model keeps from one step shows in the next one
_PERTURBATIONS = (0.0, 0.1, 0.5)  # of the parameters, over their standard deviation
_REACH = 1000.0  # how many C-long steps a plain step goes: what the parameters were is rounding beside it
_READ_OFF = 8  # batch sizes that are read off updates as well
_REAL_STEPS = 8
_REAL_GATEWAYS = 16
_REAL_BYTES = 2**28
_REAL_ROUNDS = 3


class SumReader(Protocol):
    """Trains a world and returns its clipped sums."""

    def __call__(self, params: Float32Array, keys: RoundKeys, world: World) -> WorldSums: ...


@dataclass
class WorldSums:
    """The clipped sums of one world, and what else was seen of its training.

    Args:
        sums: The sum `[P]` of each (gateway, step), in units of C.
        noise: Digests of the noise added to them, where it was seen.
        batches: Record indices, where they were seen.
        gradients: What the optimizer got, where it was seen.
    """

    sums: dict[tuple[int, int], Float32Array] = field(default_factory=dict)
    noise: dict[tuple[int, int], bytes] = field(default_factory=dict)
    batches: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict)
    gradients: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class StepReader:
    """A step observer that keeps a world's clipped sums; later worlds are trained with the first one's gradients.

    So all worlds meet the same parameters at every step, and what differs comes from their records.

    Args:
        clip_norm: C.
        base: The first world; None while it is read.
    """

    def __init__(self, clip_norm: float, base: WorldSums | None) -> None:
        self.seen = WorldSums()
        self._clip_norm = clip_norm
        self._base = base

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Change nothing."""
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Keep the release."""
        where = (release.gateway, release.step)
        self.seen.sums[where] = np.array(release.clipped) / np.float32(self._clip_norm)
        self.seen.noise[where] = hashlib.blake2b(np.ascontiguousarray(release.noise).data).digest()
        self.seen.batches[where] = np.array(release.batch)
        if self._base is None:
            self.seen.gradients[where] = gradient.clone()
            return gradient
        return self._base.gradients[where]


def attack_isolation(lab: Lab) -> list[Finding]:
    """Compare neighbouring worlds at `sample` or `batch`."""
    movement = Movement()
    gateways = min(lab.plan.config.gateways, SIDE_BY_SIDE)
    sizes = list(batch_sizes(lab.spec.batch_size))
    steps = _STEPS
    watched = lab.trainer(replace(lab.spec, local_steps=steps, sample_rate=1.0))
    length = _REACH * lab.divisor / lab.clip_norm
    unwatched = lab.trainer(
        replace(lab.spec, local_steps=1, sample_rate=1.0, noise_multiplier=QUIET), plain_steps=length
    )
    inside, outside = _observed(lab, watched, gateways), _read_off(lab, unwatched, gateways, length)
    draws = _draws(lab, inside, gateways)
    substitutes, start = Substitutes(lab), time.perf_counter()
    points = list(parameter_points(lab))
    played = 0
    for number, size in enumerate(sizes):
        rng = lab.rng(f"isolation {number}")
        victim = number % gateways
        counts = [size if gateway == victim else int(rng.choice(sizes)) for gateway in range(gateways)]
        # What is drawn for a record may depend on the batch's shape: without a record it is not the same draw.
        worlds = worlds_around(lab, counts, victim, substitutes.record(number).record, rng, remove=not draws)
        keys, params = lab.keys("isolation", number), points[number % len(points)]
        for read in (inside, outside) if number < _READ_OFF else (inside,):
            _compare(lab, movement, read, params, keys, worlds, victim)
        played += 1
        if movement.beyond_claims or time.perf_counter() - start > lab.effort.game_seconds:
            break  # one world is enough; and nothing here is left to chance, so that looking early is no cheat
    beside = _compare_real_rounds(lab, movement, substitutes)
    return _findings(lab, movement, f"{played} of {len(sizes)} batch sizes from 1 to {max(sizes)}", gateways, beside)


def batch_sizes(batch_size: int) -> Iterator[int]:
    """Yield batch sizes 1 … 2B, the most telling ones first: the attack may run out of time before the last one."""
    first = [batch_size, 2 * batch_size, 2, 1, 9, 3, 17, 5]
    largest = 2 * batch_size
    order = [size for size in dict.fromkeys(first) if size <= largest]
    yield from order
    rest = np.random.default_rng(0).permutation([size for size in range(1, largest + 1) if size not in order])
    yield from (int(size) for size in rest)


def parameter_points(lab: Lab) -> Iterator[Float32Array]:
    """Yield parameters to attack at: trained ones, and perturbed ones none of which is zero."""
    rng = lab.rng("perturbed")
    scales = np.zeros(lab.num_params)
    for _, _, where in lab.plan.layout.slices():
        scales[where] = max(float(lab.params[where].std()), 0.05)
    for share in _PERTURBATIONS:
        yield (lab.params + share * scales * rng.standard_normal(lab.num_params)).astype(np.float32)


def _observed(lab: Lab, trainer: Trainer, gateways: int) -> SumReader:
    base: list[WorldSums | None] = [None]

    def read(params: Float32Array, keys: RoundKeys, world: World) -> WorldSums:
        if world.name == "base":
            base[0] = None
        reader = StepReader(lab.clip_norm, base[0])
        trainer.observer = reader
        trainer.train(keys, params, range(gateways), world.shards)
        if world.name == "base":
            base[0] = reader.seen
        return reader.seen

    return read


def _read_off(lab: Lab, trainer: Trainer, gateways: int, length: float) -> SumReader:
    def read(params: Float32Array, keys: RoundKeys, world: World) -> WorldSums:
        updates = trainer.train(keys, params, range(gateways), world.shards)
        scale = np.float32(-lab.divisor / length / lab.clip_norm)
        return WorldSums(sums={(gateway, 0): row * scale for gateway, row in enumerate(updates)})

    return read


def _draws(lab: Lab, read: SumReader, gateways: int) -> bool:
    """Tell whether the model draws (Dropout): then other keys give other sums of the same full batches."""
    rng = lab.rng("draws")
    world = worlds_around(lab, [2] * gateways, 0, chosen(lab.shards[0], np.array([0])), rng, remove=False)["base"]
    one, other = (read(lab.params, lab.keys("draws", number), world) for number in range(2))
    return any(
        not np.array_equal(one.sums[where], other.sums[where], equal_nan=True) for where in one.sums if where[1] == 0
    )


def _compare(
    lab: Lab,
    movement: Movement,
    read: SumReader,
    params: Float32Array,
    keys: RoundKeys,
    worlds: Mapping[str, World],
    victim: int,
) -> None:
    """Read neighbouring worlds and note what moved."""
    base = read(params, keys, worlds["base"])
    own = {"base": base.sums}
    sizes = {gateway: shard.num_records for gateway, shard in worlds["base"].shards.items()}
    largest = max(sizes.values())
    for name, world in worlds.items():
        if name == "base":
            continue
        seen = read(params, keys, world)
        where = (
            f"{sizes[victim]} records, {name} exchanged" if name != "without" else f"{sizes[victim]} records, one less"
        )
        own[name] = {at: value for at, value in seen.sums.items() if at[0] == victim}
        for at, value in seen.sums.items():
            if at[0] != victim:
                moved = distance(value, base.sums[at])
                movement.note_elsewhere(moved, rounding(largest), f"{where}: sum of gateway {at[0]}, step {at[1]}")
        for at, noise in seen.noise.items():
            if noise != base.noise[at]:
                movement.note_elsewhere(math.inf, TOLERANCE, f"{where}: noise of gateway {at[0]}, step {at[1]}")
        movement.compared += 1
    for at in own["record"]:
        _note_own(lab, movement, {name: sums[at] for name, sums in own.items()}, sizes[victim], at[1])


def _note_own(lab: Lab, movement: Movement, sums: Mapping[str, Float32Array], size: int, step: int) -> None:
    """Note how one gateway's sum of one step moved between worlds."""
    where = f"{size} records, step {step}"
    pairs = [("base", "record"), ("others", "both")]
    for one, other in pairs if lab.by_record else [*pairs, ("base", "both"), ("base", "others")]:
        movement.note_own(distance(sums[one], sums[other]), 2.0, f"{where}, replaced", size)
    if not lab.by_record:
        for value in sums.values():
            movement.note_own(distance(value, np.zeros_like(value)), 1.0, f"{where}, zero-out", size)
    if "without" in sums:
        for name in ("base", "record"):
            moved = distance(sums[name], sums["without"])
            movement.note_own(moved, 1.0 if lab.by_record else 2.0, f"{where}, removed", size)
    if lab.by_record:
        # What exchanging the record changes must be the same beside whatever other records.
        change, beside_others = (sums[b].astype(np.float64) - sums[a] for a, b in pairs)
        movement.note_elsewhere(
            distance(change, beside_others), rounding(size), f"{where}: what the others of its batch contribute"
        )


def _compare_real_rounds(lab: Lab, movement: Movement, substitutes: Substitutes) -> int:
    """Exchange one record of a real shard at the run's own rate, all gateways side by side; return how many those are.

    Steps that did not draw the record must not move either.
    """
    most = max(2 * _STEPS, _REAL_BYTES // (4 * lab.num_params))  # sums of a world
    steps = min(lab.spec.local_steps, _REAL_STEPS, most // 2)
    gateways = min(lab.plan.config.gateways, _REAL_GATEWAYS, most // steps)
    trainer = lab.trainer(replace(lab.spec, local_steps=steps))
    read = _observed(lab, trainer, gateways)
    real = {gateway: lab.shards[gateway] for gateway in range(gateways)}
    for number in range(_REAL_ROUNDS):
        keys, victim = lab.keys("real rounds", number), number % gateways
        base = read(lab.params, keys, World(shards=real, name="base"))
        drawn = base.batches[victim, 0]
        record = int(drawn[number % len(drawn)]) if len(drawn) else 0
        other = exchanged(real[victim], record, substitutes.record(number).record)
        seen = read(lab.params, keys, World(shards={**real, victim: other}, name="record"))
        for at, value in seen.sums.items():
            moved, size = distance(value, base.sums[at]), len(base.batches[at])
            where = f"real shards: gateway {at[0]}, step {at[1]}"
            if not np.array_equal(seen.batches[at], base.batches[at]):
                movement.note_elsewhere(math.inf, rounding(size), f"{where}, its batch")
            elif at[0] == victim and record in base.batches[at]:
                movement.note_own(moved, 2.0, f"{where}, replaced", size)
            else:
                movement.note_elsewhere(moved, rounding(size), f"{where}, which did not draw the record")
            if seen.noise[at] != base.noise[at]:
                movement.note_elsewhere(math.inf, TOLERANCE, f"{where}, its noise")
        movement.compared += 1
    return gateways


def _findings(lab: Lab, movement: Movement, what: str, gateways: int, real: int) -> list[Finding]:
    text = (
        f"{movement.compared} pairs of neighbouring worlds with the same keys, at trained and perturbed parameters, {what}, "
        f"gateways side by side: {gateways}, {_STEPS} steps; and {real} real shards side by side at the run's own rate. "
        "Compared, not estimated."
    )
    unit: Unit = "record" if lab.by_record else "gateway"
    return findings_of(
        lab,
        movement,
        unit,
        f"{text} Claim: a record that is added or removed moves its gateway's clipped sum by at most 1 C (`batch`: 2 C), one "
        "that is exchanged by 2 C.",
        f"{text} Claim: what other records and other gateways contribute, all noise, and steps that did not draw the record "
        "stay what they are, but for rounding.",
    )
