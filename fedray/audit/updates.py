"""Attacks T4 and T13 at `gateway`: exchange one gateway's records; its clipped update may move 2 C, no other at all.

Local training is played by the run's own trainer, with the run's optimizer, several gateways side by side; what is added up is
clipped by the real worker. No statistics: worlds with the same keys are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedray.audit.canaries import clipped
from fedray.audit.central import Federation
from fedray.audit.finding import Finding
from fedray.audit.isolation import SIDE_BY_SIDE, batch_sizes, parameter_points
from fedray.audit.lab import Float32Array, Lab
from fedray.audit.movement import TOLERANCE, Movement, distance, findings_of
from fedray.audit.neighbours import Substitutes, World, worlds_around
from fedray.errors import RunFailedError
from fedray.training.trainer import Trainer

_STEPS = 3
_REAL_GATEWAYS = 16
_REAL_BYTES = 2**28
_REAL_NUMBER = 10**6  # of its keys, past those of all batch sizes


def attack_updates(lab: Lab) -> list[Finding]:
    """Compare updates of neighbouring worlds, and sums of clipped updates with and without a hostile one."""
    movement, gateways = Movement(), min(lab.plan.config.gateways, SIDE_BY_SIDE)
    spec = replace(lab.spec, local_steps=min(_STEPS, lab.spec.local_steps), sample_rate=1.0)
    # Where one gateway's gradients overflow, sums may be taken in another order; Adam would blow up the difference where a
    # gradient is nothing but rounding.
    usual, plain = lab.trainer(spec), lab.trainer(spec, plain_steps=lab.plan.training.lr)
    points, substitutes = list(parameter_points(lab)), Substitutes(lab)
    sizes, played, start = list(batch_sizes(lab.spec.batch_size)), 0, time.perf_counter()
    for number, size in enumerate(sizes):
        rng, victim = lab.rng(f"updates {number}"), number % gateways
        counts = [size if gateway == victim else int(rng.choice(sizes)) for gateway in range(gateways)]
        substitute = substitutes.record(number)
        worlds = worlds_around(lab, counts, victim, substitute.record, rng, remove=False)
        trainer = plain if substitute.overflows else usual
        _compare(lab, movement, trainer, points[number % len(points)], worlds, victim, number)
        played += 1
        if movement.beyond_claims or time.perf_counter() - start > lab.effort.game_seconds:
            break  # one world is enough; and nothing here is left to chance, so that looking early is no cheat
    beside = _compare_real_round(lab, movement, substitutes)
    _compare_sums(lab, movement)
    return findings_of(
        lab,
        movement,
        "gateway",
        "Sums of recorded updates with a hostile gateway's, without it, and with another one's in its place: the real worker "
        "clips what local training hands it (far too long, infinite, NaN, one layer only). Claim: 1 C zero-out, 2 C replace.",
        f"{movement.compared} pairs of neighbouring worlds with the same keys, at trained and perturbed parameters, {played} of "
        f"{len(sizes)} batch sizes from 1 to {max(sizes)}, {gateways} gateways side by side, one record, all others or both "
        f"exchanged; and {beside} real shards side by side, one of them exchanged. Claim: no other gateway's clipped update "
        "changes.",
    )


def _compare_real_round(lab: Lab, movement: Movement, substitutes: Substitutes) -> int:
    """Exchange the whole real shard of one gateway, all side by side; return how many gateways those are."""
    most = max(2, _REAL_BYTES // (4 * lab.num_params))
    real = {gateway: lab.shards[gateway] for gateway in range(min(lab.plan.config.gateways, _REAL_GATEWAYS, most))}
    sizes, rng = [shard.num_records for shard in real.values()], lab.rng("other shard")
    other = worlds_around(lab, sizes, 0, substitutes.record(0).record, rng, remove=False)["both"].shards[0]
    worlds = {"base": World(shards=real, name="base"), "shard": World(shards={**real, 0: other}, name="shard")}
    _compare(lab, movement, lab.trainer(lab.spec), lab.params, worlds, 0, _REAL_NUMBER)
    return len(real)


def _compare(
    lab: Lab,
    movement: Movement,
    trainer: Trainer,
    params: Float32Array,
    worlds: dict[str, World],
    victim: int,
    number: int,
) -> None:
    keys, gateways = lab.keys("updates", number), range(len(worlds["base"].shards))
    seen = {
        name: clipped(trainer.train(keys, params, gateways, world.shards), lab.clip_norm) / lab.clip_norm
        for name, world in worlds.items()
    }
    size = worlds["base"].shards[victim].num_records
    for name, rows in seen.items():
        for gateway in gateways:
            if gateway != victim and name != "base":
                where = f"{size} records, {name} exchanged: update of gateway {gateway}"
                movement.note_elsewhere(distance(rows[gateway], seen["base"][gateway]), TOLERANCE, where)
        movement.compared += name != "base"


def _compare_sums(lab: Lab, movement: Movement) -> None:
    federation = Federation(lab)
    rest = federation.rest().total
    before = rest
    for name, update in _hostile_updates(lab):
        try:
            total = federation.with_canaries(update[None]).total
        except RunFailedError:
            continue  # the orchestrator refuses it, so nothing is released
        movement.note_own(distance(total, rest) / lab.clip_norm, 1.0, f"{name}, zero-out")
        movement.note_own(distance(total, before) / lab.clip_norm, 2.0, f"{name}, replaced")
        before = total


def _hostile_updates(lab: Lab) -> Iterator[tuple[str, Float32Array]]:
    """Yield vectors `[P]` that a gateway may try."""
    direction = lab.rng("hostile").standard_normal(lab.num_params).astype(np.float32)
    direction /= np.linalg.norm(direction)
    yield "far too long", 1e3 * lab.clip_norm * direction
    yield "the opposite", -1e3 * lab.clip_norm * direction
    yield "as long as float32 can tell", np.full(lab.num_params, 1e30, np.float32)
    yield "infinite", np.full(lab.num_params, np.inf, np.float32)
    yield "NaN", np.full(lab.num_params, np.nan, np.float32)
    for name, _, where in lab.plan.layout.slices():
        update = direction.copy()
        update[where] *= 1e3
        yield f"mostly {name}", 10 * lab.clip_norm * update
