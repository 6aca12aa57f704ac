"""Gaussian noise of the private levels, keyed so that no two releases ever share it unless their inputs are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedray.privacy.shapes import noise_scale
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import RoundKeys, Stream, derive_key, fill_normals, torch_seed

_LOCAL = "local noise"
_AGGREGATE = "aggregate noise"


class LocalNoise:
    """The noise of a group of gateways in one round: N(0, sigma²C²) a coordinate, independent over gateways and steps.

    Args:
        spec: Gives sigma·C.
        keys: The round's key and attempt.
        gateways: Ids, one row of noise each.
    """

    def __init__(self, spec: PrivacySpec, keys: RoundKeys, gateways: Sequence[int]) -> None:
        self._std, self._shape, self._round = spec.noise_std, spec.noise_shape, keys.round_index
        self._keys = [keys.key(_LOCAL, gateway) for gateway in gateways]
        self._streams = [Stream(key) for key in self._keys]

    def fill(self, step: int, out: npt.NDArray[np.float32]) -> None:
        """Overwrite `out` `[G, P]` with the step's noise."""
        fill_normals(self._streams, step, out, self._std * noise_scale(self._shape, self._round, step))

    def fill_on_device(self, step: int, out: torch.Tensor) -> None:
        """Overwrite `out` `[G, P]` on a GPU with the step's noise, from a generator keyed per gateway and step.

        The device's generator (Philox) takes a 63-bit seed, so this noise is weaker than `fill`'s; reports say so.
        """
        generator = torch.Generator(device=out.device)
        std = self._std * noise_scale(self._shape, self._round, step)
        for row, key in zip(out, self._keys, strict=True):
            generator.manual_seed(torch_seed(key, "device", step))
            row.normal_(0.0, std, generator=generator)


def aggregate_noise(
    spec: PrivacySpec, keys: RoundKeys, arrived: Sequence[tuple[int, int]], num_params: int
) -> npt.NDArray[np.float32]:
    """Return the one noise vector of a `gateway` round: N(0, sigma²C²) a coordinate.

    Args:
        spec: Gives sigma·C.
        keys: The round's key and attempt.
        arrived: Ranges of the gateways whose updates are in the sum; another set has other noise.
        num_params: P.

    Guarantee:
        Added once to a sum of updates clipped to C, it makes the round mu = 1/sigma GDP for leaving one gateway out.
    """
    label = hashlib.sha256(repr([(int(first), int(last)) for first, last in arrived]).encode()).hexdigest()
    key = derive_key(keys.key(_AGGREGATE, 0), label)
    out = np.empty((1, num_params), np.float32)
    fill_normals([Stream(key)], 0, out, spec.noise_std * noise_scale(spec.noise_shape, keys.round_index, 0))
    row: npt.NDArray[np.float32] = out[0]
    return row
