"""A checkpoint: one safetensors file that appears by one rename and describes all it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fedray.errors import DamagedRunError
from fedray.privacy.streams import commitment
from fedray.rundir.files import replace, unsealed

PARAMS, DESCRIPTION, ROUND_KEY = "params", "description", "round_key"  # in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round; with the ledger it determines all that follows.

    Args:
        round: The last finished round (0: none yet).
        generation: How often the run was extended.
        params: `[P]`.
        round_key: k_round, from which later round keys follow; None when it was not kept.
        card: Content of config.json.
    """

    round: int
    generation: int = 0
    params: npt.NDArray[np.float32]
    round_key: bytes | None
    card: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its file; later states sort after earlier ones."""
        return f"{self.round:08d}-{self.generation:04d}.safetensors"


def checkpoints_in(root: Path) -> list[Path]:
    return sorted(root / name for name in os.listdir(root) if name.endswith(".safetensors") and name[0] != ".")


def write_checkpoint(path: Path, params: npt.NDArray[np.float32], texts: Mapping[str, str]) -> None:
    # Private, as it may hold a key; so is what is left of it should a crash come before it has its name.
    replace(path, save_arrays({PARAMS: params}, dict(texts)), mode=0o600)


def contents_of(path: Path) -> tuple[dict[str, str], npt.NDArray[np.float32]]:
    """Return the texts of a checkpoint's file and its parameters `[P]`, unchecked.

    Raises:
        DamagedRunError: It is no checkpoint.
    """
    try:
        data = path.read_bytes()
        params = load_arrays(data)[PARAMS]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if params.dtype != np.float32 or params.ndim != 1:
        raise DamagedRunError(f"{path} is damaged (it holds something else); restore the file.")
    return header.get("__metadata__") or {}, params


def read_checkpoint(path: Path, key_may_be_gone: bool) -> tuple[Checkpoint, dict[str, Any]]:
    texts, params = contents_of(path)
    try:
        description = unsealed(texts.get(DESCRIPTION, "").encode())
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if hashlib.sha256(params.data).hexdigest() != description["params_sha256"]:
        raise DamagedRunError(f"{path} is damaged (its checksum does not fit); restore the file.")
    expected, key = description["round_key_commitment"], None
    if expected is not None and not (key_may_be_gone and ROUND_KEY not in texts):
        key = key_of(texts.get(ROUND_KEY, ""), expected, path)
    checkpoint = Checkpoint(
        round=description["round"],
        generation=description["generation"],
        params=params,
        round_key=key,
        card=description["config"],
    )
    return checkpoint, description


def key_of(text: str, expected: str | None, path: Path) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if not key or commitment(key) != expected:
        raise DamagedRunError(f"{path} is damaged: it is not the key that the run used; restore the file.")
    return key
