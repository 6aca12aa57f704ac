"""The four noise levels: each one's law and what it promises, in one place.

A level says where the local step clips (`local`), whether the orchestrator adds noise (`central_noise`) and which
claims hold. A claim is an accountant's event per local step or per round; `fedray.privacy.accounting` turns the number
of charged events into epsilon.

Guarantees (sigma = noise multiplier, q = Poisson rate, T = charged local steps, R = charged rounds):

- none: no promise.
- sample: each record's gradient is clipped to C and noise N(0, sigma²C²) is added to the sum, so a step is a
  Poisson-subsampled Gaussian (Abadi et al. 2016). Gateways hold disjoint records: the run costs what its most charged
  gateway costs.
- batch: the batch's gradient is clipped to C as a whole. Another shard moves it by at most 2C, silence (zero-out) by C,
  at every step, without amplification: mu = 2·sqrt(T)/sigma and sqrt(T)/sigma (Dong et al. 2019). One record moves it by
  at most 2C, and only when it is in the batch: a subsampled Gaussian of multiplier sigma/2.
- gateway: each update is clipped to C and noise N(0, sigma²C²) is added once to the sum: mu = sqrt(R)/sigma when a
  gateway is left out (zero-out), 2·sqrt(R)/sigma when its shard is replaced, which bounds one record as well. With secret
  Poisson participation each round is a subsampled Gaussian, and every gateway is charged every round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedray.privacy.spec import NoiseLevelName, PrivacySpec

Unit = Literal["record", "gateway"]
Adjacency = Literal["add-or-remove", "replace", "zero-out"]
EVERYBODY = "everybody, the orchestrator included"
OUTSIDE = "other gateways and whoever receives the model; the orchestrator is trusted"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One release as the accountant sees it: a Gaussian of this noise multiplier, Poisson-subsampled at `rate`.

    Args:
        noise_multiplier: Noise standard deviation over the sensitivity of the claim's adjacency.
        rate: Poisson rate; 1 means no amplification.
        per: What is counted, "step" (local step) or "round".
        replaces: Whether the sampled contribution is exchanged for another one of norm 1 (in units of the multiplier)
            rather than present or absent; with rate 1 that halves the multiplier.
    """

    noise_multiplier: float
    rate: float
    per: Literal["step", "round"]
    replaces: bool = False


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Whom a level protects, under which neighbouring relation, against whom, and through which event."""

    unit: Unit
    adjacency: Adjacency
    observer: str
    mechanism: str
    event: Event


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """One of the four laws.

    Args:
        name: The value of --noise-level.
        local: What a local step clips: each "record", the whole "batch", or nothing ("plain").
        central_noise: Whether updates are clipped and the orchestrator adds noise to their sum.
    """

    name: NoiseLevelName
    local: Literal["plain", "record", "batch"]
    central_noise: bool

    @property
    def is_private(self) -> bool:
        """Whether the level promises anything."""
        return self.local != "plain" or self.central_noise

    def claims(self, spec: PrivacySpec) -> tuple[Claim, ...]:
        """Return the level's claims; the first is what --target-epsilon and --max-epsilon mean."""
        return _CLAIMS[self.name](spec)

    def noise_to_signal(self, spec: PrivacySpec, num_params: int) -> float:
        """Return the norm of the noise over the largest possible norm of what it hides."""
        noise: float = spec.charged_multiplier * num_params**0.5
        return noise / {"record": spec.batch_size, "batch": 1, "plain": spec.expected_cohort}[self.local]


def _no_claims(spec: PrivacySpec) -> tuple[Claim, ...]:
    return ()


def _record_adjacency(spec: PrivacySpec) -> Adjacency:
    # Weights by record count tell how many records there are, so only the record's content is hidden.
    return "zero-out" if spec.weights == "records" else "add-or-remove"


