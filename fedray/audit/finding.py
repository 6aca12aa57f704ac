"""What one attack claims to have found, as audit.json holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedray.audit.bounds import ALPHA
from fedray.privacy.levels import Adjacency, Unit
from fedray.privacy.spec import NoiseLevelName


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One attack's result.

    Args:
        name: Of the attack.
        level: The noise level under attack.
        unit: Whom the claim protects.
        adjacency: The claim's neighbouring relation.
        measure: What claim and bound are measured in: "mu" or "epsilon".
        claim: What the mechanism may leak at most in the attacked steps.
        lower_bound: What it was proven to leak at least.
        confidence: Of the bound; the rest is the chance of a false alarm.
        smallest_leak_caught: Factor above the claim that would have been caught with probability 0.99; None when no leak
            would (too few runs for such a claim) or when the attack is a report.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as audit.json holds them."""
        return {**asdict(self), "verdict": "VIOLATED" if self.violated else "consistent" if self.gate else "report"}
