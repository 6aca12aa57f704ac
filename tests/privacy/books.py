"""Proofs of the books (T11): what is charged, and the epsilon that is printed for it; see `tests.privacy.proofs`."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedray import Orchestrator, RunConfig
from fedray.privacy import accounting
from fedray.privacy.accounting import Charges
from fedray.privacy.ledger import Ledger, read
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.tally import Ranges
from tests.privacy.worlds import data_free_run, model_of, product_loss, random_shard, spec_of


@lru_cache(maxsize=128)
def independent_epsilon(sigma: float, rate: float, count: int, delta: float) -> float:
    """Return epsilon by dp-accounting's own PLD accountant, or from exact GDP in 50 digits where nothing is sampled."""
    if rate >= 1.0:
        return gdp_epsilon(math.sqrt(count) / sigma, delta)
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def gdp_delta(epsilon: float, mu: float) -> float:
    """Return delta(epsilon) = Phi(−eps/mu + mu/2) − e^eps · Phi(−eps/mu − mu/2) in 50 digits."""
    import mpmath

    with mpmath.workdps(50):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return float(mpmath.ncdf(-e / m + m / 2) - mpmath.exp(e) * mpmath.ncdf(-e / m - m / 2))


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon with gdp_delta(epsilon, mu) ≤ delta, by bisection."""
    if gdp_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gdp_delta(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gdp_delta(middle, mu) > delta else (low, middle)
    return high


Expected = dict[tuple[str, str], tuple[float, float, int]]


def _guarantees_match(spec: PrivacySpec, charges: Charges, expected: Expected) -> None:
    found = {(str(g.unit), str(g.adjacency)): g.epsilon for g in accounting.guarantees(spec, charges)}
    assert list(found) == list(expected), f"guarantees are {list(found)}, must be {list(expected)}"
    for claim, (sigma, rate, count) in expected.items():
        truth = independent_epsilon(sigma, rate, count, spec.delta)
        assert abs(found[claim] - truth) <= 0.01 * truth, f"{claim}: epsilon {found[claim]:.4f}, truth is {truth:.4f}"


def sample_guarantees() -> None:
    """T11: the `sample` level's guarantee agrees with an independent accountant within 1 %."""
    spec = spec_of("sample", noise_multiplier=1.0, sample_rate=0.1)
    _guarantees_match(spec, Charges(steps=100, rounds=5), {("record", "add-or-remove"): (1.0, 0.1, 100)})


def batch_guarantees() -> None:
    """T11: the `batch` level's three guarantees: 2C and C without amplification, and sigma/2 sampled per record."""
    spec = spec_of("batch", noise_multiplier=1.0, sample_rate=0.1)
    _guarantees_match(
        spec,
        Charges(steps=100, rounds=5),
        {
            ("gateway", "replace"): (0.5, 1.0, 100),
            ("gateway", "zero-out"): (1.0, 1.0, 100),
            ("record", "add-or-remove"): (0.5, 0.1, 100),
        },
    )


def gateway_guarantees() -> None:
    """T11: the `gateway` level's three guarantees, by rounds."""
    spec = spec_of("gateway", noise_multiplier=1.0, sample_rate=0.1)
    _guarantees_match(
        spec,
        Charges(steps=100, rounds=20),
        {
            ("gateway", "zero-out"): (1.0, 1.0, 20),
            ("gateway", "replace"): (0.5, 1.0, 20),
            ("record", "add-or-remove"): (0.5, 1.0, 20),
        },
    )


def secret_participation_guarantees() -> None:
    """T11: one round at participation .2: each claim is held against its hockey-stick integral, by quadrature.

    Replacing a sampled update is no add-or-remove at half the multiplier: both mixtures differ from the noise alone.
    """
    sigma, rate = 0.8, 0.2
    spec = spec_of("gateway", noise_multiplier=sigma, participation=rate)
    claims = accounting.guarantees(spec, Charges(steps=3, rounds=1))
    assert [(str(claim.unit), str(claim.adjacency)) for claim in claims] == [
        ("gateway", "zero-out"),
        ("gateway", "replace"),
        ("record", "add-or-remove"),
    ]
    for claim in claims:
        other = 0.0 if claim.adjacency == "zero-out" else -1.0
        true_delta = max(hockey_stick(claim.epsilon, rate, means, sigma) for means in ((1.0, other), (other, 1.0)))
        assert 0.95 * spec.delta <= true_delta <= spec.delta * (1 + 1e-5), (
            f"{claim.unit}, {claim.adjacency}: delta at epsilon {claim.epsilon:.4f} is {true_delta:.3g}"
        )


