"""T11: the ledger charges before the work, once for equal inputs, again for others, and finds damage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import DamagedRunError
from fedray.privacy.accounting import Charges, first_epsilon
from fedray.privacy.ledger import Ledger, read
from fedray.privacy.tally import ranges_of
from tests.privacy.worlds import spec_of


def charge(
    ledger: Ledger, round_index: int, gateways: Sequence[int] = (0, 1, 2), inputs: str = "a", steps: int = 4
) -> int:
    """Charge an attempt at a round."""
    return ledger.charge(
        round_index=round_index, gateways=ranges_of(gateways), steps=steps, level="sample", inputs=inputs
    )


def test_charge_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    """The line is complete in the file before any work can start."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for index in (1, 2):
        charge(ledger, index)
        lines = path.read_text().splitlines()
        assert len(lines) == index
        assert json.loads(lines[-1])["round"] == index


def test_charge_of_equal_inputs_is_the_same_attempt(tmp_path: Path) -> None:
    """A repeated round with the same inputs has the same noise: no new attempt, no line, no charge."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert charge(ledger, 1) == 0
    before = path.read_bytes()
    assert charge(ledger, 1) == 0
    assert path.read_bytes() == before
    assert ledger.charges() == Charges(steps=4, rounds=1)


@pytest.mark.parametrize("changed", [{"inputs": "b"}, {"gateways": (0, 1)}])
def test_charge_of_other_inputs_is_a_new_attempt(tmp_path: Path, changed: dict[str, object]) -> None:
    """Other parameters or another cohort: fresh noise, and a charge on top of the first."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert charge(ledger, 1) == 0
    assert charge(ledger, 1, **changed) == 1  # type: ignore[arg-type]  # one of the arguments
    assert len(path.read_text().splitlines()) == 2
    assert ledger.charges() == Charges(steps=8, rounds=2)
    assert charge(ledger, 1) == 0, "the first inputs still mean the first attempt"
    assert ledger.charges() == Charges(steps=8, rounds=2)


