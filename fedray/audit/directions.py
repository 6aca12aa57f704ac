"""Attacks on local noise with one canary direction: T5, its difference form and, at `batch`, T7."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit import power
from fedray.audit.bounds import Scores, count, game_bound, gaussian_bound
from fedray.audit.canaries import Directions
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab, SameShard
from fedray.data.shards import Shard
from fedray.privacy.levels import Adjacency, Unit, level_of
from fedray.training.trainer import Release

Float64Array = npt.NDArray[np.float64]
LARGEST_PLAYABLE_MU = 3.0  # above it both worlds are told apart nearly always, so that counting cannot tell how well
_READ = 16  # directions that are read in a game: the canary's and free ones
_REST_RECORDS = 3


@dataclass(frozen=True, kw_only=True)
class Game:
    """A distinguishing game along one direction.

    Args:
        unit: Whom the claim protects.
        adjacency: The two worlds: the canary there or not, or a canary against its opposite.
        gap: Distance of the worlds over the canary's norm: 1 or 2.
        steps: Attacked local steps.
        strength: Norm of the canary over C; below 1 where a canary of norm C would be recognised nearly always.
        claim: mu.
    """

    unit: Unit
    adjacency: Adjacency
    gap: Literal[1, 2]
    steps: int
    strength: float
    claim: float


def game_of(lab: Lab) -> Game:
    """Return the game that the run's level is played at: sqrt(L)/sigma at `sample`, 2·sqrt(L)/sigma at `batch`."""
    replaces = level_of(lab.spec).local == "batch"
    gap: Literal[1, 2] = 2 if replaces else 1
    # Two steps at least: the canary turns round at each step, so noise that is used twice cancels and gives it away.
    steps = lab.attacked_steps(lab.spec.local_steps, at_least=2)
    full = gap * math.sqrt(steps) / lab.sigma
    strength = min(1.0, LARGEST_PLAYABLE_MU / full)
    return Game(
        unit="gateway" if replaces else "record",
        adjacency="replace" if replaces else level_of(lab.spec).claims(lab.spec)[0].adjacency,
        gap=gap,
        steps=steps,
        strength=strength,
        claim=strength * full,
    )


class CanaryReader:
    """A step observer that plants a canary and reads releases along directions.

    Args:
        worlds: One number a gateway, times the canary: 1 or 0, or 1 or −1.
        canary: `[P]`.
        keep_rest: Whether the canary is added to what was clipped (a record) or stands for it (a gateway).
        directions: `[D, P]`, the canary's first.
        divisor: Public divisor of a step.
        clip_norm: C.
    """

    def __init__(
        self,
        worlds: Float64Array,
        canary: torch.Tensor,
        keep_rest: bool,
        directions: torch.Tensor,
        divisor: float,
        clip_norm: float,
    ) -> None:
        self.read = np.zeros((len(worlds), len(directions)))
        self._worlds = worlds
        self._canary = canary
        self._keep_rest = keep_rest
        self._directions = directions
        self._divisor = divisor
        self._clip_norm = clip_norm
        self._rest: torch.Tensor | None = None

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Plant the canary, turned round at every other step."""
        self._rest = clipped if self._keep_rest else None
        canary = self._canary * (float(self._worlds[gateway]) * _turn(step))
        return clipped + canary if self._keep_rest else canary

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Read the release; the attacker knows the other records, so their part is taken off."""
        residual: torch.Tensor = gradient * self._divisor
        if self._rest is not None:
            residual = residual - self._rest
        seen = (self._directions @ residual).cpu().numpy().astype(np.float64)
        self.read[release.gateway] += _turn(release.step) * seen / self._clip_norm
        return gradient


def _turn(step: int) -> int:
    return 1 if step % 2 == 0 else -1


def few_records(lab: Lab) -> Shard:
    """Return a few records of gateway 0: the rest of the batch, which the attacker knows."""
    return lab.shards[0].records(slice(_REST_RECORDS))


