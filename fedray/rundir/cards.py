"""What a run directory says about the run: config.json, the privacy card, and the card in plain words."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from fedray.config.files import FORMAT
from fedray.config.settings import RunConfig
from fedray.privacy.accounting import Charges, Guarantee
from fedray.privacy.levels import Unit, cohort_is_secret, level_of
from fedray.privacy.spec import PrivacySpec

_WEAK_EPSILON = 20.0
_PACKAGES = ("fedray", "torch", "numpy", "opacus", "dp-accounting", "ray", "cryptography", "safetensors")
_MODEL_PACKAGES = ("transformers", "peft")  # that models may be built from; named where they are installed


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_MODEL_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in _PACKAGES:
                found[package] = "not installed"
    return found


def config_card(config: RunConfig, spec: PrivacySpec, placement: str | None = None) -> dict[str, Any]:
    """Return the content of config.json: format, every setting resolved, nominal shard size, placement, versions, machine.

    With the nominal shard size epsilon follows from this file and the ledger alone.
    """
    resolved = config.as_dict()
    if level_of(spec).is_private:
        resolved["noise_multiplier"] = spec.noise_multiplier
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {
        "format": FORMAT,
        "config": resolved,
        "nominal_records": round(spec.batch_size / spec.sample_rate),
        "least_noise_scale": spec.noise_shape.least,
        "placement": placement,
        "versions": versions(),
        "machine": machine,
    }


def _noise_source(spec: PrivacySpec, device: str) -> str:
    if device == "cuda" and not level_of(spec).central_noise:
        return "the GPU's Philox generator, seeded per gateway and step with 63 bits (weaker than AES)"
    return "AES-256-CTR keystream, float32 normals by Box-Muller, radius from 64-bit words"


def not_covered(spec: PrivacySpec, disjoint: bool, extended: bool) -> list[str]:
    """Return what no guarantee of the run covers, in plain words."""
    lines = [
        "other runs on the same records, and settings that were tuned on private data",
        "whoever holds the root key or the memory of the driver or an actor (the simulator's driver holds them all); "
        "an unfinished run directory holds the round key",
        "the partition of the data (neighbours are defined after it; Dirichlet partitions read labels) and errors found "
        "while data are checked",
        "timings and failures that depend on data",
        "floating-point attacks (Mironov 2012): the noise is float32",
        "the computational security of AES, on which the noise rests, and the tail of the noise beyond 9.3 standard "
        "deviations, which is cut",
    ]
    if level_of(spec).local == "record":
        lines.append("a gateway as a whole, or a person who has several records")
    if not disjoint:
        lines.append("records that several gateways hold: shards are assumed to be disjoint")
    if level_of(spec).central_noise:
        lines.append("the orchestrator itself: it sees updates before noise is added")
    if extended:
        lines.append("the choice to add rounds: they were added after results had been seen")
    if spec.arrival_may_depend_on_data:
        lines.append("which gateways were dropped: failures and time-outs may depend on data")
    if cohort_is_secret(spec) and not spec.arrival_may_depend_on_data:
        lines.append("whoever reads private.jsonl or the round key: they tell who took part, which is assumed secret")
    if spec.weights == "records":
        lines.append("the number of records of each gateway: weights reveal it")
    return lines


def privacy_card(
    config: RunConfig,
    spec: PrivacySpec,
    charges: Charges,
    guarantees: Sequence[Guarantee],
    *,
    disjoint: bool,
    isolation: str,
    rounds: int,
    extended: bool,
    incomplete: Sequence[int],
    device: str,
    digests: dict[str, str],
) -> dict[str, Any]:
    """Return the content of privacy.json.

    Args:
        config: The run's settings.
        spec: The public constants.
        charges: What the ledger charged to the most charged gateway.
        guarantees: What holds after them.
        disjoint: Whether fedray cut the shards itself.
        isolation: How records were kept apart, see `fedray.training.engines.Isolation`.
        rounds: Finished rounds.
        extended: Whether rounds were added to a finished run.
        incomplete: Rounds in which gateways were left out.
        device: Kind of device that gateways trained on.
        digests: Of the files that the card speaks of.
    """
    seeded = config.run.seed is not None
    uncovered = not_covered(spec, disjoint, extended)
    if incomplete:
        rounds_named = ", ".join(map(str, incomplete))
        uncovered.append(f"what may have made gateways fail, who were left out (and charged) in round {rounds_named}")
    return {
        "noise_level": spec.noise_level,
        "noise_multiplier": spec.noise_multiplier if level_of(spec).is_private else None,
        "clip_norm": spec.clip_norm if level_of(spec).is_private else None,
        "sample_rate": spec.sample_rate,
        "batch_size": spec.batch_size,
        "local_steps": spec.local_steps,
        "rounds": rounds,
        "steps": charges.steps,
        "delta": spec.delta,
        "guarantees": [guarantee.as_dict() for guarantee in guarantees],
        "isolation": isolation,
        "rng": {
            "noise": _noise_source(spec, device),
            "root_key": "from --seed: simulation only, the noise is predictable" if seeded else "operating system",
            "simulation_only": seeded,
        },
        "treated_as_public": [
            "number of gateways, and of classes",
            "nominal shard size (training records / gateways, or --samples-per-gateway)",
            "batch size, sample rate and number of steps",
            "model, initial parameters and the held-out data",
        ],
        "not_covered": uncovered,
        "versions": versions(),
        "digests": digests,
    }


def sentence(guarantee: Guarantee) -> str:
    """Return a guarantee in words that need no background in privacy."""
    change = {
        ("record", "add-or-remove"): "one record is in the data or not",
        ("record", "zero-out"): "one record counts or is blanked out",
        ("gateway", "replace"): "a gateway holds its own data or any other",
        ("gateway", "zero-out"): "a gateway takes part with its data or stays silent",
    }[guarantee.unit, guarantee.adjacency]
    if guarantee.epsilon <= _WEAK_EPSILON:
        factor = f"by at most a factor of {math.exp(guarantee.epsilon):.3g}"
    else:
        factor = f"by up to a factor of 10^{guarantee.epsilon / math.log(10):.0f}, which is hardly a promise"
    mu = "" if guarantee.mu is None else f", mu {format_epsilon(guarantee.mu)}"
    return (
        f"epsilon {format_epsilon(guarantee.epsilon)} per {guarantee.unit} ({guarantee.adjacency}, delta "
        f"{guarantee.delta:g}{mu}): whether {change} changes the odds of whatever an observer may see {factor} "
        f"(and with probability {guarantee.delta:g} by more). Observer: {guarantee.observer}."
    )


def delta_warnings(units: Iterable[Unit], delta: float, records: int, gateways: int) -> list[str]:
    """Return a sentence for each protected unit of whom delta alone would allow to publish one.

    Args:
        units: Of the guarantees.
        delta: Of every guarantee.
        records: Nominal shard size: a shard is the smallest data set that a promise per record speaks of.
        gateways: How many there are.
    """
    found = []
    for unit in dict.fromkeys(units):
        count, whole = (records, f"a gateway's {records:,} records") if unit == "record" else (gateways, "all gateways")
        if delta >= 1 / count:
            found.append(
                f"--delta is {delta:g}, not below 1/{count:,}: whoever published one of {whole}, drawn at random, would keep "
                f"a promise per {unit} with such a delta; use one well below {1 / count:.2g}."
            )
    return found


def format_epsilon(epsilon: float) -> str:
    """Return an epsilon, or a mu, with four significant digits, rounded up."""
    if epsilon == 0:
        return "0"
    digits = max(0, 3 - _leading_exponent(epsilon))
    scaled = epsilon * 10**digits
    rounded = -(-scaled // 1) / 10**digits
    return f"{rounded:.{digits}f}"


def _leading_exponent(value: float) -> int:
    """Return the exponent of the leading decimal digit."""
    return int(f"{value:e}".partition("e")[2])


def digest(data: bytes) -> str:
    """Return the SHA-256 of public bytes."""
    return hashlib.sha256(data).hexdigest()
