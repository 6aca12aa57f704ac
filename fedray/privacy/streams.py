"""Keyed randomness: every draw of a run comes from a key derived from its purpose, gateway, round and attempt.

Knows nothing of models, privacy or Ray. A *root key* (32 bytes) yields the setup key (partition, model initialisation,
MACs) and the first round key; round keys ratchet forward, so that a round's key does not give away earlier rounds.
Under a round key, `RoundKeys` names a stream by purpose, gateway, round, attempt and incarnation; the step is the nonce.
A stream is the AES-256-CTR keystream under that key (NIST SP 800-38A), so its words are computationally indistinguishable from
uniform ones.

The normals of a stream follow Box and Muller (1958): a 64-bit word gives the radius (so the tail is cut at 9.3 standard
deviations and not before), a 32-bit word the angle. They are laid out in blocks, and a vector's bits depend only on
(key, step, length): not on how many vectors are drawn together.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import random
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedray.privacy.constants import constant

KEY_BYTES = 32
_INCARNATION_BYTES = 16  # two openings in 2^64 share one
# Normals are made in blocks of this many pairs: enough to spread the cost of a call, few enough to stay in a cache.
PAIRS_PER_BLOCK = 65536
_BYTES_PER_PAIR = 12  # 8 for the radius, then 4 for the angle
_SMALLEST_SQUARE = 2.0**-126  # of the uniform value, for the word 0: radius 9.35
_SHAPES_KEPT = 8  # of blocks, whose views are made once
_ZEROS = memoryview(bytes(PAIRS_PER_BLOCK * _BYTES_PER_PAIR))

Float32Array = npt.NDArray[np.float32]


def new_root_key(seed: int | None) -> bytes:
    """Return a run's root key: from the operating system, or from the seed when there is one.

    Args:
        seed: Makes the run reproducible, and its noise predictable to whoever knows the seed ("simulation only").
    """
    if seed is None:
        return secrets.token_bytes(KEY_BYTES)
    return hashlib.blake2b(f"fedray seed {seed}".encode(), digest_size=KEY_BYTES).digest()


def derive_key(key: bytes, purpose: str, *numbers: int) -> bytes:
    """Derive a 32-byte key from `key`, a purpose and whole numbers (keyed BLAKE2b; the encoding is injective)."""
    label = purpose.encode()
    message = len(label).to_bytes(2, "big") + label + b"".join(n.to_bytes(8, "big", signed=True) for n in numbers)
    return hashlib.blake2b(message, key=key, digest_size=KEY_BYTES).digest()


def setup_key(root_key: bytes) -> bytes:
    """Return the key of everything drawn once: the partition, the model's initial values, MACs of private data."""
    return derive_key(root_key, "setup")


def first_round_key(root_key: bytes) -> bytes:
    """Return k_0, from which the keys of all rounds ratchet."""
    return derive_key(root_key, "round")


def next_round_key(round_key: bytes) -> bytes:
    """Return k_{r+1} = H(k_r); k_r cannot be found from it."""
    return derive_key(round_key, "next round")


def extension_root(key: bytes, seeded: bool, number: int) -> bytes:
    """Return the root of the rounds that extension `number` (from 1) adds to a finished run.

    Args:
        key: The run's setup key.
        seeded: Whether the run has a seed; then the root follows from it, else it comes from the operating system.
        number: Which extension.
    """
    return derive_key(key, "extension", number) if seeded else secrets.token_bytes(KEY_BYTES)


def new_incarnation(seed: int | None) -> str:
    """Return a value that no other opening of a run directory has (hexadecimal), or "" for a run with a seed.

    It sets apart the keys of two processes that go on from equal files, as copies and restored backups make them. It is
    public: the keys stay secret without it.

    Args:
        seed: Of the run; a seeded run is the same whoever opens it ("simulation only").
    """
    return secrets.token_hex(_INCARNATION_BYTES) if seed is None else ""


def commitment(key: bytes) -> str:
    """Return a public value that identifies a key without giving it away."""
    return derive_key(key, "commitment").hex()


