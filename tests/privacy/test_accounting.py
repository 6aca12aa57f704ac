"""T11: every epsilon is true: published values, closed forms, three independent accountants."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.privacy import accounting, levels
from fedray.privacy.accounting import Charges
from fedray.privacy.levels import Event
from tests.privacy import books
from tests.privacy.worlds import spec_of


def step_event(sigma: float, rate: float) -> Event:
    """Return a local step's event."""
    return Event(noise_multiplier=sigma, rate=rate, per="step")


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "epsilon"),
    [
        (1, 0.01, 1000, 1e-5, 1.828),
        (1, 0.1, 100, 1e-5, 7.047),
        (1.1, 256 / 60000, 14040, 1e-5, 2.380),
        (1, 1, 10, 1e-5, 17.857),
        (1, 1 / 64, 160, 1e-5, 1.323),
        (1, 1 / 16, 160, 1e-5, 5.418),
        (0.5, 0.1, 100, 1e-5, 31.4),  # `batch` per record at sigma 1
    ],
)
def test_epsilon_has_the_published_value(sigma: float, rate: float, steps: int, delta: float, epsilon: float) -> None:
    """Spot values of privacy.md, sections 2 and 4, to their last digit."""
    assert accounting.epsilon_of(step_event(sigma, rate), steps, delta) == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1, 284), (2, 92), (5, 24), (10, 10), (20, 4.4)])
def test_epsilon_of_batch_replace_has_the_table_value(sigma: float, epsilon: float) -> None:
    """privacy.md, section 2: `batch`, replace, T = 100, delta = 1e-5."""
    spec = spec_of("batch", noise_multiplier=sigma)
    assert accounting.first_epsilon(spec, Charges(steps=100, rounds=1)) == pytest.approx(epsilon, rel=0.03)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1, 25.9), (5, 3.3)])
def test_epsilon_of_gateway_zero_out_has_the_table_value(sigma: float, epsilon: float) -> None:
    """privacy.md, section 2: `gateway`, zero-out, R = 20, delta = 1e-4."""
    spec = spec_of("gateway", noise_multiplier=sigma, delta=1e-4)
    assert accounting.first_epsilon(spec, Charges(steps=1, rounds=20)) == pytest.approx(epsilon, rel=0.02)


@pytest.mark.parametrize(("steps", "sigma"), [(1, 1.2), (10, 3.8), (100, 12), (500, 27)])
def test_calibrate_has_the_table_value(steps: int, sigma: float) -> None:
    """privacy.md, section 2: sigma that brings `batch`, replace, to epsilon 8 at delta = 1e-5."""
    found = accounting.calibrate(spec_of("batch"), Charges(steps=steps, rounds=1), 8.0)
    assert found == pytest.approx(sigma, rel=0.05)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mu=st.floats(1e-3, 60), exponent=st.floats(-14.5, -1))
def test_gaussian_epsilon_is_exact(mu: float, exponent: float) -> None:
    """The closed form agrees with 50-digit arithmetic down to delta = 1e-14.5, never from below."""
    delta = 10**exponent
    found = accounting.gaussian_epsilon(mu, delta)
    if found == 0.0:
        assert books.gdp_delta(0.0, mu) <= delta * (1 + 1e-9)
        return
    assert found == pytest.approx(books.gdp_epsilon(mu, delta), rel=1e-6, abs=1e-9)


def test_gaussian_epsilon_of_nothing_is_zero() -> None:
    """Edge case of `gaussian_epsilon`: mu = 0 gives 0."""
    assert accounting.gaussian_epsilon(0.0, 1e-5) == 0.0
    assert accounting.epsilon_of(step_event(1.0, 0.1), 0, 1e-5) == 0.0


def test_epsilon_grows_with_steps() -> None:
    """More steps never cost less, sampled or not."""
    for rate in (0.02, 1.0):
        curve = [accounting.epsilon_of(step_event(1.0, rate), steps, 1e-5) for steps in (1, 2, 5, 20, 100, 400)]
        assert all(later > earlier for earlier, later in itertools.pairwise(curve))


def test_epsilon_falls_with_noise_and_grows_with_rate() -> None:
    """Less noise or a higher rate never costs less."""
    by_sigma = [accounting.epsilon_of(step_event(sigma, 0.1), 50, 1e-5) for sigma in (0.3, 0.5, 1.0, 2.0, 8.0)]
    by_rate = [accounting.epsilon_of(step_event(1.0, rate), 50, 1e-5) for rate in (0.01, 0.1, 0.5, 0.9, 1.0)]
    assert by_sigma == sorted(by_sigma, reverse=True)
    assert by_rate == sorted(by_rate)


