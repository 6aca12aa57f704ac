"""Collects batches and noise of every gateway, step and attempt in a few rounds of the run, for several attacks.

Noise is read twice: inside of the trainer, step by step, by an observer; and off the updates of a trainer that nobody
observes and that draws ahead between rounds, since that is what a run uses.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit.lab import QUIET, Float32Array, Lab
from fedray.privacy.streams import RoundKeys
from fedray.training.trainer import Release

_GATEWAYS = 16
_STEPS = 16
ROUNDS = 3
_SECOND_OPENING = "audited"  # an incarnation
_CHARGED: list[dict[str, Any]] = [{}, {"attempt": 1}, {"incarnation": _SECOND_OPENING}]
_COORDINATES = 4096  # of a vector that are kept
_FEWEST_OF_A_TENSOR = 64
_REACH = 1000.0  # how many C-long steps a plain step goes: what the parameters were is rounding beside it


class Place(NamedTuple):
    """The coordinates under which something was drawn; openings of an unseeded run directory count from 0."""

    round: int
    attempt: int
    opening: int
    gateway: int
    step: int


def place_of(keys: RoundKeys, gateway: int, step: int) -> Place:
    """Return where a gateway draws in a step under keys that `attempts` gave."""
    opening = int(keys.incarnation == _SECOND_OPENING)
    return Place(round=keys.round_index, attempt=keys.attempt, opening=opening, gateway=gateway, step=step)


def neighbouring(places: Collection[Place]) -> dict[str, list[tuple[Place, Place]]]:
    """Return, for each coordinate, pairs of places that differ by one in it alone; no place is in two pairs of a coordinate."""
    found: dict[str, list[tuple[Place, Place]]] = {}
    for place in places:
        for name in Place._fields:
            value = getattr(place, name)
            following = place._replace(**{name: value + 1})
            if value % 2 == (name == "round") and following in places:  # rounds count from 1
                found.setdefault(name, []).append((place, following))
    return found


@dataclass(frozen=True, kw_only=True)
class Releases:
    """What was drawn in a few rounds.

    Args:
        batches: Indices of the drawn records, by place.
        num_records: N of each gateway.
        observed: Noise by place, `[d]` in units of C, as an observer sees it.
        read_off: The same, read off updates of one step a round.
        tensors: Which of the d coordinates belong to which parameter.
    """

    batches: dict[Place, npt.NDArray[np.int64]]
    num_records: dict[int, int]
    observed: dict[Place, Float32Array]
    read_off: dict[Place, Float32Array]
    tensors: dict[str, slice]


def coordinates(lab: Lab) -> tuple[npt.NDArray[np.int64], dict[str, slice]]:
    """Return which coordinates of a vector are kept, a share of each parameter, and where each parameter's lie among them."""
    rng, slices = lab.rng("coordinates"), list(lab.plan.layout.slices())
    most = max(_FEWEST_OF_A_TENSOR, _COORDINATES // len(slices))
    kept, tensors, start = [], {}, 0
    for name, _, where in slices:
        size = where.stop - where.start
        chosen = np.sort(rng.permutation(size)[:most]) if size > most else np.arange(size)
        kept.append(where.start + chosen)
        tensors[name] = slice(start, start + len(chosen))
        start += len(chosen)
    return np.concatenate(kept), tensors


class NoiseReader:
    """A step observer that keeps batches and what was added to the clipped sums.

    Args:
        releases: Where to keep it.
        kept: Coordinates.
        clip_norm: C.
    """

    def __init__(self, releases: Releases, kept: npt.NDArray[np.int64], clip_norm: float) -> None:
        self.keys: RoundKeys | None = None
        self._releases = releases
        self._kept = kept
        self._clip_norm = clip_norm

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Change nothing."""
        return clipped

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Keep what the optimizer gets, less the clipped sum."""
        assert self.keys is not None, "set before each training"
        place = place_of(self.keys, release.gateway, release.step)
        noise = gradient.cpu().numpy().astype(np.float64) * release.divisor - release.clipped
        self._releases.observed[place] = (noise[self._kept] / self._clip_norm).astype(np.float32)
        self._releases.batches[place] = np.array(release.batch)
        return gradient


def attempts(lab: Lab, attack: str, rounds: int = ROUNDS) -> Iterator[RoundKeys]:
    """Yield the keys of a few rounds, each charged thrice: at first, by `following`, as a run has them; as another attempt;
    and by another opening of a copied directory."""
    keys = lab.keys(attack)
    for _ in range(rounds):
        for charged in _CHARGED:
            yield replace(keys, **charged)
        keys = keys.following()


def collect(lab: Lab) -> Releases:
    """Train a few rounds of the run's gateways at `sample` or `batch`, each charged thrice, and keep all draws."""
    kept, tensors = coordinates(lab)
    gateways = range(min(lab.plan.config.gateways, _GATEWAYS))
    found = Releases(
        batches={},
        num_records={gateway: lab.shards[gateway].num_records for gateway in gateways},
        observed={},
        read_off={},
        tensors=tensors,
    )
    _observe(lab, found, kept, gateways)
    _read_off(lab, found, kept, gateways)
    return found


def _observe(lab: Lab, found: Releases, kept: npt.NDArray[np.int64], gateways: range) -> None:
    trainer = lab.trainer(replace(lab.spec, local_steps=min(lab.spec.local_steps, _STEPS)))
    reader = NoiseReader(found, kept, lab.clip_norm)
    trainer.observer = reader
    start = time.perf_counter()
    for keys in attempts(lab, "releases"):
        reader.keys = keys
        trainer.train(keys, lab.params, gateways, lab.shards)
        if keys.round_index > 1 and keys.incarnation and time.perf_counter() - start > lab.effort.game_seconds:
            break  # the clock decides, not what was released; two whole rounds at least


def _read_off(lab: Lab, found: Releases, kept: npt.NDArray[np.int64], gateways: range) -> None:
    """Take the sums of a trainer with next to no noise off those of the run's, one step a round."""
    length = _REACH * lab.divisor / (lab.clip_norm * max(1.0, lab.sigma))
    spec = replace(lab.spec, local_steps=1)
    loud = lab.trainer(spec, plain_steps=length)
    quiet = lab.trainer(replace(spec, noise_multiplier=QUIET), plain_steps=length)
    start = time.perf_counter()
    for keys in attempts(lab, "read off"):
        noised, plain = (trainer.train(keys, lab.params, gateways, lab.shards) for trainer in (loud, quiet))
        loud.draw_ahead(Event())  # what a run draws while it waits serves the next round or nothing
        noise = (noised[:, kept].astype(np.float64) - plain[:, kept]) * (-lab.divisor / length / lab.clip_norm)
        for gateway, row in zip(gateways, noise, strict=True):
            found.read_off[place_of(keys, gateway, 0)] = row.astype(np.float32)
        if keys.round_index > 1 and keys.incarnation and time.perf_counter() - start > lab.effort.game_seconds:
            break
