"""What a long run keeps: memory and files that do not grow with rounds or gateways beyond what must be told apart."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import pytest

from fedray.privacy.ledger import Ledger, read
from fedray.rundir.identity import grouped


def _charge(ledger: Ledger, rounds: range) -> None:
    for index in rounds:
        ledger.charge(round_index=index, gateways=((0, 99),), steps=4, level="sample", inputs=f"{index:064x}")
        ledger.forget(index)


def test_ledger_holds_no_more_after_many_rounds() -> None:
    ledger = Ledger(None)
    _charge(ledger, range(1, 200))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    _charge(ledger, range(200, 3000))
    gc.collect()  # encoders of JSON are circular
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000  # bytes, of 2,800 rounds
    assert len(ledger) == 2999
    assert ledger.charges().rounds == 2999


def test_ledger_that_forgot_says_what_one_that_did_not_says(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    _charge(ledger, range(1, 9))
    ledger.extend(finished=8, rounds=12, level="sample", root_commitment="00")
    _charge(ledger, range(9, 13))
    whole = read(tmp_path / "ledger.jsonl")
    assert (len(ledger), ledger.head, ledger.extensions) == (len(whole), whole.head, whole.extensions)
    assert ledger.charges() == whole.charges()
    assert ledger.charges(through=11) == whole.charges(through=11)
    again = dict(round_index=12, gateways=((0, 99),), steps=4, level="sample", inputs=f"{12:064x}")
    assert ledger.charge(**again) == whole.charge(**again) == 0  # type: ignore[arg-type]  # mixed values
    assert ledger.holds(len(whole), whole.head)
    assert not ledger.holds(3, whole.head)


@pytest.mark.parametrize("gateways", [10, 1024, 1025, 100_000])
def test_identity_is_bounded_and_still_sees_every_shard(gateways: int) -> None:
    identity = {"model": "m", **{f"shard {index}": f"{index:064x}" for index in range(gateways)}}
    found = grouped(identity)
    assert len(found) <= 1025
    assert len(json.dumps(found)) < 120_000
    other = grouped({**identity, f"shard {gateways - 1}": "changed"})
    assert [name for name in found if found[name] != other[name]] == [list(found)[-1]]
    assert grouped(found) == found
