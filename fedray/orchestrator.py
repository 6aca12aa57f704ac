"""The orchestrator: charge, broadcast, train, gather, average, score; round after round."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray import report
from fedray.aggregation import FedAvg, weighted_sum
from fedray.checkpoint import Checkpoint, RunDirectory
from fedray.config import RunConfig
from fedray.errors import BudgetExhaustedError, RunFailedError
from fedray.evaluation import Evaluation
from fedray.models import Loss
from fedray.params import Layout
from fedray.plan import Plan, UserParts, new_run_path, prepare
from fedray.pool.pool import Pool, PoolInfo
from fedray.pool.worker import GroupResult
from fedray.privacy import accounting, mechanism
from fedray.privacy.accounting import Charges, Guarantee
from fedray.privacy.ledger import Ledger, Ranges, ranges_of
from fedray.privacy.levels import level_of
from fedray.progress import Progress, Silent
from fedray.streams import RoundKeys, first_round_key, next_round_key, setup_key

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Args:
        model: The final model.
        history: One metrics record a round, as in metrics.jsonl.
        privacy: The privacy card, as in privacy.json.
        path: The run directory.
        stopped: Why the run ended before its last round; None when it did not.
    """

    model: torch.nn.Module
    history: tuple[dict[str, Any], ...]
    privacy: dict[str, Any]
    path: Path
    stopped: str | None = None


