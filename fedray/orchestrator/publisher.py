"""What follows a round: its score, metrics line and checkpoint, done while the next round trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from fedray.errors import StopAskedError, user_code
from fedray.orchestrator.budget import EpsilonCurve
from fedray.orchestrator.evaluation import Evaluation
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.session import Session
from fedray.privacy.accounting import Charges
from fedray.privacy.levels import cohort_is_secret
from fedray.reports.callback import Callback, RoundDone
from fedray.rundir.checkpoint import Checkpoint


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
        callbacks: Told of each round.
        device: Where parameters are scored.

    As a context it publishes what waits at its end, whatever ends it.
    """

    def __init__(
        self, plan: Plan, session: Session, curve: EpsilonCurve, callbacks: Sequence[Callback], device: torch.device
    ) -> None:
        self._plan = plan
        self._session = session
        self._evaluation = Evaluation(plan.model, plan.test_tensors(), plan.task, device)
        self._curve = curve
        self._callbacks = callbacks
        self._waiting: tuple[Outcome, Checkpoint, Charges] | None = None
        self._asked_to_stop: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.publish_previous_round()

    def add(self, outcome: Outcome) -> None:
        """Take a finished round; it is published while the next one trains.

        Raises:
            StopAskedError: A callback asked to stop after the round before.
        """
        self._waiting = (outcome, self._session.checkpoint(), self._session.ledger.charges(through=outcome.round))
        if self._asked_to_stop is not None and outcome.round < self._plan.config.federation.rounds:
            raise StopAskedError(self._asked_to_stop)

    def publish_previous_round(self) -> None:
        """Publish the round that waits, if one does: metrics first, as the checkpoint counts on them.

        Raises:
            UserCodeError: Model or task failed on the held-out data, or a callback failed.
        """
        if self._waiting is None:
            return
        (outcome, checkpoint, charges), self._waiting = self._waiting, None
        record = self._record(outcome, checkpoint, charges)
        self._session.files.append_metrics(record)
        self._session.files.save(checkpoint, self._session.ledger)
        self._session.last_record = record
        self._session.speeds.append(record["samples_per_s"])
        self._session.ledger.forget(outcome.round)
        params = checkpoint.params.view()
        params.setflags(write=False)
        done = RoundDone(record=record, rounds=self._plan.config.federation.rounds, params=params)
        with user_code(f"a callback failed after round {outcome.round}"):
            for callback in self._callbacks:
                reason = callback.on_round(done)
                if reason is not None and not isinstance(reason, str):
                    raise TypeError(f"on_round returned {reason!r}; it must return a sentence to stop the run, or None")
                self._asked_to_stop = reason or self._asked_to_stop

    def _record(self, outcome: Outcome, checkpoint: Checkpoint, charges: Charges) -> dict[str, Any]:
        """Return a round's line of metrics.jsonl."""
        began, spec = time.perf_counter(), self._plan.spec
        with user_code(f"scoring round {outcome.round} on the held-out data failed"):
            score = self._evaluation.score(checkpoint.params)
        evaluate = round(time.perf_counter() - began, 6)
        # The size of a secret cohort stays secret: its expectation is public.
        cohort = spec.expected_cohort if cohort_is_secret(spec) else outcome.cohort
        return {
            "round": outcome.round,
            "accuracy": score.metrics.get("accuracy"),
            "loss": score.loss,
            "metrics": dict(score.metrics),
            "epsilon": self._curve.at(charges),
            "seconds": {**outcome.seconds, "evaluate": evaluate},
            "samples_per_s": cohort * spec.local_steps * spec.batch_size / outcome.seconds["total"],
        }
