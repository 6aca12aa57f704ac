"""Checks a run directory: recomputes epsilon from ledger and config alone, and compares every file with the others.

Counts the ledger's charges on its own and reads files without changing them. It finds damage and inconsistency; against
somebody who recomputes everything only the run digest helps, kept away from the run directory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedray.privacy import accounting
from fedray.privacy.accounting import Charges, Guarantee
from fedray.privacy.durable import digest_of
from fedray.privacy.levels import level_of
from fedray.rundir import cards, evidence, manifest
from fedray.rundir.evidence import RunSettings, UntrueError
from fedray.rundir.history import History, read_ledger

_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Args:
        subject: The file, or "run digest".
        holds: Whether it is as it should be.
        text: What was found, in a sentence.
    """

    subject: str
    holds: bool
    text: str


@dataclass(kw_only=True)
class Verdict:
    """The results of all checks of a run directory, in order.

    Args:
        findings: One entry a check.
        finished: Whether the run ended; an unfinished one has no model and no privacy.json to verify.
        charges: What the ledger charged to the most charged gateway; None when it cannot be read.
        guarantees: What holds after these charges, recomputed.
        digest: The run digest; None without a manifest.
    """

    finished: bool
    findings: list[Finding] = field(default_factory=list)
    charges: Charges | None = None
    guarantees: tuple[Guarantee, ...] = ()
    digest: str | None = None

    @property
    def holds(self) -> bool:
        """Whether all checks passed."""
        return all(finding.holds for finding in self.findings)

    def add(self, subject: str, holds: bool, text: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(subject=subject, holds=holds, text=text))

    def read(self, subject: str, part: Callable[[], _Part], text: Callable[[_Part], str]) -> _Part | None:
        """Read a part of the run, note the result, and return the part; None when the check failed."""
        try:
            found = part()
        except UntrueError as reason:
            self.add(subject, False, str(reason))
            return None
        self.add(subject, True, text(found))
        return found


def examine(path: Path, digest: str | None = None) -> Verdict:
    """Compare everything in a run directory with everything else in it.

    Args:
        path: The run directory; nothing in it is changed.
        digest: The run digest that was printed when the run ended; None when it is not at hand.

    Raises:
        InputError: The path is no run directory.
    """
    verdict = Verdict(finished=evidence.is_finished(path))
    if verdict.finished:
        _check_manifest(verdict, path, digest)
    settings = verdict.read("config.json", lambda: evidence.read_settings(path), lambda found: found.summary)
    if settings is None:
        return verdict
    history = verdict.read(
        "ledger.jsonl",
        lambda: read_ledger(path, settings, finished=verdict.finished),
        lambda found: found.summary,
    )
    if history is not None:
        verdict.charges = history.charges
        verdict.guarantees = accounting.guarantees(settings.spec, history.charges)
        _check_budget(verdict, settings)
        records = verdict.read(
            "metrics.jsonl",
            lambda: _checked_metrics(path, settings, history, verdict.finished),
            lambda found: f"{len(found)} rounds, consecutive; epsilon and samples_per_s are right in each.",
        )
    if verdict.finished:
        verdict.read("model.safetensors", lambda: evidence.read_model(path), lambda text: text)
    if verdict.finished and history is not None:
        _check_card(verdict, path, settings, history, None if records is None else len(records))
    return verdict


def _check_manifest(verdict: Verdict, path: Path, digest: str | None) -> None:
    recorded = verdict.read(
        manifest.NAME, lambda: evidence.read_manifest(path), lambda found: f"lists the digests of {len(found)} files."
    )
    if recorded is not None:
        verdict.digest = manifest.run_digest(path)
        for name, expected in recorded.items():
            actual = _digest_of(path / name)
            if actual is None:
                verdict.add(name, False, "is missing or cannot be read.")
            elif actual != expected:
                verdict.add(name, False, f"is not the file that {manifest.NAME} lists: its bytes were changed.")
    if digest is None:
        return
    if verdict.digest == digest.strip().lower():
        verdict.add("run digest", True, "is the one that was given.")
    else:
        verdict.add(
            "run digest", False, f"is {verdict.digest}, not the one that was given: the files are not that run's."
        )


def _digest_of(file: Path) -> str | None:
    try:
        return digest_of(file)
    except OSError:
        return None


def _check_budget(verdict: Verdict, settings: RunSettings) -> None:
    budget = settings.values.get("max_epsilon")
    if budget is not None and verdict.guarantees and verdict.guarantees[0].epsilon > budget * (1 + settings.tolerance):
        epsilon = cards.format_epsilon(verdict.guarantees[0].epsilon)
        verdict.add("ledger.jsonl", False, f"charges epsilon {epsilon}, past --max-epsilon {budget:g}.")