def test_epsilon_meets_the_closed_form_as_the_rate_goes_to_one() -> None:
    """The PLD at q = 1 − 1e-6 agrees with exact GDP within 0.1 %, and stays at or below it plus that."""
    for sigma, steps in ((1.0, 10), (3.0, 40)):
        sampled = accounting.epsilon_of(step_event(sigma, 1 - 1e-6), steps, 1e-5)
        assert sampled == pytest.approx(books.gdp_epsilon(math.sqrt(steps) / sigma, 1e-5), rel=1e-3)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 1 / 64, 160), (1.0, 0.1, 100), (2.0, 0.05, 1000)])
def test_epsilon_is_at_most_renyi(sigma: float, rate: float, steps: int) -> None:
    """The PLD is never looser than Rényi accounting (Mironov et al. 2019, through dp-accounting)."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    assert accounting.epsilon_of(step_event(sigma, rate), steps, 1e-5) <= accountant.get_epsilon(1e-5)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 1 / 64, 160), (1.0, 0.1, 100), (1.5, 0.02, 500)])
def test_epsilon_agrees_with_opacus_prv(sigma: float, rate: float, steps: int) -> None:
    """Opacus' PRV accountant (Gopi et al. 2021) agrees within 0.02."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    assert accounting.epsilon_of(step_event(sigma, rate), steps, 1e-5) == pytest.approx(
        accountant.get_epsilon(1e-5), abs=0.02
    )


@pytest.mark.parametrize("seed", range(8))
def test_epsilon_agrees_with_dp_accounting(seed: int) -> None:
    """dp-accounting's own PLD accountant agrees within 1 % at random settings (grid of its own)."""
    rng = np.random.default_rng(seed)
    sigma, rate = float(rng.uniform(0.5, 3)), float(10 ** rng.uniform(-2.5, -0.2))
    steps, delta = int(10 ** rng.uniform(0, 2.7)), float(10 ** rng.uniform(-7, -4))
    found = accounting.epsilon_of(step_event(sigma, rate), steps, delta)
    assert found == pytest.approx(books.independent_epsilon(sigma, rate, steps, delta), rel=0.01, abs=1e-3)


def test_epsilon_of_little_noise_takes_little_memory() -> None:
    """A tiny sigma has losses in the thousands; the grid is bounded (it once took 4 GB), the value still true.

    A step whose record is in is worth about GDP; so sampled T times it lies below T unsampled steps, and above one.
    """
    found = accounting.epsilon_of(step_event(0.02, 0.1), 100, 1e-5)
    assert books.gdp_epsilon(1 / 0.02, 1e-5) < found < books.gdp_epsilon(math.sqrt(100) / 0.02, 1e-5)


def test_epsilon_is_finite_at_the_smallest_delta() -> None:
    """No infinity reaches a JSON file, even at the smallest delta that RunConfig allows."""
    for rate in (1 / 64, 1.0):
        assert math.isfinite(accounting.epsilon_of(step_event(1.0, rate), 1000, 1.1e-15))


def test_guarantees_of_none_are_empty() -> None:
    """Level `none` promises nothing."""
    assert accounting.guarantees(spec_of("none"), Charges(steps=5, rounds=5)) == ()
    assert accounting.epsilon_by_unit(spec_of("none"), Charges(steps=5, rounds=5)) == {}


@pytest.mark.parametrize(
    ("level", "mus"),
    [("sample", [None]), ("batch", [2 * math.sqrt(24) / 3, math.sqrt(24) / 3, None]), ("gateway", [1.0, 2.0, 2.0])],
)
def test_guarantees_name_mu_where_the_curve_is_gaussian(level: str, mus: list[float | None]) -> None:
    """mu = sqrt(T) · sensitivity / sigma; every (epsilon, delta) of the claim follows from it."""
    for delta in (1e-5, 1e-9):
        spec = spec_of(level, noise_multiplier=3.0, delta=delta)
        found = accounting.guarantees(spec, Charges(steps=24, rounds=9))
        assert [guarantee.mu for guarantee in found] == [mu if mu is None else pytest.approx(mu) for mu in mus]
        for guarantee in found:
            if guarantee.mu is not None:
                assert guarantee.epsilon == pytest.approx(books.gdp_epsilon(guarantee.mu, delta), rel=1e-6)


