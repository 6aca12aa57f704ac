"""Rounds as they are paid for: charged before gateways start, settled before noise is drawn for who arrived."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import Gathered, GroupResult, gather
from fedray.errors import RunFailedError
from fedray.orchestrator.budget import EpsilonCurve
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.publisher import Clock, Outcome
from fedray.orchestrator.session import Session
from fedray.pool.hardware import hardware_of
from fedray.pool.pool import Pool, PoolInfo
from fedray.privacy.levels import cohort_is_secret, level_of
from fedray.privacy.streams import RoundKeys, mac
from fedray.privacy.tally import Ranges, ranges_of
from fedray.rundir import cards

Float32Array = npt.NDArray[np.float32]
log = logging.getLogger("fedray")


class ChargedRounds:
    """One round after the other: begin it, collect it, end it.

    Args:
        plan: Of the run.
        session: Where it stands.
        curve: Tells whether a charge can be afforded.
        pool: Where gateways train.
    """

    def __init__(self, plan: Plan, session: Session, curve: EpsilonCurve, pool: Pool) -> None:
        self._plan, self._session, self._curve, self._pool = plan, session, curve, pool
        self._clock = Clock()
        self._cohort: Sequence[int] = ()
        self._arrived: Ranges = ()
        self._info = pool.info()
        self.device = own_device(self._info)
        """Where the orchestrator averages and scores."""
        self.keys = session.keys()
        """Of the attempt under way; after `collect` those of the noise for who arrived."""

    def begin(self) -> None:
        """Charge the next round and let its cohort train from the session's parameters.

        Raises:
            BudgetExhaustedError: It cannot be afforded.
        """
        self._info = self._pool.info()
        self._charge()
        self._clock.lap("charge")
        self._pool.begin(self.keys, self._session.params, self._cohort)
        self._clock.lap("broadcast")
        self._session.note_ledger()  # the charge itself is on the disk already

    def collect(self) -> Gathered:
        """Return what the cohort uploaded.

        Raises:
            BudgetExhaustedError: Fewer arrived than were charged, and their noise cannot be afforded.
            RunFailedError: Nobody arrived.
        """
        self._clock.lap("publish")
        results = self._pool.collect()
        while self._pool.info() != self._info:  # an actor came back where it rounds otherwise than was charged
            self._info = self._pool.info()
            self._charge()
            self._pool.begin(self.keys, self._session.params, self._cohort)
            results = self._pool.collect()
        self._clock.lap("train")
        plan, index = self._plan, self.keys.round_index
        uploads, keep_rows = len(plan.training.algorithm.uploads), plan.setup.each_row
        gathered = gather(results, plan.layout, self.device, index, uploads=uploads, keep_rows=keep_rows)
        self._arrived = ranges_of(gathered.arrived)
        self._record_arrivals(gathered.arrived, results)
        return gathered

    @property
    def arrived(self) -> Ranges:
        """Ranges of the gateways whose uploads were collected."""
        return self._arrived

    def end(self) -> Outcome:
        """Return what there is to tell of the round."""
        self._clock.lap("aggregate")
        return Outcome(round=self.keys.round_index, seconds=self._clock.take(), cohort=len(self._cohort))

    def _charge(self) -> None:
        """Charge the next round before it starts, unless it was when a run was cut off."""
        plan, session, keys = self._plan, self._session, self._session.keys()
        # A secret cohort is what amplifies: each attempt is charged as a sample of its own, so each attempt draws one. A
        # public cohort amplifies nothing and has to be known to be charged: it is the round's, whatever the attempt.
        secret = cohort_is_secret(plan.spec)
        cohort = range(plan.config.federation.gateways) if secret else participation(plan, keys)
        attempt = session.ledger.charge(
            round_index=keys.round_index,
            gateways=ranges_of(cohort),
            steps=plan.config.training.local_steps,
            level=plan.spec.noise_level,
            inputs=inputs_digest(plan, session.params, self._info, ranges_of(cohort)),
            afford=lambda: self._curve.check_budget(session.ledger, keys.round_index),
        )
        keys = session.keys(attempt)
        if secret:
            cohort = participation(plan, keys)
            session.files.append_private(
                {"round": keys.round_index, "attempt": attempt, "cohort": list(map(int, cohort))}
            )
        self.keys, self._cohort = keys, cohort

    def _record_arrivals(self, arrived: Sequence[int], results: Sequence[GroupResult]) -> None:
        """Record who arrived before noise is drawn for them; the keys become those of that noise."""
        session, keys, cohort = self._session, self.keys, self._cohort
        spec, everybody = self._plan.spec, len(arrived) == len(cohort)
        central = level_of(spec).central_noise
        if not everybody and not cohort_is_secret(spec):
            missing = ",".join(f"{first}-{last}" for first, last in ranges_of(sorted({*cohort} - {*arrived})))
            causes = [cause for result in results for cause in result.failures]
            log.warning("event=left_out round=%d gateways=%s causes=%s", keys.round_index, missing, json.dumps(causes))
        if not arrived and len(cohort) and not central:
            raise RunFailedError(f"no gateway arrived in round {keys.round_index}, so there is nothing to average.")
        ranges: Ranges = ranges_of(arrived)
        attempt = session.ledger.record_arrivals(
            round_index=keys.round_index,
            attempt=keys.attempt,
            arrived=() if cohort_is_secret(spec) else ranges,
            label=mac(self._plan.setup_key, repr((keys.round_index, ranges)).encode()),
            everybody=everybody,
            central_noise=central,
            afford=lambda: self._curve.check_budget(session.ledger, keys.round_index),
        )
        session.note_ledger()
        # Of another attempt, should one have been charged: its noise. Its cohort stays the first one's, which is why
        # participation amplifies nothing where gateways may be left out.
        self.keys = session.keys(attempt)


def participation(plan: Plan, keys: RoundKeys) -> Sequence[int]:
    """Return the cohort under these keys: everybody, or each gateway with probability --participation (keyed Poisson)."""
    gateways, rate = plan.config.federation.gateways, plan.spec.participation
    if rate >= 1.0:
        return range(gateways)
    chosen: list[int] = keys.stream("participation", 0).bernoulli(0, gateways, rate).tolist()
    return chosen


def inputs_digest(plan: Plan, params: Float32Array, info: PoolInfo, gateways: Ranges) -> str:
    """Return the SHA-256 of everything public that a round's result depends on besides its key."""
    constants = {
        **plan.constants(),
        "device": info.device,
        "groups": [(group.start, group.stop) for group in info.groups],
        "gateways": gateways,
        # Another build, processor or cut into sub-groups may round differently, and the same noise must not meet
        # another value.
        "versions": cards.versions(),
        "hardware": info.hardware,
        "orchestrator": hardware_of(own_device(info)),
    }
    found = hashlib.sha256(json.dumps(constants, sort_keys=True).encode())
    found.update(params.data)
    return found.hexdigest()


def own_device(info: PoolInfo) -> torch.device:
    """Return where the orchestrator averages and scores: on its GPU when it has one and gateways train on theirs."""
    return torch.device("cuda" if info.device == "cuda" and torch.cuda.is_available() else "cpu")
