"""T7, the one-run Gaussian attack: many orthogonal canaries in each release, read against canary-free directions."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit import power
from fedray.audit.bounds import Scores, gaussian_bound
from fedray.audit.canaries import Directions
from fedray.audit.directions import few_records, public_divisor
from fedray.audit.finding import Finding
from fedray.audit.lab import Lab, SameShard
from fedray.privacy.levels import level_of
from fedray.training.trainer import Release

_PRECISION = 0.03  # of the canaries' mean, in units of C


class PooledReader:
    """A step observer that plants many orthogonal canaries at once and reads every direction.

    Args:
        directions: M of them.
        planted: `[M]` booleans, which of them carry a canary of norm C.
        divisor: Public divisor of a step.
        clip_norm: C.
        device: Of the trainer.
    """

    def __init__(
        self,
        directions: Directions,
        planted: npt.NDArray[np.bool_],
        divisor: float,
        clip_norm: float,
        device: torch.device,
    ) -> None:
        self.scores = Scores()
        self._directions = directions
        self._planted = planted
        self._divisor = divisor
        self._clip_norm = clip_norm
        self._sum = torch.from_numpy(clip_norm * directions.combine(planted.astype(float))).float().to(device)
        self._rest: torch.Tensor | None = None

    def before_noise(
        self, gateway: int, step: int, batch: npt.NDArray[np.int64], clipped: torch.Tensor
    ) -> torch.Tensor:
        """Plant all canaries."""
        self._rest = clipped
        return clipped + self._sum

    def released(self, release: Release, gradient: torch.Tensor) -> torch.Tensor:
        """Read all directions."""
        assert self._rest is not None, "before_noise comes first"
        residual = (gradient * self._divisor - self._rest).cpu().numpy().astype(np.float64)
        scores = self._directions.coefficients(residual) / self._clip_norm
        self.scores.add(scores[self._planted], scores[~self._planted])
        return gradient


def pooled_releases(lab: Lab, per_release: int, most: int = 4000) -> int:
    """Return how many releases T7 pools: enough to see a few percent more leakage at this sigma, at most `most`."""
    needed = (4.9 * max(lab.sigma, 1.0) / _PRECISION) ** 2
    return int(max(1, min(most, math.ceil(needed / max(per_release, 1)))))


def planted_half(size: int, rng: np.random.Generator, most: int | None = None) -> npt.NDArray[np.bool_]:
    """Return which of M directions carry a canary: a random half, at most `most`."""
    number = size // 2 if most is None else min(size // 2, most)
    planted = np.zeros(size, np.bool_)
    planted[rng.permutation(size)[:number]] = True
    return planted


def attack_pooled(lab: Lab) -> list[Finding]:
    """T7 at `sample`: many canaries in one release, all forced in, held against 1/sigma a step."""
    directions = Directions(lab.num_params, lab.rng("pooled directions"))
    planted = planted_half(directions.size, lab.rng("pooled"))
    per_release = int(planted.sum())
    if per_release == 0:
        return []  # a model of one parameter has no free direction
    steps = min(4, lab.spec.local_steps)
    gateways = -(-pooled_releases(lab, per_release) // steps)
    reader = PooledReader(directions, planted, public_divisor(lab), lab.clip_norm, lab.device)
    trainer = lab.trainer(replace(lab.spec, local_steps=steps))
    trainer.observer = reader
    start, trained = time.perf_counter(), 0
    for updates in lab.train(trainer, lab.keys("pooled"), gateways, SameShard(few_records(lab))):
        trained += len(updates)  # the reader has read the releases themselves
        if time.perf_counter() - start > lab.effort.game_seconds:
            break  # the clock decides, not what was released
    return [pooled_finding(lab, reader.scores, f"{trained * steps} local steps", "local step")]


def pooled_finding(lab: Lab, scores: Scores, where: str, per: str) -> Finding:
    """Return T7's finding from the scores of all releases."""
    claim = 1.0 / lab.sigma
    first = level_of(lab.spec).claims(lab.spec)[0]
    return Finding(
        name="T7 one-run Gaussian",
        level=lab.spec.noise_level,
        unit=first.unit,
        adjacency=first.adjacency,
        claim=claim,
        lower_bound=gaussian_bound(scores),
        smallest_leak_caught=power.gaussian_leak(claim, scores.canaries, scores.free),
        text=f"{scores.canaries} orthogonal canaries of norm C in {where}, {scores.free} canary-free directions for the scale of "
        f"the noise, which is taken to be normal. Claim: mu = 1/sigma a {per}.",
    )
