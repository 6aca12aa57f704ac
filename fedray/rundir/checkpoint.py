"""A checkpoint: one safetensors file that appears by one rename and describes all it depends on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fedray.errors import DamagedRunError
from fedray.privacy.durable import LARGEST, parse_json, read_regular
from fedray.privacy.streams import commitment
from fedray.rundir.files import replace, unsealed

PARAMS, DESCRIPTION, ROUND_KEY = "params", "description", "round_key"  # in a checkpoint
_SERVER = "server."  # before names of arrays of the server's state
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after a round; with the ledger it determines all that follows.

    Args:
        round: The last finished round (0: none yet).
        generation: How often the run was extended.
        params: `[P]`.
        server_state: Arrays by name, of algorithm and server optimizer.
        round_key: k_round, from which later round keys follow; None when it was not kept.
        card: Content of config.json.
    """

    round: int
    generation: int = 0
    params: npt.NDArray[np.float32]
    round_key: bytes | None = field(repr=False)
    card: Mapping[str, Any]
    server_state: Arrays = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its file; later states sort after earlier ones."""
        return f"{self.round:08d}-{self.generation:04d}.safetensors"

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What its file holds, by name."""
        return {PARAMS: self.params} | {_SERVER + name: array for name, array in self.server_state.items()}


def arrays_digest(arrays: Arrays) -> str:
    """Return the SHA-256 of arrays, their names, types and shapes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def checkpoints_in(root: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(root / name for name in os.listdir(root) if name.endswith(".safetensors") and name[0] != ".")


def write_checkpoint(path: Path, arrays: Arrays, texts: Mapping[str, str]) -> None:
    """Write a checkpoint's file; it appears whole or not at all."""
    # Private, as it may hold a key; so is what is left of it should a crash come before it has its name.
    replace(path, save_arrays(dict(arrays), dict(texts)), mode=0o600)


def contents_of(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Return the texts of a checkpoint's file and its arrays, unchecked but for the parameters' type.

    Raises:
        DamagedRunError: It is no checkpoint.
    """
    try:
        data = read_regular(path, LARGEST)
        arrays = load_arrays(data)
        params = arrays[PARAMS]
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if params.dtype != np.float32 or params.ndim != 1:
        raise DamagedRunError(f"{path} is damaged (it holds something else); restore the file.")
    return header.get("__metadata__") or {}, arrays


def read_checkpoint(path: Path, key_may_be_gone: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint and its description, checked.

    Args:
        path: Its file.
        key_may_be_gone: Whether the run ended, so that its round key was removed.

    Raises:
        DamagedRunError: A checksum or a key does not fit.
    """
    texts, arrays = contents_of(path)
    try:
        description = unsealed(texts.get(DESCRIPTION, "").encode())
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if "arrays_sha256" in description:
        fits = arrays_digest(arrays) == description["arrays_sha256"]
    else:  # format 1, which had no other arrays
        fits = hashlib.sha256(arrays[PARAMS].data).hexdigest() == description["params_sha256"]
    if not fits:
        raise DamagedRunError(f"{path} is damaged (its checksum does not fit); restore the file.")
    expected, key = description["round_key_commitment"], None
    if expected is not None and not (key_may_be_gone and ROUND_KEY not in texts):
        key = key_of(texts.get(ROUND_KEY, ""), expected, path)
    checkpoint = Checkpoint(
        round=description["round"],
        generation=description["generation"],
        params=arrays[PARAMS],
        round_key=key,
        card=description["config"],
        server_state={name.removeprefix(_SERVER): array for name, array in arrays.items() if name != PARAMS},
    )
    return checkpoint, description


def key_of(text: str, expected: str | None, path: Path) -> bytes:
    """Return a key from its text.

    Raises:
        DamagedRunError: It is not the one that was committed to.
    """
    try:
        key = bytes.fromhex(text)
    except ValueError as error:
        raise DamagedRunError(f"{path} is damaged ({error}); restore the file.") from error
    if not key or commitment(key) != expected:
        raise DamagedRunError(f"{path} is damaged: it is not the key that the run used; restore the file.")
    return key