def test_charges_survive_save_and_load(tmp_path: Path) -> None:
    """What was read back charges, chains and numbers attempts as what was written."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for index, inputs in ((1, "a"), (1, "b"), (2, "c")):
        charge(ledger, index, inputs=inputs)
    loaded = read(path)
    assert loaded.charges() == ledger.charges() == Charges(steps=12, rounds=3)
    assert (loaded.head, len(loaded), loaded.entries) == (ledger.head, len(ledger), ledger.entries)
    assert charge(loaded, 2, inputs="c") == 0
    assert charge(loaded, 2, inputs="d") == 1
    assert read(path).head == loaded.head


def test_charges_do_not_depend_on_order() -> None:
    """Epsilon is a function of what was charged, not of when."""
    spec = spec_of("sample")
    found = set()
    for order in permutations([(1, (0, 1), 3), (2, (1, 2), 5), (3, (0, 2), 2)]):
        ledger = Ledger(None)
        for index, gateways, steps in order:
            charge(ledger, index, gateways, steps=steps)
        found.add(first_epsilon(spec, ledger.charges()))
    assert len(found) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.sampled_from([1, 300])), max_size=12
    )
)
def test_charges_are_the_maximum_over_gateways(rounds: list[tuple[int, int, int, int]]) -> None:
    """Counted gateway by gateway the same maximum comes out, for small and for very large cohorts."""
    ledger = Ledger(None)
    steps: dict[int, int] = {}
    times: dict[int, int] = {}
    for index, (start, length, local_steps, scale) in enumerate(rounds, start=1):
        cohort = range(start * scale, (start + length + 1) * scale)
        charge(ledger, index, cohort, steps=local_steps)
        for gateway in cohort:
            steps[gateway] = steps.get(gateway, 0) + local_steps
            times[gateway] = times.get(gateway, 0) + 1
    expected = Charges(steps=max(steps.values(), default=0), rounds=max(times.values(), default=0))
    assert ledger.charges() == expected


@given(st.sets(st.integers(0, 60)))
def test_ranges_cover_exactly_the_gateways(gateways: set[int]) -> None:
    """Ranges are inclusive, sorted, disjoint and not adjacent."""
    ranges = ranges_of(sorted(gateways))
    assert [g for first, last in ranges for g in range(first, last + 1)] == sorted(gateways)
    assert all(one[1] + 1 < two[0] for one, two in pairwise(ranges))


def test_charge_under_writes_the_incarnation_before_the_first_charge_only(tmp_path: Path) -> None:
    """One line, ahead of the first charge that uses it; those before have none."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    charge(ledger, 1)
    ledger.charge_under("ab")
    assert len(path.read_text().splitlines()) == 1, "nothing was charged under it yet"
    charge(ledger, 2)
    charge(ledger, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["charge", "incarnation", "charge", "charge"]
    assert (lines[1]["inputs"], lines[1]["attempt"], lines[1]["steps"], lines[1]["gateways"]) == ("ab", 1, 0, [])
    assert [ledger.incarnation(index, 0) for index in (1, 2, 3)] == ["", "ab", "ab"]
    assert ledger.charges() == Charges(steps=12, rounds=3)


def test_charge_read_back_keeps_its_own_incarnation(tmp_path: Path) -> None:
    """Repeated with equal inputs it is what it was; with others, or later, it is the new process'."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge_under("ab")
    charge(ledger, 1)
    charge(ledger, 2)
    size = path.stat().st_size
    again = read(path)
    again.charge_under("cd")
    assert charge(again, 2) == 0
    assert again.incarnation(2, 0) == "ab"
    assert path.stat().st_size == size, "nothing new was charged, so nothing is written"
    assert charge(again, 2, inputs="b") == 1
    assert charge(again, 3) == 0
    once_more = read(path)
    assert [once_more.incarnation(*which) for which in ((1, 0), (2, 0), (2, 1), (3, 0))] == ["ab", "ab", "cd", "cd"]
    assert once_more.head == again.head


def test_an_attempt_that_another_arrival_charges_has_the_new_incarnation(tmp_path: Path) -> None:
    """The noise of a second arrived set is the new process', whoever charged the first."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge_under("ab")
    charge(ledger, 1)
    again = read(path)
    again.charge_under("cd")
    assert charge(again, 1) == 0
    attempt = again.record_arrivals(
        round_index=1, attempt=0, arrived=((0, 1),), label="mac", everybody=False, central_noise=True
    )
    assert (attempt, again.incarnation(1, attempt)) == (1, "cd")


def test_a_seeded_run_has_no_incarnation(tmp_path: Path) -> None:
    """It is the same whoever goes on with it, and so is its ledger."""
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        ledger = read(path) if path.exists() else Ledger(path)
        ledger.charge_under("")
        charge(ledger, 1)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["charge"]
    assert ledger.incarnation(1, 0) == ""


def test_an_incarnation_that_a_crash_left_without_a_charge_is_followed_by_another(tmp_path: Path) -> None:
    """A kill between the two lines costs nothing; what is charged later is the later process'."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.charge_under("ab")
    charge(ledger, 1)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    again = read(path)
    again.charge_under("cd")
    assert charge(again, 1) == 0
    assert again.incarnation(1, 0) == "cd"
    assert again.charges() == Charges(steps=4, rounds=1)


def written(path: Path, rounds: int = 4) -> list[bytes]:
    """Write a ledger and return its lines."""
    ledger = Ledger(path)
    for index in range(1, rounds + 1):
        charge(ledger, index, inputs=f"inputs {index}")
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_read_drops_a_torn_last_line(tmp_path: Path, kept: int) -> None:
    """A crash while writing leaves part of a line; its round never started, so it is dropped and rewritten."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:kept])
    ledger = read(path)
    assert len(ledger) == 3
    assert charge(ledger, 4, inputs="inputs 4") == 0
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_read_finds_a_missing_line(tmp_path: Path, missing: int) -> None:
    """A line that is gone breaks the chain (the last one is found through the checkpoint's length and head)."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    path.write_bytes(b"".join(line for index, line in enumerate(lines) if index != missing))
    with pytest.raises(DamagedRunError, match="line"):
        read(path)


def test_read_finds_swapped_and_doubled_lines(tmp_path: Path) -> None:
    """Order is part of the chain."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    for changed in ([0, 2, 1, 3], [0, 1, 1, 2, 3]):
        path.write_bytes(b"".join(lines[index] for index in changed))
        with pytest.raises(DamagedRunError):
            read(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_read_finds_any_changed_byte_before_the_last_line(
    tmp_path_factory: pytest.TempPathFactory, position: float, flip: int
) -> None:
    """Any single byte that changes in a line which others follow is found."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    lines = written(path)
    raw = bytearray(b"".join(lines))
    where = int(position * len(b"".join(lines[:-1])))
    raw[where] ^= flip
    path.write_bytes(raw)
    with pytest.raises(DamagedRunError):
        read(path)