def mac(key: bytes, data: bytes) -> str:
    """Return the hexadecimal HMAC-SHA256 of private data (a plain hash would let outsiders test guesses)."""
    return hmac.new(derive_key(key, "mac"), data, hashlib.sha256).hexdigest()


def torch_seed(key: bytes, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for code that can only be seeded (model constructors, Dropout)."""
    return int.from_bytes(derive_key(key, purpose, *numbers)[:8], "big") >> 1


def numpy_generator(key: bytes, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a numpy generator for set-up draws (partition, toy data): reproducible, not cryptographic."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(derive_key(key, purpose, *numbers), "big")))


@contextmanager
def forked_global_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random inside the block and restore them after it.

    For user code (a model's constructor, Dropout) that knows only global generators.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch lacks the annotation
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class Stream:
    """Random words and normals under one key; `step` selects independent parts of the keystream.

    Args:
        key: 32 bytes, from `RoundKeys.key` or `derive_key`.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def seek(self, step: int) -> None:
        """Go to the start of the keystream of a step (at most 2^64 blocks of 16 bytes each)."""
        self._encryptor.reset_nonce(_nonce(step))

    def fill_bytes(self, out: npt.NDArray[np.uint8]) -> None:
        """Overwrite `out` with the next keystream bytes."""
        target = out.data
        for start in range(0, len(target), len(_ZEROS)):
            part = target[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)

    def bernoulli(self, step: int, size: int, rate: float) -> npt.NDArray[np.int64]:
        """Return the sorted indices i < size whose word falls below `rate`; i's fate depends on (key, step, i) only.

        Args:
            step: Which part of the keystream.
            size: How many independent trials.
            rate: Probability in [0, 1], rounded down to a multiple of 2^-32.
        """
        return self.bernoulli_steps(range(step, step + 1), size, rate)[0]

    def bernoulli_steps(
        self, steps: range, size: int, rate: float
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return `bernoulli` of each step, one after the other, and how many indices each has; faster than one by one."""
        threshold = math.floor(rate * 2.0**32)
        if threshold >= 2**32:
            return np.tile(np.arange(size), len(steps)), np.full(len(steps), size)
        words = np.empty((len(steps), size), np.uint32)
        for row, step in zip(words.view(np.uint8), steps, strict=True):
            self.seek(step)
            self.fill_bytes(row)
        chosen = np.flatnonzero(words < np.uint32(threshold))
        ends = np.searchsorted(chosen, np.arange(0, (len(steps) + 1) * size, size))
        counts = np.diff(ends)
        return chosen - np.repeat(np.arange(len(steps)) * size, counts), counts

    def normals(self, step: int, size: int) -> Float32Array:
        """Return `size` standard normals of a step."""
        out = np.empty((1, size), np.float32)
        fill_normals([self], step, out, 1.0)
        row: Float32Array = out[0]
        return row


@dataclass(frozen=True, kw_only=True)
class RoundKeys:
    """The key of one attempt at one round; yields the key of every stream in it.

    Args:
        round_key: k_r, 32 bytes.
        round_index: r, from 1.
        attempt: 0, and one more each time the round is repeated with other inputs.
        incarnation: Of the process that charged the attempt, see `new_incarnation`; "" in a seeded run.
    """

    round_key: bytes = field(repr=False)
    round_index: int
    attempt: int = 0
    incarnation: str = ""

    def key(self, purpose: str, gateway: int) -> bytes:
        """Return the key of a gateway's stream for one purpose."""
        # Without an incarnation, the keys that seeded runs have always had.
        own = derive_key(self.round_key, f"incarnation {self.incarnation}") if self.incarnation else self.round_key
        return derive_key(own, purpose, gateway, self.round_index, self.attempt)

    def following(self) -> RoundKeys:
        """Return the keys of the first attempt at the next round, should this process charge it."""
        return RoundKeys(
            round_key=next_round_key(self.round_key), round_index=self.round_index + 1, incarnation=self.incarnation
        )

    def stream(self, purpose: str, gateway: int) -> Stream:
        """Return a gateway's stream for one purpose; its steps are nonces."""
        return Stream(self.key(purpose, gateway))


def fill_normals(streams: Sequence[Stream], step: int, out: Float32Array, std: float) -> None:
    """Overwrite row g of `out` with N(0, std²) from stream g: the same bits whichever rows are drawn together.

    Args:
        streams: One stream per row.
        step: Which part of each keystream.
        out: `[G, P]` float32.
        std: Standard deviation, at least 0.
    """
    rows, size = out.shape
    nonce = _nonce(step)
    encryptors = [stream._encryptor for stream in streams]
    for encryptor in encryptors:
        encryptor.reset_nonce(nonce)
    block = 2 * PAIRS_PER_BLOCK
    together = max(1, block // (size + size % 2)) if size else rows
    target = torch.from_numpy(out)
    for first in range(0, rows, together):
        group = encryptors[first : first + together]
        for start in range(0, size, block):
            _fill_block(group, target[first : first + len(group), start : start + block], std)


def _fill_block(encryptors: Sequence[CipherContext], out: torch.Tensor, std: float) -> None:
    rows, size = out.shape
    pairs = (size + 1) // 2
    work = _MEMORY.of(rows, pairs)
    for encryptor, row in zip(encryptors, work.keystream, strict=True):
        encryptor.update_into(work.zeros, row)
    radius, angle = work.radius, work.angle
    # The magnitude u of a signed word over 2^63 is uniform on [0, 1]; -2 log u is -log u².
    radius.copy_(work.radius_words)
    torch.addcmul(constant(_SMALLEST_SQUARE), radius, radius, value=2.0**-126, out=radius)
    radius.log_().neg_().sqrt_().mul_(constant(std))
    angle.copy_(work.angle_words).mul_(constant(math.pi * 2.0**-31))
    cosine, sine = torch.split(out, [pairs, size - pairs], 1)
    torch.cos(angle, out=cosine)
    cosine.mul_(radius)
    if size % 2:  # the last pair gives one normal
        radius, angle = radius[:, :-1], angle[:, :-1]
    torch.sin(angle, out=sine)
    sine.mul_(radius)


def _nonce(step: int) -> bytes:
    return step.to_bytes(8, "big") + bytes(8)


class _BlockMemory(NamedTuple):
    """Working memory for a block of one shape: each row's `keystream` bytes, as many as `zeros`, and views of them."""

    keystream: list[memoryview]
    zeros: memoryview
    radius_words: torch.Tensor
    angle_words: torch.Tensor
    radius: torch.Tensor
    angle: torch.Tensor


class _ThreadMemory(threading.local):
    """One thread's working memory for blocks (allocating it anew for each block would halve the speed)."""

    def __init__(self) -> None:
        self._words = np.empty(0, np.uint8)
        self._radius, self._angle = torch.empty(0), torch.empty(0)
        self._known: dict[tuple[int, int], _BlockMemory] = {}

    def of(self, rows: int, pairs: int) -> _BlockMemory:
        """Return memory for `rows` rows of `pairs` pairs; its contents are undefined."""
        work = self._known.get((rows, pairs))
        if work is None:
            if len(self._known) >= _SHAPES_KEPT:
                self._known.clear()
            with torch.inference_mode(False):  # they outlive the mode in which they are first asked for
                work = self._known[rows, pairs] = self._views(rows, pairs)
        return work

    def _views(self, rows: int, pairs: int) -> _BlockMemory:
        used, size = pairs * _BYTES_PER_PAIR, rows * pairs
        width = -(-used // 16) * 16  # rows on 16-byte boundaries
        if rows * width > self._words.size or size > len(self._radius):
            self._words = np.empty(max(rows * width, self._words.size), np.uint8)
            self._radius = torch.empty(max(size, len(self._radius)))
            self._angle = torch.empty_like(self._radius)
            self._known.clear()  # views of the memory before
        words = self._words[: rows * width].reshape(rows, width)
        return _BlockMemory(
            keystream=[row[:used].data for row in words],
            zeros=_ZEROS[:used],
            radius_words=torch.from_numpy(words[:, : 8 * pairs].view(np.int64)),
            angle_words=torch.from_numpy(words[:, 8 * pairs : used].view(np.int32)),
            radius=self._radius[:size].view(rows, pairs),
            angle=self._angle[:size].view(rows, pairs),
        )


_MEMORY = _ThreadMemory()
