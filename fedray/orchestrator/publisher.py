"""What follows a round: its score, metrics line and checkpoint, done while the next round trains."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any, Self

import torch

from fedray.errors import UserCodeError
from fedray.orchestrator.budget import EpsilonCurve
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.session import Session
from fedray.privacy.accounting import Charges
from fedray.reports.progress import Progress
from fedray.reports.tracking import new_tracker
from fedray.rundir.checkpoint import Checkpoint
from fedray.tasks.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished round.

    Args:
        round: From 1.
        seconds: Of each phase, and "total": wall-clock seconds since the round before was finished.
        cohort: How many gateways took part.
    """

    round: int
    seconds: dict[str, float]
    cohort: int


class Clock:
    """Wall-clock seconds of a round's phases."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self._phases[phase] = now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """End the round: return all phases and their total, to the microsecond."""
        phases = {**self._phases, "total": self._last - self._start}
        self._start, self._phases = self._last, {}
        return {name: round(value, 6) for name, value in phases.items()}


class Publisher:
    """Scores and writes rounds one behind the training: a crash in between only repeats what keys determine.

    Args:
        plan: Of the run.
        session: Where it stands.
        curve: Gives epsilon.
        progress: Told of each round.
        device: Where parameters are scored.

    As a context it publishes what waits at its end, whatever ends it, and closes the tracker.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        curve: EpsilonCurve,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._session = session
        training = plan.training
        self._evaluation = Evaluation(plan.model, plan.test_tensors(), training.loss, plan.class_labels, device)
        self._curve = curve
        self._progress = progress
        self._tracker = new_tracker(plan.config.run.track, session.files.path)
        self._waiting: tuple[Outcome, Checkpoint, Charges] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.flush()
        finally:
            self._tracker.close()

    def take(self, outcome: Outcome) -> None:
        """Take a finished round; `flush` publishes it."""
        self._waiting = (outcome, self._session.checkpoint(), self._session.ledger.charges(through=outcome.round))

    def flush(self) -> None:
        """Publish the round that waits, if one does: metrics first, as the checkpoint counts on them.

        Raises:
            UserCodeError: Model or loss failed on the held-out data.
        """
        if self._waiting is None:
            return
        (outcome, checkpoint, charges), self._waiting = self._waiting, None
        began = time.perf_counter()
        try:
            score = self._evaluation.score(checkpoint.params)
        except (Exception, SystemExit) as error:  # model and loss are the user's; they may raise anything
            raise UserCodeError(
                f"scoring round {outcome.round} on the held-out data failed: {type(error).__name__}: {error}",
                traceback.format_exc(),
            ) from error
        evaluate = round(time.perf_counter() - began, 6)
        # The size of a secret cohort stays secret: its expectation is public.
        spec = self._plan.spec
        cohort = spec.expected_cohort if spec.secret_participation else outcome.cohort
        record: dict[str, Any] = {
            "round": outcome.round,
            "accuracy": score.accuracy,
            "loss": score.loss,
            "epsilon": self._curve.at(charges),
            "seconds": {**outcome.seconds, "evaluate": evaluate},
            "samples_per_s": cohort * spec.local_steps * spec.batch_size / outcome.seconds["total"],
        }
        self._session.files.append_metrics(record)
        self._session.files.save(checkpoint, self._session.ledger)
        self._session.history.append(record)
        self._progress.round(record, self._plan.config.federation.rounds)
        self._tracker.log(record)
