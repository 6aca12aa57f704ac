"""Keyed randomness: the same key gives the same bits, any other key other ones, and nobody's global state moves."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedray.privacy import streams
from fedray.privacy.streams import RoundKeys, Stream, derive_key, fill_normals, forked_global_rng
from tests.privacy import checks

KEY = bytes(range(32))


class _Zeros:
    def reset_nonce(self, nonce: bytes) -> None:
        pass

    def update_into(self, data: bytes, buffer: memoryview) -> int:
        buffer[:] = bytes(len(data))
        return len(data)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num=st.integers(1, 6), size=st.integers(1, 3000), first=st.integers(0, 5), step=st.integers(0, 2**63))
def test_normals_do_not_depend_on_what_is_drawn_together(num: int, size: int, first: int, step: int) -> None:
    """A row's bits depend on (key, step, length) only, not on the rows beside it."""
    keys = [derive_key(KEY, "test", number) for number in range(num)]
    together = np.empty((num, size), np.float32)
    fill_normals([Stream(key) for key in keys], step, together, 0.7)
    alone = np.empty((1, size), np.float32)
    row = first % num
    fill_normals([Stream(keys[row])], step, alone, 0.7)
    assert alone.tobytes() == together[row].tobytes()


@pytest.mark.parametrize("size", [2**17 - 1, 2**17, 2**17 + 1, 300_001])
def test_normals_of_long_vectors_do_not_depend_on_grouping(size: int) -> None:
    """The same across the borders of blocks."""
    keys = [derive_key(KEY, "test", number) for number in range(3)]
    together = np.empty((3, size), np.float32)
    fill_normals([Stream(key) for key in keys], 5, together, 1.0)
    for row, key in enumerate(keys):
        assert Stream(key).normals(5, size).tobytes() == together[row].tobytes()
    checks.check_noise_law(together, 1.0)
    checks.check_independence(together)


def test_normals_are_repeatable_and_steps_are_not_consumed_in_order() -> None:
    """Asking for step 3 twice, or after step 9, gives the same bits: there is no hidden state."""
    stream = Stream(KEY)
    first = stream.normals(3, 100)
    stream.normals(9, 57)
    stream.bernoulli(3, 10, 0.5)
    assert stream.normals(3, 100).tobytes() == first.tobytes() == Stream(KEY).normals(3, 100).tobytes()


def test_normals_have_the_right_tails() -> None:
    """4 million draws at alpha = 1e-6: counts beyond 3, 4 and 5 standard deviations are binomial."""
    values = np.abs(Stream(KEY).normals(0, 4_000_000))
    assert np.isfinite(values).all()
    for cut in (3.0, 4.0, 5.0):
        expected = stats.binom(values.size, 2 * stats.norm.sf(cut))
        assert expected.ppf(5e-7) <= (values > cut).sum() <= expected.isf(5e-7)


def test_normals_of_a_zero_word_end_at_the_documented_cut() -> None:
    """The radius of the smallest word is finite: the tail is cut beyond 9.3 standard deviations, not at infinity."""
    assert 9.3 < np.sqrt(-np.log(streams._SMALLEST_SQUARE)) < 9.4
    stream = Stream(KEY)
    stream._encryptor = _Zeros()  # type: ignore[assignment]  # a keystream of nothing but that word
    assert stream.normals(0, 4).tolist() == pytest.approx([9.345, 9.345, 0, 0], abs=1e-3)


@given(size=st.integers(1, 300), rate=st.floats(0, 1), more=st.integers(0, 50))
def test_bernoulli_fate_of_a_record_depends_on_its_index_alone(size: int, rate: float, more: int) -> None:
    """Records that come after do not change who is drawn, and the drawn are sorted and distinct."""
    few, many = Stream(KEY).bernoulli(2, size, rate), Stream(KEY).bernoulli(2, size + more, rate)
    assert few.tolist() == [index for index in many.tolist() if index < size]
    assert all(one < two for one, two in pairwise(few.tolist()))


def test_bernoulli_of_rate_one_and_zero() -> None:
    """q = 1 takes everybody, q = 0 nobody."""
    assert Stream(KEY).bernoulli(0, 50, 1.0).tolist() == list(range(50))
    assert Stream(KEY).bernoulli(0, 50, 0.0).size == 0


@given(st.integers(0, 40), st.integers(1, 60), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_bernoulli_steps_are_bernoulli_step_by_step(first: int, size: int, rate: float) -> None:
    """Drawing several steps in one go changes nothing."""
    drawn, counts = Stream(KEY).bernoulli_steps(range(first, first + 4), size, rate)
    assert len(counts) == 4
    assert counts.sum() == len(drawn)
    for step, batch in enumerate(np.split(drawn, np.cumsum(counts)[:-1]), start=first):
        assert batch.tolist() == Stream(KEY).bernoulli(step, size, rate).tolist()


@given(
    st.lists(
        st.tuples(st.text(max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)), min_size=2, max_size=6
    )
)
def test_derive_key_is_injective(labels: list[tuple[str, list[int]]]) -> None:
    """Different purposes or numbers give different keys, wherever the border between them lies."""
    distinct = {(purpose, tuple(numbers)) for purpose, numbers in labels}
    assert len({derive_key(KEY, purpose, *numbers) for purpose, numbers in distinct}) == len(distinct)


def test_round_keys_name_every_coordinate() -> None:
    """Purpose, gateway, round, attempt and round key each change the stream's key."""
    keys = {
        RoundKeys(round_key=bytes([key]) * 32, round_index=index, attempt=attempt).key(purpose, gateway)
        for key in (1, 2)
        for index in (1, 2)
        for attempt in (0, 1)
        for purpose in ("local noise", "batches", "aggregate noise", "model draws")
        for gateway in (0, 1)
    }
    assert len(keys) == 64


def test_round_keys_ratchet() -> None:
    """Rounds, set-up and root have keys of their own, all different."""
    root = streams.new_root_key(0)
    chain = [streams.first_round_key(root)]
    for _ in range(5):
        chain.append(streams.next_round_key(chain[-1]))
    assert len({root, streams.setup_key(root), *chain}) == 8


def test_root_key_without_seed_is_fresh() -> None:
    """With a seed the root is reproducible, without one never."""
    assert streams.new_root_key(3) == streams.new_root_key(3) != streams.new_root_key(4)
    assert streams.new_root_key(None) != streams.new_root_key(None)


def test_forked_global_rng_restores_every_generator() -> None:
    """User code may draw as it likes: torch, numpy and random go on as if it had not, even after an error."""
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]  # a tuple

    drawn = []

    def draw_and_fail() -> None:
        with forked_global_rng(11):
            drawn.append((float(torch.rand(1)), float(np.random.rand()), random.random()))
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            draw_and_fail()
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # a tuple
    assert random.getstate() == before[2]


def test_mac_depends_on_key_and_data() -> None:
    """A digest of private data cannot be recomputed without the key."""
    assert len({streams.mac(KEY, b"a"), streams.mac(KEY, b"b"), streams.mac(bytes(32), b"a")}) == 3
