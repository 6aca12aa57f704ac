"""`fedray plan`: right for every level, unit and adjacency, whatever is solved for."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from fedray.commands.cli import main
from fedray.privacy.accounting import gaussian_epsilon
from fedray.privacy.planning import Setting, Unknown, solve

Output = pytest.CaptureFixture[str]


def _dp_accounting_epsilon(sigma: float, rate: float, count: int, delta: float) -> float:
    """Return what dp-accounting's own accountant says, with its own defaults."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    return float(PLDAccountant().compose(event, count).get_epsilon(delta))


def _random_setting(draw: random.Random) -> Setting:
    records = round(10 ** draw.uniform(2.5, 5))
    return Setting(
        noise_multiplier=draw.uniform(0.6, 4),
        rounds=draw.randint(1, 50),
        local_steps=draw.randint(1, 20),
        batch_size=max(1, round(records * 10 ** draw.uniform(-2.3, -0.3))),
        records=records,
        delta=10 ** draw.uniform(-7, -4),
    )


def _check_against_dp_accounting(setting: Setting) -> None:
    rate = setting.batch_size / setting.records
    right = _dp_accounting_epsilon(setting.noise_multiplier, rate, setting.rounds * setting.local_steps, setting.delta)
    assert setting.epsilon(0) == pytest.approx(right, rel=0.005), setting


@pytest.mark.parametrize("number", range(4))
def test_plan_agrees_with_dp_accounting(number: int) -> None:
    _check_against_dp_accounting(_random_setting(random.Random(f"plan {number}")))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4, 50))
def test_plan_agrees_with_dp_accounting_on_many_settings(number: int) -> None:
    _check_against_dp_accounting(_random_setting(random.Random(f"plan {number}")))


def test_plan_agrees_with_dp_accounting_on_participation() -> None:
    setting = Setting(noise_level="gateway", participation=0.1, rounds=40, noise_multiplier=0.9)
    assert setting.epsilon(0) == pytest.approx(_dp_accounting_epsilon(0.9, 0.1, 40, 1e-5), rel=0.005)


def test_plan_counts_a_batch_level_record_at_half_the_multiplier() -> None:
    setting = Setting(noise_level="batch", noise_multiplier=2.2)
    assert setting.epsilon(2) == pytest.approx(_dp_accounting_epsilon(1.1, 1 / 64, 160, 1e-5), rel=0.005)


@pytest.mark.parametrize("number", range(50))
def test_plan_agrees_with_the_closed_form(number: int) -> None:
    draw = random.Random(f"closed {number}")
    setting = replace(_random_setting(draw), noise_level=draw.choice(["batch", "gateway"]))
    count = setting.rounds * (setting.local_steps if setting.noise_level == "batch" else 1)
    for index, claim in enumerate(setting.claims):
        if claim.event.rate == 1:
            factor = 1 if claim.adjacency == "zero-out" else 2
            right = gaussian_epsilon(factor * math.sqrt(count) / setting.noise_multiplier, setting.delta)
            assert setting.epsilon(index) == pytest.approx(right, rel=1e-6)


def test_plan_meets_the_published_value() -> None:
    # Canonical DP-SGD tutorial setting (TensorFlow Privacy, MNIST): sigma 1.1, q 256/60000, 60 epochs.
    setting = Setting(noise_multiplier=1.1, batch_size=256, records=60000, rounds=14040, local_steps=1)
    assert setting.epsilon(0) == pytest.approx(2.380, abs=0.005)


@pytest.mark.parametrize("epsilon", [4.0, *(pytest.param(value, marks=pytest.mark.slow) for value in (0.5, 30.0))])
@pytest.mark.parametrize(("level", "index"), [("sample", 0), ("batch", 0), ("batch", 1), ("batch", 2), ("gateway", 0)])
def test_solve_finds_the_smallest_noise(level: str, index: int, epsilon: float) -> None:
    setting = Setting(noise_level=level)  # type: ignore[arg-type]  # one of the levels
    sigma = solve(setting, index, "noise_multiplier", epsilon)
    assert sigma is not None
    assert replace(setting, noise_multiplier=sigma).epsilon(index) <= epsilon
    assert replace(setting, noise_multiplier=sigma / 1.002).epsilon(index) > epsilon


