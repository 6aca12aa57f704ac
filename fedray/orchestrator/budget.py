"""Epsilon after each round, computed ahead of the run, and the budget that a round must fit into."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from fedray.errors import BudgetExhaustedError
from fedray.orchestrator.plan import Plan
from fedray.privacy import accounting
from fedray.privacy.accounting import Charges, Guarantee
from fedray.privacy.ledger import Ledger
from fedray.privacy.levels import Unit, level_of

_AHEAD = 64  # rounds


class EpsilonCurve:
    """Evaluates the accountant on a thread of its own (its import takes over a second).

    Args:
        plan: Of the run.
        done: Rounds that are finished already.
        at_end: What the finished run will have been charged (default: what the plan charges).
    """

    def __init__(self, plan: Plan, done: int = 0, at_end: Charges | None = None) -> None:
        self._plan = plan
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._futures: OrderedDict[Charges, Future[dict[Unit, float]]] = OrderedDict()
        self._planned = self._thread.submit(accounting.guarantees, plan.spec, at_end or plan.charges)
        self._warnings = self._thread.submit(plan.warnings)
        self._queued = done

    def planned(self) -> tuple[Guarantee, ...]:
        """Return what will hold when all planned rounds are done."""
        return self._planned.result()

    def warnings(self) -> list[str]:
        """Return the plan's warnings."""
        return self._warnings.result()

    def at(self, charges: Charges) -> dict[Unit, float]:
        """Return epsilon per unit after these charges."""
        steps = self._plan.config.training.local_steps
        until = min(charges.rounds + _AHEAD, self._plan.config.federation.rounds)
        for ahead in range(max(self._queued, charges.rounds) + 1, until + 1):
            self._future(Charges(steps=ahead * steps, rounds=ahead))
        self._queued = max(self._queued, until)
        return self._future(charges).result()

    def check_budget(self, ledger: Ledger, index: int) -> None:
        """Refuse the next round when it would pass --max-epsilon, or --target-epsilon in an extended run.

        Raises:
            BudgetExhaustedError: It would.
        """
        config = self._plan.config
        limits = {"--max-epsilon": config.privacy.max_epsilon}
        if ledger.extensions:
            limits["--target-epsilon"] = config.privacy.target_epsilon
        charged = ledger.charges()
        for flag, limit in limits.items():
            if limit is None:
                continue
            claim = level_of(self._plan.spec).claims(self._plan.spec)[0]
            epsilon = self.at(Charges(steps=charged.steps + config.training.local_steps, rounds=charged.rounds + 1))[
                claim.unit
            ]
            if epsilon > limit:
                raise BudgetExhaustedError(
                    f"stopped before round {index} of {config.federation.rounds}: it would bring epsilon per {claim.unit} "
                    f"({claim.adjacency}) to {epsilon:.4g}, past {flag} {limit:g}."
                )

    def close(self) -> None:
        """Stop computing."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _future(self, charges: Charges) -> Future[dict[Unit, float]]:
        if charges not in self._futures:
            self._futures[charges] = self._thread.submit(accounting.epsilon_by_unit, self._plan.spec, charges)
            while len(self._futures) > 4 * _AHEAD:
                self._futures.popitem(last=False)
        return self._futures[charges]
