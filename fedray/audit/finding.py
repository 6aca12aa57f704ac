"""The result of one attack, as audit.json holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedray.audit.bounds import ALPHA
from fedray.privacy.levels import Adjacency, Unit
from fedray.privacy.spec import NoiseLevelName

Verdict = Literal["VIOLATED", "consistent", "powerless", "report"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One attack's result.

    Args:
        name: Of the attack.
        level: The noise level under attack.
        unit: Whom the claim protects.
        adjacency: The claim's neighbouring relation.
        measure: What claim and bound are measured in: "mu", "rate", "correlation", "C" (clip norms), ….
        claim: The most that may be seen, rounding of float32 included.
        lower_bound: The least leak that the attack proved, in the same measure.
        confidence: Of the bound; the rest is the chance of a false alarm. 1 for comparisons without chance.
        smallest_leak_caught: Factor above the claim (where the claim is 0: value of the measure) that this attack, as it is
            played here, catches with probability 0.99; None when it would catch nothing, or is a report.
        gate: Whether a bound above the claim is a violation; False for a report.
        text: The attack in plain words.
    """

    name: str
    level: NoiseLevelName
    unit: Unit
    adjacency: Adjacency
    measure: str = "mu"
    claim: float
    lower_bound: float
    confidence: float = 1 - ALPHA
    smallest_leak_caught: float | None
    gate: bool = True
    text: str

    @property
    def violated(self) -> bool:
        """Whether the attack refutes the claim."""
        return self.gate and self.lower_bound > self.claim

    @property
    def verdict(self) -> Verdict:
        """Return what the attack says; one that cannot fail at this setting is powerless and says nothing."""
        if not self.gate:
            return "report"
        if self.violated:
            return "VIOLATED"
        return "powerless" if self.smallest_leak_caught is None else "consistent"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as audit.json holds them."""
        return {**asdict(self), "verdict": self.verdict}
