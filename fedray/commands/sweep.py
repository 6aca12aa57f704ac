"""Accuracy against epsilon: one run for each level, noise and seed, and the curves that they draw."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedray.config.settings import RunConfig
from fedray.errors import InputError
from fedray.orchestrator.rounds import Orchestrator
from fedray.privacy.spec import NoiseLevelName
from fedray.reports import pictures

NOTE = (
    "Each epsilon is that of one run. Looking at several runs on private data and keeping the best costs budget too: tuning "
    "on private data is not covered by any of them. Sweep on public or synthetic data, or account for all runs."
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of a sweep.

    Args:
        level: Noise level.
        noise_multiplier: sigma; None at level `none`.
        target_epsilon: What was asked for; None when sigma was.
        seed: Of the run.
        epsilon: The level's first guarantee; None at level `none`.
        unit: Whom it protects.
        adjacency: Its neighbouring relation.
        delta: Its delta.
        accuracy: On held-out data after the last round.
        loss: The same.
        rounds: Finished.
        seconds: Of all rounds.
    """

    level: NoiseLevelName
    noise_multiplier: float | None
    target_epsilon: float | None
    seed: int
    epsilon: float | None
    unit: str | None
    adjacency: str | None
    delta: float
    accuracy: float
    loss: float | None
    rounds: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one level and noise, over seeds.

    Args:
        level: Noise level.
        noise_multiplier: sigma; None at level `none`.
        epsilon: The level's first guarantee; None at level `none`.
        unit: Whom it protects.
        adjacency: Its neighbouring relation.
        accuracy: Mean over seeds.
        spread: Standard deviation over seeds; None with one seed.
        seeds: How many.
    """

    level: NoiseLevelName
    noise_multiplier: float | None
    epsilon: float | None
    unit: str | None
    adjacency: str | None
    accuracy: float
    spread: float | None
    seeds: int


def configs_of(
    config: RunConfig,
    levels: Sequence[NoiseLevelName],
    noise_multipliers: Sequence[float],
    target_epsilons: Sequence[float],
    seeds: Sequence[int],
) -> list[RunConfig]:
    """Return the settings of every run of a sweep; level `none` has no noise to sweep.

    Raises:
        InputError: A value breaks a rule.
    """
    base = config.resolve(pool="inline", out=None, quiet=True, noise_multiplier=None, target_epsilon=None)
    bare = {"clip_norm": 1.0, "max_epsilon": None}  # level none clips and promises nothing
    found = []
    for level in levels:
        noises: list[dict[str, float]] = [{"noise_multiplier": value} for value in noise_multipliers]
        noises += [{"target_epsilon": value} for value in target_epsilons]
        found += [
            base.resolve(noise_level=level, seed=seed, **(bare if level == "none" else noise))
            for noise in ([{}] if level == "none" else noises)
            for seed in seeds
        ]
    return found


def run_one(config: RunConfig) -> Outcome:
    """Train one run in this process and keep its figures only.

    Raises:
        InputError: The run would not start, or there is no held-out data with class labels to score it on.
        FedrayError: The run failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedray-frontier-") as place:
        run = Orchestrator(config=config.resolve(out=Path(place) / "run")).run()
    if not run.history:
        raise InputError(f"no round fits: {run.stopped}")
    last, card = run.history[-1], run.privacy
    if last["accuracy"] is None:
        raise InputError("frontier draws accuracy, but there is no held-out data with class labels; bring test data.")
    first: dict[str, Any] = card["guarantees"][0] if card["guarantees"] else {}
    assert config.run.seed is not None, "every run of a sweep has a seed"
    return Outcome(
        level=config.privacy.noise_level,
        noise_multiplier=card["noise_multiplier"],
        target_epsilon=config.privacy.target_epsilon,
        seed=config.run.seed,
        epsilon=first.get("epsilon"),
        unit=first.get("unit"),
        adjacency=first.get("adjacency"),
        delta=card["delta"],
        accuracy=last["accuracy"],
        loss=last["loss"],
        rounds=len(run.history),
        seconds=sum(record["seconds"]["total"] for record in run.history),
    )