def test_guarantees_name_no_mu_where_participation_is_sampled() -> None:
    """Edge case of `mu_of`: None at a rate below 1."""
    spec = spec_of("gateway", participation=0.5)
    assert {guarantee.mu for guarantee in accounting.guarantees(spec, Charges(steps=2, rounds=1))} == {None}


@pytest.mark.parametrize("level", ["sample", "batch", "gateway"])
def test_first_epsilon_is_the_first_guarantee(level: str) -> None:
    """Budgets, targets, metrics and card speak of the same number."""
    spec, charges = spec_of(level), Charges(steps=24, rounds=3)
    first = accounting.guarantees(spec, charges)[0]
    assert accounting.first_epsilon(spec, charges) == first.epsilon
    assert accounting.epsilon_by_unit(spec, charges)[first.unit] == first.epsilon


def test_guarantees_name_zero_out_when_weights_reveal_counts() -> None:
    """With --weights records a record's presence shows in the weight, so only its content is hidden."""
    for level in ("sample", "batch"):
        found = accounting.guarantees(spec_of(level, weights="records"), Charges(steps=2, rounds=1))
        assert {g.adjacency for g in found if g.unit == "record"} == {"zero-out"}


def test_batch_guarantee_says_that_weights_tell_record_counts() -> None:
    """A replaced gateway with another number of records would show in its weight, whatever the noise."""
    for weights, said in (("records", True), ("uniform", False)):
        found = accounting.guarantees(spec_of("batch", weights=weights), Charges(steps=2, rounds=1))
        (replaced,) = (g for g in found if (g.unit, g.adjacency) == ("gateway", "replace"))
        assert ("among shards of the same number of records" in replaced.mechanism) is said


def test_sample_guarantee_rejects_a_halved_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the `sample` guarantee is seen to fail: the `batch` reading of sigma/2 is off by a factor of four."""
    claims = levels._CLAIMS["sample"]

    def mutated(spec: object) -> tuple[levels.Claim, ...]:
        return tuple(
            replace(claim, event=replace(claim.event, noise_multiplier=claim.event.noise_multiplier / 2))
            for claim in claims(spec)  # type: ignore[arg-type]  # a PrivacySpec
        )

    monkeypatch.setitem(levels._CLAIMS, "sample", mutated)
    with pytest.raises(AssertionError):
        books.sample_guarantees()


@pytest.mark.parametrize(
    ("level", "target"), [("sample", 0.5), ("sample", 4.0), ("batch", 4.0), ("batch", 100.0), ("gateway", 2.0)]
)
def test_calibrate_hits_the_target_from_below(level: str, target: float) -> None:
    """The calibrated run ends at most at the target, and within half a percent of it."""
    spec, charges = spec_of(level, sample_rate=1 / 64), Charges(steps=160, rounds=10)
    sigma = accounting.calibrate(spec, charges, target)
    reached = accounting.first_epsilon(replace(spec, noise_multiplier=sigma), charges)
    assert 0.995 * target <= reached <= target


def test_calibrate_stops_where_no_noise_is_needed() -> None:
    """A delta above the chance to be sampled asks for no noise at all; 0.05 is returned, quickly."""
    spec = spec_of("sample", sample_rate=1e-6)
    assert accounting.calibrate(spec, Charges(steps=2, rounds=1), 1.0) == 0.05


def test_calibrate_refuses_the_impossible() -> None:
    """A target that no noise reaches is an error, not an endless loop."""
    with pytest.raises(ValueError, match="1e6"):
        accounting.calibrate(spec_of("batch", delta=1e-14), Charges(steps=10**6, rounds=10**6), 1e-6)


@pytest.mark.parametrize("level", ["sample", "batch", "gateway"])
def test_affordable_rounds_is_the_last_that_fits(level: str) -> None:
    """One round more would pass the budget, this many do not."""
    spec = spec_of(level, noise_multiplier=4.0)
    budget = 10.0
    rounds = accounting.affordable_rounds(spec, budget, 1000)

    def epsilon(count: int) -> float:
        return accounting.first_epsilon(spec, Charges(steps=count * spec.local_steps, rounds=count))

    assert 0 < rounds < 1000
    assert epsilon(rounds) <= budget < epsilon(rounds + 1)