def _checked_metrics(
    path: Path, settings: RunSettings, history: History, finished: bool
) -> Sequence[Mapping[str, Any]]:
    """Return the metrics of a run after checking each record against the ledger.

    Raises:
        UntrueError: A record does not agree with it.
    """
    records = evidence.read_metrics(path, finished=finished)
    known: dict[Charges, dict[Any, float]] = {}

    def epsilons(charges: Charges) -> dict[Any, float]:
        if charges not in known:
            known[charges] = accounting.epsilon_by_unit(settings.spec, charges)
        return known[charges]

    for record in records:
        number, claimed = record["round"], record["epsilon"]
        possible = history.charges_after(number)
        if not possible:
            raise UntrueError(f"round {number} is recorded but the ledger never charged it.")
        if not any(_same(claimed, epsilons(charges), settings.tolerance) for charges in possible):
            right = ", ".join(f"{value:.6g} per {unit}" for unit, value in epsilons(possible[0]).items()) or "none"
            raise UntrueError(f"round {number} claims epsilon {claimed}; the ledger says {right}.")
        samples = settings.spec.local_steps * settings.spec.batch_size / record["seconds"]["total"]
        speeds = [size * samples for size in {settings.spec.expected_cohort, *history.cohort_sizes(number)}]
        if not any(math.isclose(record["samples_per_s"], speed, rel_tol=1e-9, abs_tol=1e-9) for speed in speeds):
            raise UntrueError(
                f"round {number} claims {record['samples_per_s']:g} samples_per_s; cohort · local_steps · B / seconds "
                f"is {speeds[0]:g}."
            )
    return records


def _same(claimed: Mapping[str, Any], right: Mapping[Any, float], tolerance: float) -> bool:
    return set(claimed) == set(right) and all(_close(claimed[u], value, tolerance) for u, value in right.items())


def _close(claimed: Any, right: float, tolerance: float) -> bool:
    return evidence.is_number(claimed) and math.isclose(claimed, right, rel_tol=tolerance)


def _check_card(verdict: Verdict, path: Path, settings: RunSettings, history: History, num_rounds: int | None) -> None:
    """Compare privacy.json with what config and ledger say."""
    card = verdict.read("privacy.json", lambda: evidence.read_object(path, "privacy.json"), lambda _: "can be read.")
    if card is None:
        return
    spec = settings.spec
    private = level_of(spec).is_private
    seeded = settings.values.get("seed") is not None
    right = {
        "noise_level": spec.noise_level,
        "noise_multiplier": spec.noise_multiplier if private else None,
        "clip_norm": spec.clip_norm if private else None,
        "sample_rate": spec.sample_rate,
        "batch_size": spec.batch_size,
        "local_steps": spec.local_steps,
        "delta": spec.delta,
        "steps": history.charges.steps,
        "rounds": card.get("rounds") if num_rounds is None else num_rounds,
        "digests": {name: _digest_of(path / name) for name in manifest.FILES if name != "privacy.json"},
    }
    wrong = [
        name for name, value in right.items() if card.get(name) != value or type(card.get(name)) is not type(value)
    ]
    for name in wrong:
        verdict.add(
            "privacy.json", False, f"{name} is {card.get(name)!r}; config, ledger and metrics say {right[name]!r}."
        )
    if not isinstance(card.get("rng"), dict) or card["rng"].get("simulation_only") is not seeded:
        verdict.add("privacy.json", False, f"rng.simulation_only must be {seeded}: config.json says so by its seed.")
    listed = set(map(str, card.get("not_covered") or ()))
    missing = set(cards.not_covered(spec, disjoint=True, extended=history.extended)) - listed
    if missing and card.get("versions") == cards.versions():  # other versions may word it otherwise
        verdict.add("privacy.json", False, f"not_covered leaves out: {sorted(missing)[0]}.")
    _check_guarantees(verdict, card.get("guarantees"), settings.tolerance)


def _check_guarantees(verdict: Verdict, claimed: Any, tolerance: float) -> None:
    if not isinstance(claimed, list) or len(claimed) != len(verdict.guarantees):
        verdict.add("privacy.json", False, f"must list {len(verdict.guarantees)} guarantees.")
        return
    for mine, theirs in zip(verdict.guarantees, claimed, strict=True):
        name = f"{mine.unit} ({mine.adjacency}), against {mine.observer}"
        says = theirs if isinstance(theirs, dict) else {}
        epsilon, right = says.get("epsilon"), mine.as_dict()
        right["mu"] = mine.mu if "mu" in says else None  # cards of earlier versions do not name it
        wrong = sorted(key for key in right if key != "epsilon" and says.get(key) != right[key])
        if wrong:
            verdict.add(
                "privacy.json", False, f"{name}: {wrong[0]} is {says.get(wrong[0])!r}, not {right[wrong[0]]!r}."
            )
        elif not _close(epsilon, mine.epsilon, tolerance):
            verdict.add("privacy.json", False, f"{name}: epsilon is {epsilon}; the ledger says {mine.epsilon:.6g}.")
        else:
            verdict.add("privacy.json", True, f"true: epsilon {cards.format_epsilon(mine.epsilon)} per {name}.")
    if not claimed:
        verdict.add("privacy.json", True, "true: it promises nothing (--noise-level none).")