def play(lab: Lab, game: Game, runs: int) -> tuple[Float64Array, Float64Array]:
    """Play a game `runs` times in each world: `[2, runs, D]` readings of the worlds with and without the canary.

    Each run is a gateway of the run's own trainer, with noise and batches of its own; neighbours are of different worlds.

    Returns:
        Readings with the canary and without it, in units of C, summed over the steps.
    """
    spec = replace(lab.spec, local_steps=game.steps)
    trainer = lab.trainer(spec)
    directions = torch.from_numpy(Directions(lab.num_params, lab.rng("game")).first(_READ)).to(lab.device)
    worlds = np.tile([1.0, 0.0 if game.gap == 1 else -1.0], runs)
    reader = CanaryReader(
        worlds,
        directions[0] * (game.strength * lab.clip_norm),
        keep_rest=game.gap == 1,
        directions=directions,
        divisor=public_divisor(lab),
        clip_norm=lab.clip_norm,
    )
    trainer.observer = reader
    for _ in lab.train(trainer, lab.keys("game", runs), 2 * runs, SameShard(few_records(lab))):
        pass  # the reader has read it
    return reader.read[0::2], reader.read[1::2]


def public_divisor(lab: Lab) -> float:
    """Return what a local step divides its sum by."""
    return float(lab.spec.batch_size) if level_of(lab.spec).local == "record" else 1.0


def attack_directions(lab: Lab) -> list[Finding]:
    """Run T5, its difference form and, at `batch`, T7, on one set of releases."""
    game = game_of(lab)
    runs = lab.affordable_runs(lambda number: play(lab, game, number))
    present, absent = play(lab, game, runs)
    found = [_counted(lab, game, present[:, 0], absent[:, 0]), _difference(lab, game, present[:, 0], absent[:, 0])]
    if game.gap == 2 and present.shape[1] > 1:  # a model of one parameter has no free direction
        found.append(_gaussian(lab, game, present, absent))
    return found


def _counted(lab: Lab, game: Game, present: Float64Array, absent: Float64Array) -> Finding:
    """T5: is the canary there (or which way does it point)?"""
    runs = len(present)
    signal = game.strength * game.steps
    planted = "the canary is there or not" if game.gap == 1 else "the canary points one way or the other"
    size = "" if game.strength == 1 else f" of norm {game.strength:.3g}·C"
    return Finding(
        name="T5 distinguishing game",
        level=lab.spec.noise_level,
        unit=game.unit,
        adjacency=game.adjacency,
        claim=game.claim,
        lower_bound=game_bound(count(present, absent, signal / 2 if game.gap == 1 else 0.0)),
        smallest_leak_caught=power.game_leak(game.claim, runs, runs),
        text=f"{runs} runs a world of {game.steps} local steps; a canary direction{size} is forced into every batch, and "
        f"the attacker tells whether {planted}. Claim: {_formula(game)}.",
    )


def _difference(lab: Lab, game: Game, present: Float64Array, absent: Float64Array) -> Finding:
    """T5 on the difference of two gateways: noise that they share cancels."""
    runs, half = len(present), len(present) // 2
    with_canary, without = present - absent, absent[0 : 2 * half : 2] - absent[1 : 2 * half : 2]
    claim = game.claim / math.sqrt(2)
    return Finding(
        name="T5 difference of two gateways",
        level=lab.spec.noise_level,
        unit=game.unit,
        adjacency=game.adjacency,
        claim=claim,
        lower_bound=game_bound(count(with_canary, without, game.gap * game.strength * game.steps / 2)),
        smallest_leak_caught=power.game_leak(claim, runs, half),
        text=f"the same game on the difference of two gateways' releases ({runs} and {half} pairs): were their noise the same, "
        "it would cancel. Two independent noises are sqrt(2) times one, so the claim is smaller by that factor.",
    )


def _gaussian(lab: Lab, game: Game, present: Float64Array, absent: Float64Array) -> Finding:
    """T7 on the releases of a game of opposite canaries."""
    signal = game.strength * game.steps
    scores = Scores()
    scores.add(present[:, 0] / signal, present[:, 1:] / signal)
    scores.add(-absent[:, 0] / signal, absent[:, 1:] / signal)
    return Finding(
        name="T7 Gaussian reading",
        level=lab.spec.noise_level,
        unit=game.unit,
        adjacency=game.adjacency,
        claim=game.claim,
        lower_bound=gaussian_bound(scores, gap=game.gap),
        smallest_leak_caught=power.gaussian_leak(game.claim, scores.canaries, scores.free, gap=game.gap),
        text=f"the mean of {scores.canaries} canary scores over the noise measured along {scores.free} canary-free readings of "
        f"the same releases; sharper than counting, but it takes the noise to be normal. Claim: {_formula(game)}.",
    )


def _formula(game: Game) -> str:
    root = f"sqrt({game.steps})/sigma"
    return f"mu = {'' if game.gap == 1 else '2·'}{root}" + ("" if game.strength == 1 else f"·{game.strength:.3g}")