def _sample_claims(spec: PrivacySpec) -> tuple[Claim, ...]:
    sigma, rate = spec.charged_multiplier, spec.sample_rate
    return (
        Claim(
            unit="record",
            adjacency=_record_adjacency(spec),
            observer=EVERYBODY,
            mechanism=f"Poisson-subsampled Gaussian, multiplier {sigma:g}, rate {rate:g}, composed over local steps; "
            "maximum over gateways (disjoint shards)",
            event=Event(noise_multiplier=sigma, rate=rate, per="step"),
        ),
    )


def _batch_claims(spec: PrivacySpec) -> tuple[Claim, ...]:
    sigma = spec.charged_multiplier
    # Weights by record count are not noised.
    alike = "; among shards of the same number of records, which the weights tell" if spec.weights == "records" else ""
    return (
        Claim(
            unit="gateway",
            adjacency="replace",
            observer=EVERYBODY,
            mechanism=f"Gaussian, sensitivity 2C, multiplier {sigma:g}, composed over local steps, no amplification{alike}",
            event=Event(noise_multiplier=sigma, rate=1.0, per="step", replaces=True),
        ),
        Claim(
            unit="gateway",
            adjacency="zero-out",
            observer=EVERYBODY,
            mechanism=f"Gaussian, sensitivity C, multiplier {sigma:g}, composed over local steps, no amplification",
            event=Event(noise_multiplier=sigma, rate=1.0, per="step"),
        ),
        Claim(
            unit="record",
            adjacency=_record_adjacency(spec),
            observer=EVERYBODY,
            mechanism=f"Poisson-subsampled Gaussian, sensitivity 2C, multiplier {sigma:g}, rate {spec.sample_rate:g}, "
            "composed over local steps; maximum over gateways (disjoint shards)",
            event=Event(noise_multiplier=sigma / 2, rate=spec.sample_rate, per="step"),
        ),
    )


def _gateway_claims(spec: PrivacySpec) -> tuple[Claim, ...]:
    sigma = spec.charged_multiplier
    # Who arrives may depend on data when gateways can be dropped: then participation amplifies nothing.
    rate = spec.participation if cohort_is_secret(spec) and not spec.arrival_may_depend_on_data else 1.0
    sampled = f"Poisson participation, rate {rate:g}, " if rate < 1 else ""
    replace = Event(noise_multiplier=sigma, rate=rate, per="round", replaces=True)
    return (
        Claim(
            unit="gateway",
            adjacency="zero-out",
            observer=OUTSIDE,
            mechanism=f"{sampled}Gaussian on the sum of clipped updates, sensitivity C, multiplier {sigma:g}, "
            "composed over rounds",
            event=Event(noise_multiplier=sigma, rate=rate, per="round"),
        ),
        Claim(
            unit="gateway",
            adjacency="replace",
            observer=OUTSIDE,
            mechanism=f"{sampled}Gaussian on the sum of clipped updates, sensitivity 2C, multiplier {sigma:g}, "
            "composed over rounds",
            event=replace,
        ),
        Claim(
            unit="record",
            adjacency="add-or-remove",
            observer=OUTSIDE,
            mechanism="bounded by replacing the record's whole gateway: "
            f"{sampled}Gaussian, sensitivity 2C, multiplier {sigma:g}, composed over rounds",
            event=replace,
        ),
    )


_CLAIMS = {"none": _no_claims, "sample": _sample_claims, "batch": _batch_claims, "gateway": _gateway_claims}

LEVELS: dict[NoiseLevelName, NoiseLevel] = {
    "none": NoiseLevel(name="none", local="plain", central_noise=False),
    "sample": NoiseLevel(name="sample", local="record", central_noise=False),
    "batch": NoiseLevel(name="batch", local="batch", central_noise=False),
    "gateway": NoiseLevel(name="gateway", local="plain", central_noise=True),
}


def cohort_is_secret(spec: PrivacySpec) -> bool:
    """Tell whether who takes part is kept secret, so that the `gateway` level may claim amplification by participation."""
    return level_of(spec).central_noise and spec.participation < 1.0


def level_of(spec: PrivacySpec) -> NoiseLevel:
    """Return the law of a spec's noise level."""
    return LEVELS[spec.noise_level]
