"""Everything that one run of the throughput benchmark found, and the issue's bars held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from suite.accountant import Evaluation
from suite.cases import DOCUMENTED, MOST_GATEWAYS
from suite.gate import Check
from suite.runs import Measured
from suite.startup import StartToExit
from suite.systems import Result


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was measured: the gate, cases by key, start to exit, transfer, and the accountant."""

    gate: tuple[Check, ...]
    cases: dict[str, dict[str, Measured]]
    start: StartToExit
    transfer: Result
    accountant: tuple[Evaluation, ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of the acceptance: `value` must be at least (or at most) `bar`; None: this run did not measure it."""

    number: str
    text: str
    value: float | None
    bar: float
    at_most: bool = False
    unit: str = "×"
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether it holds; None when it was not measured."""
        if self.value is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    @property
    def verdict(self) -> str:
        """Return "met", "MISSED" or why there is no verdict."""
        return {None: "not measured in this run", True: "met", False: "MISSED"}[self.met]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**self.__dict__, "met": self.met}


def bars(found: Findings) -> list[Bar]:
    """Return every bar of the issue with what was measured, in its order."""
    return [*_trainer(found), *_program(found), *_start(found), *_many(found), _transfer(found)]


def _trainer(found: Findings) -> list[Bar]:
    return [
        _ratio(found, "1", "sample-16", ("fedray trainer", "Opacus loop"), 7.0),
        _ratio(found, "1", "sample-256", ("fedray trainer", "Opacus loop"), 9.0),
        _ratio(found, "1", "sample-16", ("fedray trainer", "floor"), 0.2),
        _ratio(found, "1", "sample-256", ("fedray trainer", "floor"), 0.28),
    ]


def _program(found: Findings) -> list[Bar]:
    pfl = "pfl (fused Adam)"
    return [
        *(
            _ratio(found, "2", f"sample-{gateways}", ("fedray", system), 20.0)
            for gateways in (16, 256)
            for system in ("Flower + Opacus", DOCUMENTED)
        ),
        _ratio(found, "3", "cnn-16", ("fedray trainer", "Opacus loop"), 2.0),
        _ratio(found, "3", "transformer", ("fedray trainer", "Opacus loop"), 1.5),
        *(
            _ratio(found, "4", f"{level}-256", (system, pfl), 4.0)
            for level in ("none", "gateway")
            for system in ("fedray trainer", "fedray")
        ),
    ]


def _ratio(found: Findings, number: str, case: str, pair: tuple[str, str], bar: float) -> Bar:
    ours, theirs = pair
    systems = found.cases.get(case, {})
    text = f"{case}: {ours} over {theirs}"
    if ours not in systems or theirs not in systems:
        return Bar(number=number, text=text, value=None, bar=bar)
    mine, other = systems[ours], systems[theirs]
    each = [them / us for us, them in zip(mine.repeat_round_s, other.repeat_round_s, strict=True)]
    return Bar(
        number=number,
        text=text,
        value=mine.samples_per_s / other.samples_per_s,
        bar=bar,
        spread=(min(each), max(each)),
    )


def _start(found: Findings) -> list[Bar]:
    seconds = {name: row["median_s"] for name, row in found.start.as_dict().items()}
    ours, flower, alone = (seconds.get(name) for name in ("fedray", "flower", "ray_alone"))
    return [
        Bar(
            number="5",
            text="start to exit of the default job: fedray over Flower + Opacus",
            value=None if ours is None or flower is None else ours / flower,
            bar=0.6,
            at_most=True,
        ),
        Bar(
            number="5",
            text="start to exit of the default job: fedray above Ray with torch alone",
            value=None if ours is None or alone is None else ours - alone,
            bar=4.0,
            at_most=True,
            unit=" s",
        ),
    ]


def _many(found: Findings) -> list[Bar]:
    systems = {size: found.cases.get(f"lazy-{size}", {}).get("fedray") for size in (16, 256, MOST_GATEWAYS)}
    few, some, most = systems.values()
    memory = cost = None
    if few is not None and some is not None and most is not None:
        memory = most.median("own_peak_rss_mb") - few.median("own_peak_rss_mb")
        cost = (most.round_s / MOST_GATEWAYS) / (some.round_s / 256)
    text = f"{MOST_GATEWAYS:,} gateways"
    return [
        Bar(
            number="6",
            text=f"{text}: driver's peak memory above that of 16",
            value=memory,
            bar=200.0,
            at_most=True,
            unit=" MB",
        ),
        Bar(number="6", text=f"{text}: seconds per gateway over those of 256", value=cost, bar=1.3, at_most=True),
    ]


def _transfer(found: Findings) -> Bar:
    ours, memcpy = found.transfer["bytes_per_s"], found.transfer["memcpy_bytes_per_s"]
    text = "broadcast and gather of 25 MB, 2 actors: bytes/s over memcpy's"
    return Bar(number="7", text=text, value=ours / memcpy, bar=0.5)