def hockey_stick(epsilon: float, rate: float, means: tuple[float, float], sigma: float) -> float:
    """Return the integral of max(0, p − e^eps·q), p and q mixtures of N(0, s²) and, with weight `rate`, N(mean, s²)."""
    from scipy import integrate

    def density(x: float, mean: float) -> float:
        return (1 - rate) * math.exp(-((x / sigma) ** 2) / 2) + rate * math.exp(-(((x - mean) / sigma) ** 2) / 2)

    edges = np.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 60)
    parts = [
        integrate.quad(
            lambda x: max(0.0, density(x, means[0]) - math.exp(epsilon) * density(x, means[1])),
            low,
            high,
            epsabs=1e-13,
            limit=200,
        )[0]
        for low, high in pairwise(edges)
    ]
    return math.fsum(parts) / (sigma * math.sqrt(2 * math.pi))


def arrivals_are_charged(out: Path) -> None:
    """T11: an attempt that may have been released never meets another set of gateways: that is a charge of its own."""
    path = out.with_suffix(".jsonl")

    def attempt(arrived: Ranges, everybody: bool = False) -> tuple[int, Charges]:
        ledger = read(path) if path.exists() else Ledger(path)  # another process each time
        charged = ledger.charge(round_index=1, gateways=((0, 3),), steps=2, level="gateway", inputs="same")
        assert charged == 0
        released = ledger.record_arrivals(
            round_index=1, attempt=0, arrived=arrived, label=repr(arrived), everybody=everybody, central_noise=True
        )
        return released, ledger.charges()

    one, two, three = (Charges(steps=2 * rounds, rounds=rounds) for rounds in (1, 2, 3))
    everybody: Ranges = ((0, 3),)
    assert attempt(everybody, everybody=True) == (0, one)
    assert attempt(everybody, everybody=True) == (0, one), "the same set is the same release"
    assert attempt(((0, 2),)) == (1, two), "attempt 0 may have been released with everybody"
    assert attempt(((0, 2),)) == (1, two), "the same set is the same release"
    assert attempt(((1, 3),)) == (2, three)
    path.unlink()
    first = Ledger(path)
    first.charge(round_index=1, gateways=everybody, steps=2, level="gateway", inputs="same")
    about = {"round_index": 1, "attempt": 0, "arrived": ((0, 2),), "label": repr(((0, 2),)), "central_noise": True}
    assert first.record_arrivals(everybody=False, **about) == 0, "nothing was released yet"  # type: ignore[arg-type]  # mixed
    assert attempt(((0, 2),)) == (0, one), "the same set is the same release"
    assert attempt(everybody, everybody=True) == (1, two), "attempt 0 may have been released without gateway 3"
    assert attempt(((1, 3),)) == (2, three)


def extension_is_charged_on_top(out: Path) -> None:
    """T11: rounds that are added to a finished run are charged on top of it, and epsilon is that of all rounds."""
    data_free_run(600, noise_level="gateway", rounds=2, lr=1e-30, seed=7, out=out).run()
    run = data_free_run(600, resume=out, rounds=5).run()
    first = run.privacy["guarantees"][0]
    truth = independent_epsilon(0.7, 1.0, 5, first["delta"])
    for found in (first["epsilon"], run.history[-1]["epsilon"]["gateway"]):
        assert abs(found - truth) <= 0.01 * truth, f"epsilon is {found:.4f}, truth is {truth:.4f}"


def run_charges(engine: str, level: str, out: Path) -> None:
    """T11, T3: a real run charges every started local step, empty batches included, and prints that epsilon.

    N = 20 and q = .1: an eighth of the batches are empty. Epsilon of each round comes from an independent accountant.
    """
    rounds, steps, sigma = 3, 4, 0.9
    shards = [(s.x.numpy(), s.y.numpy()) for s in (random_shard(20, seed=seed) for seed in range(3))]
    config = RunConfig().resolve(
        noise_level=level,  # type: ignore[arg-type]  # one of the literals
        rounds=rounds,
        local_steps=steps,
        batch_size=2,
        samples_per_gateway=20,
        noise_multiplier=sigma,
        seed=5,
        pool="inline",
        engine=engine,  # type: ignore[arg-type]  # one of the literals
        device="cpu",
        out=out,
    )
    run = Orchestrator(shards, model=lambda: model_of("mlp"), loss=product_loss, config=config).run()
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(line["round"], line["attempt"], line["steps"]) for line in lines] == [(r, 0, steps) for r in (1, 2, 3)]
    assert all(line["gateways"] == [[0, 2]] and line["level"] == level for line in lines)
    assert run.privacy["steps"] == rounds * steps
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        done = record["round"]
        truth = {
            "sample": {"record": (sigma, 0.1, done * steps)},
            "batch": {"gateway": (sigma / 2, 1.0, done * steps), "record": (sigma / 2, 0.1, done * steps)},
            "gateway": {"gateway": (sigma, 1.0, done), "record": (sigma / 2, 1.0, done)},
        }[level]
        assert record["epsilon"].keys() == truth.keys()
        for unit, (multiplier, rate, count) in truth.items():
            expected = independent_epsilon(multiplier, rate, count, config.privacy.delta)
            assert abs(record["epsilon"][unit] - expected) <= 0.01 * expected, (
                f"round {done}: epsilon per {unit} is {record['epsilon'][unit]:.4f}, truth is {expected:.4f}"
            )
