"""Groups of uploads of which one is an outlier, with and without the real noise: what the outlier report looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit.canaries import clipped, mislabelled, out_of_distribution, record_gradients
from fedray.audit.lab import Lab, SameShard
from fedray.data.shards import Shard, joined
from fedray.models.layout import Layout
from fedray.privacy import mechanism
from fedray.privacy.clipping import clip_rows
from fedray.privacy.levels import level_of

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
_ROWS = 24  # uploads in a group
_QUIET = 1e-9  # a noise multiplier that stands for none
_WARM_UP_ROUNDS = 3  # of plain training, so that honest gradients are as small as late in a run
_IN_SUM = 8  # updates in a sum of the `gateway` level
_STEP = 3e-4  # how far a coordinate moves: far enough for float32


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One group of uploads; row 0 is the outlier.

    Args:
        bases: `[R, P]`, in units of C, un-noised and without the outlier.
        changes: `[R, P]`, what being the outlier would add to each row.
        gap: Norm that the claim allows a change to have, in units of C: 1, or 2 for replacing.
        noised: Returns the rows `[R, P]` as the real code releases them at a sigma; None for what is never released.
    """

    bases: Float64Array
    changes: Float64Array
    gap: int
    noised: Callable[[float], Float64Array] | None

    def observed(self, sigma: float) -> Float64Array:
        """Return what an observer sees, `[R, P]` in units of C; sigma 0 is un-noised."""
        if sigma > 0:
            assert self.noised is not None, "single gradients are never released"
            return self.noised(sigma)
        rows = self.bases.copy()
        rows[0] += self.changes[0]
        return rows

    def likelihood_ratios(self, rows: Float64Array) -> Float64Array:
        """Return the best attacker's scores (Neyman and Pearson 1933): all is known to it but the noise and the place."""
        ratios: Float64Array = ((rows - self.bases) * self.changes).sum(axis=1) - (self.changes**2).sum(axis=1) / 2
        return ratios


def record_scene(lab: Lab, trial: int) -> Scene:
    """Return clipped gradients of single records, of which the first is far out of distribution; never released."""
    model, rng = warmed_up(lab), lab.rng(f"record scene {trial}")
    shard, loss = lab.shards[trial % _num_gateways(lab)], lab.plan.training.loss
    chosen = _some(shard, _ROWS, rng)
    canary = out_of_distribution(model, shard, 1, rng, lab.plan.class_labels)
    bases = clipped(record_gradients(model, loss, chosen), lab.clip_norm) / lab.clip_norm
    outlier = clipped(record_gradients(model, loss, canary), lab.clip_norm) / lab.clip_norm
    return Scene(bases=bases, changes=outlier - bases, gap=2, noised=None)


def upload_scenes(lab: Lab, trials: int) -> list[Scene]:
    """Return groups of what an observer sees at the run's level."""
    if level_of(lab.spec).central_noise:
        return _sum_scenes(lab, trials)
    return [_step_scene(lab, trial) for trial in range(trials)]


def warmed_up(lab: Lab) -> torch.nn.Module:
    """Return the model after a few rounds of plain training (noise level none), the same at each call."""
    if lab.warm_model is None:
        import copy

        params = lab.params
        trainer = lab.trainer(replace(lab.spec, noise_level="none"))
        gateways = range(_num_gateways(lab))
        for index in range(_WARM_UP_ROUNDS):
            updates = trainer.train(lab.keys("warm up", 0, index + 1), params, gateways, lab.shards)
            params = (params + np.nan_to_num(updates).mean(axis=0)).astype(np.float32)
        lab.warm_model = copy.deepcopy(lab.plan.model)
        lab.plan.layout.load(lab.warm_model, params)
    return lab.warm_model


def _num_gateways(lab: Lab) -> int:
    return min(lab.plan.config.gateways, 16)


def _some(shard: Shard, number: int, rng: np.random.Generator) -> Shard:
    return shard.records(torch.from_numpy(rng.integers(shard.num_records, size=number)))