@pytest.mark.parametrize(
    ("setting", "index", "unknown", "epsilon", "step"),
    [
        (Setting(), 0, "rounds", 4.0, 1),
        (Setting(), 0, "local_steps", 4.0, 1),
        (Setting(), 0, "batch_size", 4.0, 1),
        (Setting(), 0, "records", 4.0, -1),
        (Setting(noise_level="gateway"), 0, "rounds", 8.0, 1),
        (Setting(noise_level="gateway"), 2, "rounds", 30.0, 1),
        (Setting(noise_level="batch", noise_multiplier=10), 1, "local_steps", 8.0, 1),
    ],
)
def test_solve_finds_the_last_count_that_fits(
    setting: Setting, index: int, unknown: Unknown, epsilon: float, step: int
) -> None:
    found = solve(setting, index, unknown, epsilon)
    assert found is not None
    assert 1 <= found < math.inf
    assert replace(setting, **{unknown: int(found)}).epsilon(index) <= epsilon  # type: ignore[arg-type]  # by name
    assert replace(setting, **{unknown: int(found) + step}).epsilon(index) > epsilon  # type: ignore[arg-type]


def test_solve_finds_the_largest_participation() -> None:
    setting = Setting(noise_level="gateway")
    found = solve(setting, 0, "participation", 4.0)
    assert found is not None
    assert replace(setting, participation=found).epsilon(0) <= 4.0
    assert replace(setting, participation=found * 1.02).epsilon(0) > 4.0


@pytest.mark.parametrize("unknown", ["rounds", "records", "batch_size", "local_steps", "participation"])
def test_solve_says_when_nothing_helps(unknown: Unknown) -> None:
    assert solve(Setting(noise_level="batch"), 0, unknown, 1.0) is None


def test_solve_says_when_it_does_not_matter() -> None:
    assert solve(Setting(noise_level="gateway"), 0, "local_steps", 20.0) == math.inf
    assert solve(Setting(noise_level="gateway"), 0, "records", 20.0) == 0
    assert solve(Setting(delta=0.5, records=10**6, rounds=1, local_steps=1), 0, "noise_multiplier", 1.0) == 0


def _rows(printed: str, title: str) -> dict[tuple[str, str, str], list[str]]:
    """Return the numbers of a printed table by (level, unit, adjacency)."""
    table = printed.split(title, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {(cells[0], cells[1], cells[2]): cells[3:] for cells in map(str.split, table) if len(cells) > 3}


def test_plan_says_by_default_what_each_level_costs(capsys: Output) -> None:
    assert main(["plan"]) == 0
    rows = _rows(capsys.readouterr().out, "what each level costs")
    assert list(rows) == [
        ("sample", "record", "add-or-remove"),
        ("batch", "gateway", "replace"),
        ("batch", "gateway", "zero-out"),
        ("batch", "record", "add-or-remove"),
        ("gateway", "gateway", "zero-out"),
        ("gateway", "gateway", "replace"),
        ("gateway", "record", "add-or-remove"),
    ]
    costs = {key: float(cells[0]) for key, cells in rows.items()}
    # design.md, section 11: what the default job costs at sigma 1
    assert costs["sample", "record", "add-or-remove"] == pytest.approx(1.32, abs=0.01)
    assert costs["batch", "gateway", "replace"] == pytest.approx(427, abs=1)
    assert costs["gateway", "gateway", "zero-out"] == pytest.approx(17.86, abs=0.01)


def test_plan_prints_mu_where_the_curve_is_gaussian(capsys: Output) -> None:
    assert main(["plan", "--rounds", "9", "--local-steps", "4", "--sigma", "3"]) == 0
    printed = capsys.readouterr().out
    assert "mu" in printed.split("epsilon at sigma 3", 1)[1].split()[0]
    mus = {key[:3]: cells[1] for key, cells in _rows(printed, "what each level costs").items()}
    assert mus == {
        ("sample", "record", "add-or-remove"): "–",
        ("batch", "gateway", "replace"): "4.000",
        ("batch", "gateway", "zero-out"): "2.000",
        ("batch", "record", "add-or-remove"): "–",
        ("gateway", "gateway", "zero-out"): "1.000",
        ("gateway", "gateway", "replace"): "2.000",
        ("gateway", "record", "add-or-remove"): "2.000",
    }


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--noise-level gateway --delta 0.06", ["a gateway's 4,096 records"]),
        ("--noise-level gateway --delta 0.07", ["all gateways", "a gateway's 4,096 records"]),
        ("--noise-level sample --delta 0.07", ["a gateway's 4,096 records"]),
        ("--noise-level sample --delta 1e-4", []),
        ("--noise-level sample --delta 0.07 --epsilon 1 --solve records", []),
    ],
)
def test_plan_warns_of_a_large_delta(flags: str, warned: list[str], capsys: Output) -> None:
    assert main(["plan", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.count("warning:") == len(warned)
    assert all(f"published one of {words}" in printed for words in warned)


def test_plan_prints_a_noise_multiplier_that_a_run_confirms(capsys: Output) -> None:
    assert main(["plan", "--noise-level", "gateway", "--epsilon", "4"]) == 0
    sigma = _rows(capsys.readouterr().out, "smallest noise multiplier")["gateway", "gateway", "zero-out"][0]
    assert main(f"--dry-run --pool inline --noise-level gateway --noise-multiplier {sigma}".split()) == 0
    shown = re.search(r"epsilon ([\d.]+) per gateway \(zero-out\)", capsys.readouterr().out)
    assert shown is not None
    assert 3.99 < float(shown[1]) <= 4.0


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        ("", "the smallest noise multiplier"),
        ("--noise-multiplier 2", "the largest number of rounds"),
        ("--noise-multiplier 2 --rounds 3", "the smallest nominal shard size"),
        ("--noise-multiplier 2 --rounds 3 --records 999", "the largest batch size"),
        ("--sigma 2 --rounds 3 --records 999 --batch-size 9", "the largest number of local steps"),
        ("--sigma 2 --rounds 3 --records 999 --batch-size 9 --local-steps 2", "the largest participation"),
        ("--solve rounds", "the largest number of rounds"),
    ],
)
def test_plan_solves_for_the_first_value_that_is_missing(flags: str, title: str, capsys: Output) -> None:
    assert main(["plan", "--noise-level", "gateway", "--epsilon", "5", *flags.split()]) == 0
    assert title in capsys.readouterr().out


