"""Draws the record behind an update, which an attacker reads off the first Linear layer in closed form.

For one record x, the layer's gradients are dW = e·xᵀ and db = e, so x = dWᵀ·db/|db|² whatever the clipping factor
(Phong et al. 2017; Geiping et al. 2020). With noise on both, the same formula gives noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedray.audit.lab import SameShard
from fedray.data import digits
from fedray.data.shards import Shard
from fedray.models import calls, reference
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys, forked_global_rng
from fedray.reports import pictures
from fedray.training.engines import new_trainer
from fedray.training.trainer import LocalTraining

TITLE = "Records read off an update (first Linear layer, digits), without noise and with it"
SIGMAS = (0.0, 0.1, 1.0)
_SHOWN = 6
_HIDDEN = 32
_TILE = 9  # pixels from one digit to the next


def invert(update: npt.NDArray[np.float32], num_features: int, hidden: int = _HIDDEN) -> npt.NDArray[np.float64]:
    """Return the record `[num_features]` that the first Linear layer's part of an update gives away.

    Args:
        update: `[P]`, any multiple of one record's gradient; the layer's weight `[hidden, features]` comes first, then its
            bias.
        num_features: Of a record.
        hidden: Rows of the layer.
    """
    size = hidden * num_features
    weight = update[:size].astype(np.float64).reshape(hidden, num_features)
    bias = update[size : size + hidden].astype(np.float64)
    square = float(bias @ bias)
    found: npt.NDArray[np.float64] = bias @ weight / square if square > 0 else np.zeros(num_features)
    return found


def reconstructions(rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], dict[float, npt.NDArray[np.float64]]]:
    """Return `_SHOWN` digits `[n, 64]` and, for each sigma, what the attack reads off the real trainer's updates.

    Raises:
        InputError: scikit-learn, which brings the digits, is not installed.
    """
    (x, y), _ = digits.load()
    chosen = rng.permutation(len(y))[:_SHOWN]
    with forked_global_rng(int(rng.integers(2**31))):
        model = reference.mlp(x.shape[1:], 10)
    found: dict[float, npt.NDArray[np.float64]] = {}
    for sigma in SIGMAS:
        rows = [
            invert(_update(model, Shard(x=torch.from_numpy(x[[i]]), y=torch.from_numpy(y[[i]])), sigma, rng), x[0].size)
            for i in chosen.tolist()
        ]
        found[sigma] = np.stack(rows)
    return x[chosen].reshape(_SHOWN, -1), found


def _update(model: torch.nn.Module, shard: Shard, sigma: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return a gateway's update after one step of the `sample` level on one record (sigma 0 where a run allows none)."""
    spec = PrivacySpec(
        noise_level="sample",
        noise_multiplier=sigma,
        clip_norm=1.0,
        delta=1e-5,
        batch_size=1,
        sample_rate=1.0,
        local_steps=1,
        expected_cohort=1.0,
    )
    training = LocalTraining(privacy=spec, optimizer="sgd", lr=1.0, loss=calls.cross_entropy)
    trainer = new_trainer("stacked", model, training, torch.device("cpu"))
    params = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    keys = RoundKeys(round_key=rng.bytes(32), round_index=1)
    update: npt.NDArray[np.float32] = trainer.train(keys, params, [0], SameShard(shard))[0]
    return update


def picture(rng: np.random.Generator) -> bytes:
    """Return the image grid as a PNG: the records, and what is left of them at each sigma.

    Raises:
        InputError: scikit-learn or matplotlib is not installed.
    """
    figure = pictures.new_figure(1.2 * _SHOWN + 1.6, 1.2 * (len(SIGMAS) + 1))
    records, found = reconstructions(rng)
    rows = [("record", records.astype(np.float64)), *((f"sigma = {sigma:g}", found[sigma]) for sigma in SIGMAS)]
    mosaic = np.full((len(rows) * _TILE, _SHOWN * _TILE), np.nan)
    for line, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            # Each on its own scale: noise shrinks what is read off.
            scaled = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
            mosaic[line * _TILE : line * _TILE + 8, column * _TILE : column * _TILE + 8] = scaled.reshape(8, 8)
    axes = figure.subplots()
    axes.imshow(mosaic, cmap="gray")
    axes.set_xticks([])
    axes.set_yticks([line * _TILE + 3.5 for line in range(len(rows))], [name for name, _ in rows])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    return pictures.png_bytes(figure)