class _Uploads:
    """One local step of a group of gateways with batches that hold all of their records."""

    def __init__(self, lab: Lab, trial: int, plain: Sequence[Shard], marked: Sequence[Shard]) -> None:
        self._lab = lab
        self._trial = trial
        self._params = Layout.of(warmed_up(lab)).flatten(warmed_up(lab))
        self.plain = plain
        self.marked = marked

    def noised(self, sigma: float) -> Float64Array:
        """Return the rows with the outlier in the first place."""
        return self.released([self.marked[0], *self.plain[1:]], sigma)

    def released(self, shards: Sequence[Shard], sigma: float) -> Float64Array:
        """Return what the real trainer releases, in units of C."""
        lab = self._lab
        divisor = float(lab.spec.batch_size) if level_of(lab.spec).local == "record" else 1.0
        lr = _STEP * divisor / (max(sigma, 0.1) * lab.clip_norm)
        spec = replace(lab.spec, noise_multiplier=sigma, local_steps=1, sample_rate=1.0)
        keys = lab.keys(f"uploads {sigma!r}", self._trial)
        updates = lab.trainer(spec, plain_steps=lr).train(
            keys, self._params, range(len(shards)), dict(enumerate(shards))
        )
        return updates.astype(np.float64) * (-divisor / lr / lab.clip_norm)


def _step_scene(lab: Lab, trial: int) -> Scene:
    rng, model, labels = lab.rng(f"upload scene {trial}"), warmed_up(lab), lab.plan.class_labels
    by_record = level_of(lab.spec).local == "record"
    order = rng.permutation(_ROWS) % _num_gateways(lab)
    number = 1 if by_record else lab.spec.batch_size
    plain = [_some(lab.shards[int(gateway)], number, rng) for gateway in order]
    first = lab.shards[0]
    canary = out_of_distribution(model, first, number, rng, labels)
    marked = [joined([one, canary]) for one in plain] if by_record else [canary] * _ROWS
    uploads = _Uploads(lab, trial, plain, marked)
    bases = uploads.released(plain, _QUIET)
    return Scene(
        bases=bases,
        changes=uploads.released(marked, _QUIET) - bases,
        gap=1 if by_record else 2,
        noised=uploads.noised,
    )


def _sum_scenes(lab: Lab, trials: int) -> list[Scene]:
    """Return sums of recorded updates of real gateways; in the outlier's, a poisoned update stands for one of them."""
    num_gateways, recorded = _num_gateways(lab), []
    trainer = lab.trainer(lab.spec)
    rounds = max(1, min(4, 2**26 // (4 * lab.num_params * num_gateways)))
    for index in range(rounds):
        recorded.append(
            trainer.train(lab.keys("recorded sums", 0, index + 1), lab.params, range(num_gateways), lab.shards)
        )
    updates = _clipped_rows(np.concatenate(recorded), lab.clip_norm)
    shard, rng = lab.shards[0], lab.rng("poisoned sums")
    number = min(shard.num_records, 4 * lab.spec.batch_size)
    records = mislabelled(lab.plan.model, shard, number, rng, lab.plan.class_labels)
    poison = records.records(torch.arange(shard.num_records) % number)
    poisoned = _clipped_rows(trainer.train(lab.keys("poison"), lab.params, [0], SameShard(poison)), lab.clip_norm)[0]
    return [_sum_scene(lab, trial, updates, poisoned) for trial in range(trials)]


def _sum_scene(lab: Lab, trial: int, updates: Float64Array, poisoned: Float64Array) -> Scene:
    rng = lab.rng(f"sum scene {trial}")
    members = np.stack([rng.permutation(len(updates))[: min(_IN_SUM, len(updates))] for _ in range(_ROWS)])
    bases = updates[members].sum(axis=1)
    changes = poisoned - updates[members[:, 0]]

    def noised(sigma: float) -> Float64Array:
        spec = replace(lab.spec, noise_multiplier=sigma)
        rows = bases.copy()
        rows[0] += changes[0]
        for row in range(_ROWS):
            keys = lab.keys(f"sums {sigma!r} {trial}", row)
            total = rows[row] * lab.clip_norm
            rows[row] = mechanism.aggregate(spec, keys, total, float(_IN_SUM), ((0, _IN_SUM - 1),))
        released: Float64Array = rows * spec.expected_cohort / lab.clip_norm
        return released

    return Scene(bases=bases, changes=changes, gap=2, noised=noised)


def _clipped_rows(updates: Float32Array, clip_norm: float) -> Float64Array:
    rows: Float64Array = clip_rows(torch.from_numpy(updates), clip_norm).numpy().astype(np.float64) / clip_norm
    return rows