def sweep(configs: Sequence[RunConfig], inline: bool, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Train all runs, as Ray tasks or one after the other in this process.

    Args:
        configs: From `configs_of`.
        inline: Whether to stay in this process.
        done: Told each outcome as it becomes ready.
    """
    if inline:
        outcomes = []
        for config in configs:
            outcomes.append(run_one(config))
            done(outcomes[-1])
        return outcomes
    from fedray.pool.ray_tasks import run_tasks  # an inline sweep does without Ray

    return run_tasks(
        run_one, configs, configs[0].machine.ray_address, done, num_gpus=int(configs[0].machine.device == "cuda")
    )


def points_of(outcomes: Sequence[Outcome]) -> list[Point]:
    """Return one point for each level and noise, in the order of the outcomes."""
    groups: dict[tuple[str, float | None, float | None], list[Outcome]] = {}
    for one in outcomes:
        asked = one.noise_multiplier if one.target_epsilon is None else None
        groups.setdefault((one.level, asked, one.target_epsilon), []).append(one)
    return [
        Point(
            level=runs[0].level,
            noise_multiplier=runs[0].noise_multiplier,
            epsilon=runs[0].epsilon,
            unit=runs[0].unit,
            adjacency=runs[0].adjacency,
            accuracy=statistics.fmean(run.accuracy for run in runs),
            spread=statistics.stdev(run.accuracy for run in runs) if len(runs) > 1 else None,
            seeds=len(runs),
        )
        for runs in groups.values()
    ]


def card(config: RunConfig, outcomes: Sequence[Outcome], versions: dict[str, str]) -> dict[str, Any]:
    """Return the content of frontier.json."""
    return {
        "points": [asdict(point) for point in points_of(outcomes)],
        "runs": [asdict(outcome) for outcome in outcomes],
        "note": NOTE,
        "config": config.as_dict(),
        "versions": versions,
    }


def table_lines(points: Sequence[Point]) -> list[str]:
    """Return the points as a table."""
    lines = [f"{'level':<9}{'sigma':>9}{'epsilon':>11}  {'per':<22}{'accuracy':>9}   over seeds"]
    for point in points:
        sigma = "-" if point.noise_multiplier is None else f"{point.noise_multiplier:.4g}"
        epsilon = "-" if point.epsilon is None else f"{point.epsilon:.4g}"
        per = "no promise" if point.unit is None else f"{point.unit} ({point.adjacency})"
        spread = "" if point.spread is None else f" ± {point.spread:.4f}"
        lines.append(
            f"{point.level:<9}{sigma:>9}{epsilon:>11}  {per:<22}{point.accuracy:>9.4f}{spread}   {point.seeds}"
        )
    return lines


def picture(points: Sequence[Point]) -> bytes:
    """Return accuracy against epsilon, one curve a level, error bars of one standard deviation over seeds, as a PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = pictures.new_figure(7.5, 4.8)
    axes = figure.subplots()
    for level in dict.fromkeys(point.level for point in points):
        line = [point for point in points if point.level == level]
        if line[0].epsilon is None:
            axes.axhline(line[0].accuracy, color="grey", ls="--", label="none: no noise, no promise")
            continue
        line.sort(key=lambda point: point.epsilon or 0.0)
        axes.errorbar(
            [point.epsilon or 0.0 for point in line],
            [point.accuracy for point in line],
            yerr=[point.spread or 0.0 for point in line],
            marker="o",
            capsize=4,
            label=f"{level}: epsilon per {line[0].unit} ({line[0].adjacency})",
        )
    axes.set_xscale("log")
    axes.set_xlabel("epsilon of the run (smaller promises more; levels protect different units)")
    axes.set_ylabel("accuracy on held-out data")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return pictures.png_bytes(figure)
