"""Each parser, fuzzed; `benchmarks/fuzz.py` runs 100,000 cases of each."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hardening.parsers import PARSERS, check, damaged

CASES = int(os.environ.get("FEDRAY_FUZZ_CASES", "150"))


@pytest.mark.parametrize("name", PARSERS)
def test_parser_takes_or_refuses_anything(name: str) -> None:
    data, _ = PARSERS[name]

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(data))
    def fuzz(found: bytes) -> None:
        check(name, found)

    fuzz()


@pytest.mark.parametrize("name", PARSERS)
def test_parser_takes_what_is_whole(name: str) -> None:
    data, parser = PARSERS[name]
    parser(data)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None, database=None)
def test_parsers_take_or_refuse_noise(data: bytes) -> None:
    for name in PARSERS:
        check(name, data)