class Orchestrator:
    """Trains a federation.

    Args:
        gateways: `Gateway` objects or `(x, y)` pairs, one a gateway; None for --dataset.
        model: Function of no arguments that returns a torch module; None for --model.
        test: Public held-out `(x, y)`; without it accuracy and loss are None.
        loss: Maps (output, target) to one value a record (default: cross-entropy with class indices).
        config: The settings; `gateways` follows the list.
        progress: Told what happens (default: nothing is shown).

    Raises:
        InputError: Settings, data or model break a rule; nothing was started.
    """

    def __init__(
        self,
        gateways: Any = None,
        *,
        model: Callable[[], Any] | None = None,
        test: Any = None,
        loss: Loss | None = None,
        config: RunConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = RunConfig() if config is None else config
        if gateways is not None and hasattr(gateways, "__len__"):
            config = config.resolve(gateways=len(gateways))
        self.plan = prepare(config, UserParts(shards=gateways, test=test, model=model, loss=loss))
        self._progress = Silent() if progress is None else progress

    def run(self) -> Run:
        """Train all rounds, write the run directory and return the result.

        Raises:
            InputError: The cluster cannot host the run, or a lazily loaded shard breaks a rule.
            GatewayError: The user's code failed in a gateway.
            RunFailedError: The run could not go on; what was written stays readable.
        """
        pool = self.plan.new_pool()
        curve = EpsilonCurve(self.plan)
        try:
            info = pool.start()
            if self.plan.federation.lazy:
                pool.load()
            self._announce(info, curve)
            return self._rounds(pool, info, curve)
        finally:
            curve.close()
            pool.close()

    def _rounds(self, pool: Pool, info: PoolInfo, curve: EpsilonCurve) -> Run:
        plan, config, server = self.plan, self.plan.config, FedAvg()
        device = torch.device("cuda" if info.device == "cuda" and torch.cuda.is_available() else "cpu")
        evaluation = Evaluation(plan.model, plan.test_tensors(), plan.training.loss, plan.class_labels, device)
        params, keys = plan.layout.flatten(plan.model), first_round_key(plan.root_key)
        files = RunDirectory.create(
            new_run_path(config), report.config_card(config, plan.spec), self._checkpoint(0, params, keys, Ledger(None))
        )
        ledger, history, stopped = Ledger(files.ledger), [], None
        cohort = range(config.gateways)
        for index in range(1, config.rounds + 1):
            clock = Clock()
            keys = next_round_key(keys)
            try:
                curve.check_budget(ledger, index)
            except BudgetExhaustedError as reason:
                stopped = str(reason)
                break
            attempt = self._charge(ledger, index, params, info)
            round_keys = RoundKeys(round_key=keys, round_index=index, attempt=attempt)
            clock.lap("charge")
            results = pool.train(round_keys, params, cohort)
            clock.lap("train")
            total, weight, arrived = gather(results, plan.layout, device)
            params = server.step(params, mechanism.aggregate(plan.spec, round_keys, total, weight, arrived))
            clock.lap("aggregate")
            score = evaluation.score(params)
            clock.lap("evaluate")
            files.save(self._checkpoint(index, params, keys, ledger))
            clock.lap("checkpoint")
            seconds = clock.seconds()
            record = {
                "round": index,
                "accuracy": score.accuracy,
                "loss": score.loss,
                "epsilon": curve.at(ledger.charges()),
                "seconds": seconds,
                "samples_per_s": len(cohort) * config.local_steps * config.batch_size / seconds["total"],
            }
            files.append_metrics(record)
            history.append(record)
            self._progress.round(record, config.rounds)
        return self._finish(files, ledger, params, history, stopped)

    def _charge(self, ledger: Ledger, index: int, params: Float32Array, info: PoolInfo) -> int:
        gateways: Ranges = ranges_of(range(self.plan.config.gateways))
        return ledger.charge(
            round_index=index,
            gateways=gateways,
            steps=self.plan.config.local_steps,
            level=self.plan.spec.noise_level,
            inputs=inputs_digest(self.plan, params, info, gateways),
        )

    def _checkpoint(self, index: int, params: Float32Array, round_key: bytes, ledger: Ledger) -> Checkpoint:
        return Checkpoint(
            round=index,
            params=params,
            setup_key=setup_key(self.plan.root_key),
            round_key=round_key,
            ledger_length=len(ledger),
            ledger_head=ledger.head,
        )

    def _announce(self, info: PoolInfo, curve: EpsilonCurve) -> None:
        plan, config = self.plan, self.plan.config
        rows = [
            ("where", info.summary),
            ("what", f"{config.gateways} gateways, {config.rounds} rounds × {config.local_steps} local steps, "
             f"B = {config.batch_size} (q = {plan.spec.sample_rate:.4g}), {config.optimizer}, lr {config.lr:g}"),
            ("model", f"{config.model}, {plan.layout.num_params:,} trainable parameters, engine {plan.setup.engine}"
             + (f" ({plan.engine_reason})" if plan.engine_reason else "")),
            *plan_rows(plan, curve.planned()),
        ]  # fmt: skip
        self._progress.start("fedray", rows, curve.warnings())

    def _finish(
        self,
        files: RunDirectory,
        ledger: Ledger,
        params: Float32Array,
        history: Sequence[dict[str, Any]],
        stopped: str | None,
    ) -> Run:
        plan = self.plan
        plan.layout.load(plan.model, params)
        plan.model.eval()
        files.write_model(plan.model.state_dict())
        charges = ledger.charges()
        found = accounting.guarantees(plan.spec, charges)
        card = report.privacy_card(
            plan.config,
            plan.spec,
            charges,
            found,
            disjoint=plan.federation.disjoint,
            rounds=len(history),
            digests={
                name: report.digest((files.path / name).read_bytes())
                for name in ("config.json", "ledger.jsonl", "metrics.jsonl", "model.safetensors")
            },
        )
        files.write_json("privacy.json", card)
        files.forget_keys()
        self._progress.finish(closing_sentences(plan, found, history, files.path, stopped))
        return Run(model=plan.model, history=tuple(history), privacy=card, path=files.path, stopped=stopped)


def gather(
    results: Sequence[GroupResult], layout: Layout, device: torch.device
) -> tuple[npt.NDArray[np.float64], float, Ranges]:
    """Add up the groups' updates in gateway order.

    Returns:
        The sum `[P]`, the sum of the weights, and the ranges of the gateways that arrived.

    Raises:
        RunFailedError: An actor's model has another layout than the orchestrator's.
    """
    for result in results:
        if result.layout_digest != layout.digest:
            raise RunFailedError(
                f"gateways {result.gateways[0]}–{result.gateways[-1]} answered with another model layout than the "
                "orchestrator's; all machines must run the same code."
            )
    total = np.zeros(layout.num_params, np.float64)
    weight = 0.0
    for result in results:
        weights = result.weights or [1.0] * len(result.gateways)
        weight += sum(weights)
        if result.updates is not None:
            weighted_sum(list(result.updates), weights, device, total)
        elif result.total is not None:
            total += result.total
    return total, weight, ranges_of([gateway for result in results for gateway in result.gateways])


def inputs_digest(plan: Plan, params: Float32Array, info: PoolInfo, gateways: Ranges) -> str:
    """Return the SHA-256 of everything public that a round's result depends on besides its key."""
    constants = {
        **plan.constants(),
        "device": info.device,
        "groups": [(group.start, group.stop) for group in info.groups],
        "gateways": gateways,
    }
    return hashlib.sha256(json.dumps(constants, sort_keys=True).encode() + params.tobytes()).hexdigest()


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

    def seconds(self) -> dict[str, float]:
        """Return all phases and their total, rounded to microseconds."""
        phases = {**self._phases, "total": self._last - self._start}
        return {name: round(value, 6) for name, value in phases.items()}


class EpsilonCurve:
    """Epsilon after each round, computed ahead of the run on a thread of its own (one evaluation takes some 30 ms)."""

    _AHEAD = 64

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._futures: OrderedDict[Charges, Future[dict[Any, float]]] = OrderedDict()
        self._planned = self._thread.submit(accounting.guarantees, plan.spec, plan.charges)
        self._warnings = self._thread.submit(plan.warnings)
        self._queued = 0
        self._queue(1)

    def planned(self) -> tuple[Guarantee, ...]:
        """Return what will hold when all planned rounds are done."""
        return self._planned.result()

    def warnings(self) -> list[str]:
        """Return the plan's warnings."""
        return self._warnings.result()

    def at(self, charges: Charges) -> dict[Any, float]:
        """Return epsilon per unit after these charges."""
        self._queue(charges.rounds)
        return self._future(charges).result()

    def check_budget(self, ledger: Ledger, index: int) -> None:
        """Refuse the next round when it would pass --max-epsilon.

        Raises:
            BudgetExhaustedError: It would.
        """
        config, charged = self._plan.config, ledger.charges()
        if config.max_epsilon is None:
            return
        claim = level_of(self._plan.spec).claims(self._plan.spec)[0]
        after = Charges(steps=charged.steps + config.local_steps, rounds=charged.rounds + 1)
        epsilon = self.at(after)[claim.unit]
        if epsilon > config.max_epsilon:
            raise BudgetExhaustedError(
                f"stopped before round {index} of {config.rounds}: it would bring epsilon per {claim.unit} "
                f"({claim.adjacency}) to {epsilon:.4g}, past --max-epsilon {config.max_epsilon:g}."
            )

    def close(self) -> None:
        """Stop computing."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _queue(self, rounds: int) -> None:
        steps = self._plan.config.local_steps
        until = min(rounds + self._AHEAD, self._plan.config.rounds)
        for ahead in range(self._queued + 1, until + 1):
            self._future(Charges(steps=ahead * steps, rounds=ahead))
        self._queued = max(self._queued, until)

    def _future(self, charges: Charges) -> Future[dict[Any, float]]:
        if charges not in self._futures:
            self._futures[charges] = self._thread.submit(accounting.epsilon_by_unit, self._plan.spec, charges)
            while len(self._futures) > 4 * self._AHEAD:
                self._futures.popitem(last=False)
        return self._futures[charges]


def plan_rows(plan: Plan, planned: Sequence[Guarantee]) -> list[tuple[str, str]]:
    """Return the panel's rows about privacy."""
    if not planned:
        return [("privacy", "none: --noise-level none promises nothing")]
    spec = plan.spec
    return [
        ("privacy", f"{spec.noise_level} level, sigma = {spec.noise_multiplier:.4g}, C = {spec.clip_norm:g}, "
         f"delta = {spec.delta:g}"),
        *(
            ("planned", f"epsilon {report.format_epsilon(g.epsilon)} per {g.unit} ({g.adjacency}), against {g.observer}")
            for g in planned
        ),
    ]  # fmt: skip


def closing_sentences(
    plan: Plan, found: Sequence[Guarantee], history: Sequence[dict[str, Any]], path: Path, stopped: str | None
) -> list[str]:
    """Return what a reader should take home from the run."""
    lines = [] if stopped is None else [stopped]
    if history and history[-1]["accuracy"] is not None:
        lines.append(f"accuracy {history[-1]['accuracy']:.4f} on held-out data after {len(history)} rounds.")
    lines += [report.sentence(guarantee) for guarantee in found] or ["no privacy: --noise-level none promises nothing."]
    if plan.config.seed is not None and found:
        lines.append("simulation only: with --seed the noise can be predicted by whoever knows the seed.")
    if history:
        speeds = sorted(record["samples_per_s"] for record in history)
        lines.append(f"{speeds[len(speeds) // 2]:,.0f} samples/s (median round).")
    lines.append(f"files: {path}")
    return lines