def test_plan_prints_a_column_an_epsilon(capsys: Output) -> None:
    assert main(["plan", "--noise-level", "gateway", "--epsilon", "2", "5", "--sigma", "2"]) == 0
    rows = _rows(capsys.readouterr().out, "largest number of rounds")
    assert rows["gateway", "gateway", "zero-out"] == ["1", "5"]
    assert rows["gateway", "gateway", "replace"] == ["none", "1"]


def test_plan_is_plain_text_without_a_terminal(capsys: Output) -> None:
    main(["plan", "--noise-level", "gateway"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert not set("│┃━─╭") & set(printed)


def test_plan_names_observers_and_says_where_participation_amplifies(capsys: Output) -> None:
    flags = "--participation 0.5 --rounds 1 --local-steps 1 --epsilon 5 --sigma 1 --batch-size 4096"
    main(["plan", *flags.split()])
    printed = capsys.readouterr().out
    assert "sample, batch: against everybody, the orchestrator included." in printed
    assert "the orchestrator is trusted." in printed
    assert "claim no amplification by participation" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epsilon -1", "--epsilon is -1"),
        ("--epsilon nan", "--epsilon is nan"),
        ("--epsilon x", "invalid float value: 'x'"),
        ("--rounds 0", "--rounds is 0"),
        ("--sigma 0", "--noise-multiplier is 0.0"),
        ("--delta 2", "--delta is 2.0"),
        ("--participation 0", "--participation is 0.0"),
        ("--batch-size 5000", "q would be 1.22 > 1"),
        ("--solve rounds", "--solve rounds needs --epsilon"),
        ("--epsilon 4 --solve rounds --rounds 3", "exclude each other"),
        ("--epsilon 4 --sigma 1 --rounds 3 --records 99 --batch-size 9 --local-steps 2 --participation 1", "leave out"),
        ("--noise-level none", "invalid choice: 'none'"),
        ("--noise-level gateway --weights records", "--weights is 'records'"),
        ("rounds", "unrecognized arguments: rounds"),
    ],
)
def test_plan_refuses_bad_arguments(flags: str, words: str, capsys: Output) -> None:
    assert main(["plan", *flags.split()]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
