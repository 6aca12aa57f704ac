"""The orchestrator: charge, broadcast, train, gather, average, score; round after round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedray.config.seams import check_is
from fedray.config.settings import RunConfig
from fedray.errors import (
    BudgetExhaustedError,
    FedrayError,
    InputError,
    RunFailedError,
    RunInterruptedError,
    StopAskedError,
    user_code,
)
from fedray.orchestrator.budget import EpsilonCurve
from fedray.orchestrator.charged_rounds import ChargedRounds
from fedray.orchestrator.panel import closing_sentences, panel_rows
from fedray.orchestrator.preparing import UserParts
from fedray.orchestrator.publisher import Publisher
from fedray.orchestrator.resuming import planned
from fedray.orchestrator.session import Session
from fedray.pool.pool import Pool
from fedray.privacy import accounting, mechanism
from fedray.privacy.durable import parse_json, read_regular
from fedray.reports.callback import Callback, End, Start, trackers
from fedray.rundir import cards, manifest
from fedray.tasks.own_loss import Loss, OwnLoss
from fedray.tasks.task import Task


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
        model: Function of no arguments that returns a torch module, called on x, on the entries of x where it is a tuple,
            or on its named entries where it is a dict; None for --model. An output with `.logits` counts as these.
        test: Public held-out `(x, y)`; without it accuracy and loss are None.
        loss: Maps (output, target) to one value a record (default: that of the task).
        task: What targets mean, the loss of a record, metrics; None for --task.
        config: The settings; `gateways` follows the list. With `resume` the run directory's own settings hold.
        callbacks: Told what happens, and may ask to stop; those of --track come after them.
        explicit: Settings that the caller insists on when resuming (default: those that differ from their defaults).

    Raises:
        InputError: Settings, data or model break a rule, or a run to resume is not what it was; nothing was started.
    """

    def __init__(
        self,
        gateways: Any = None,
        *,
        model: Callable[[], Any] | None = None,
        test: Any = None,
        loss: Loss | None = None,
        task: Task | None = None,
        callbacks: Sequence[Callback] = (),
        config: RunConfig | None = None,
        explicit: Collection[str] | None = None,
    ) -> None:
        config = RunConfig() if config is None else config
        if gateways is not None and hasattr(gateways, "__len__"):
            config = config.resolve(gateways=len(gateways))
        if loss is not None and task is not None:
            raise InputError("loss and task are both given; a task has a loss: give one of them.")
        if task is not None:
            check_is(task, Task, "task", type(task).__name__)
        if not isinstance(callbacks, Sequence):
            raise InputError(f"callbacks is {type(callbacks).__name__}; it must be a list of callbacks.")
        for callback in callbacks:
            check_is(callback, Callback, "callback", type(callback).__name__)
        self._stack = ExitStack()  # holds the lock of a resumed directory until the run ends
        task = task if loss is None else OwnLoss(loss)
        parts = UserParts(shards=gateways, test=test, model=model, task=task)
        try:
            self.plan, self._restored = planned(config, parts, explicit, self._stack)
            self._callbacks = [*callbacks, *trackers(self.plan.config.run.track)]
        except BaseException:
            self._stack.close()
            raise

    def run(self) -> Run:
        """Train all rounds, write the run directory and return the result.

        Raises:
            InputError: The cluster cannot host the run, a lazily loaded shard breaks a rule, or data or model of a
                resumed run are not what they were.
            UserCodeError: The user's code failed: in a gateway (GatewayError), or when a round was scored.
            RunFailedError: The run could not go on; what was written stays readable.
            RunInterruptedError: Ctrl-C or SIGTERM; the round under way was abandoned.
        """
        restored = self._restored
        if restored is not None and restored.is_complete(self.plan.config):
            return self._complete_already()
        pool, session = self.plan.new_pool(), None
        done = () if restored is None else (restored.state.checkpoint.round, restored.charges_at_end(self.plan.config))
        curve = EpsilonCurve(self.plan, *done)
        try:
            info = pool.start()
            macs = pool.load(self.plan.setup_key) if self.plan.federation.lazy else {}
            rows, warnings = panel_rows(self.plan, info, curve.planned()), curve.warnings()
            session = Session.open(self.plan, self._restored, info, macs, self._stack)
            pool.say_at_the_end(_remedy(session))
            start = Start(
                path=session.files.path,
                rounds=self.plan.config.federation.rounds,
                done=session.round,
                rows=rows,
                warnings=warnings,
                settings=session.card["config"],
            )
            with user_code("a callback failed at the start"):
                for callback in self._callbacks:
                    callback.on_start(start)
            return self._finish(session, self._rounds(pool, curve, session))
        except KeyboardInterrupt:
            raise RunInterruptedError(f"interrupted; the round under way was abandoned.{_remedy(session)}") from None
        except BrokenPipeError:
            raise RunFailedError(
                f"nobody reads standard output any more; use --quiet, or send it to a file.{_remedy(session)}"
            ) from None
        except OSError as error:
            raise RunFailedError(
                f"writing the run directory failed ({error}); see to its disk.{_remedy(session)}"
            ) from error
        except FedrayError as error:
            if isinstance(error, RunFailedError) and session is not None and session.started:
                error.add_note(_remedy(session).strip())
            raise
        finally:
            curve.close()
            pool.close()
            self._stack.close()

    def _rounds(self, pool: Pool, curve: EpsilonCurve, session: Session) -> str | None:
        """Run the rounds that are left (McMahan et al. 2017, Algorithm 1); return why they ended early, if so."""
        plan = self.plan
        rounds = ChargedRounds(plan, session, curve, pool)
        with Publisher(plan, session, curve, self._callbacks, rounds.device) as publisher:
            try:
                for index in session.rounds_left(plan.config.federation.rounds):
                    rounds.begin()  # charge, draw the cohort, broadcast the parameters
                    publisher.publish_previous_round()  # score and write it, while gateways train
                    uploads = rounds.collect()
                    released = mechanism.aggregate(
                        plan.spec, rounds.keys, uploads.total, uploads.weight, rounds.arrived
                    )
                    session.advance(index, *plan.server(session.params, released, uploads, session.server_state))
                    publisher.add(rounds.end())
            except (BudgetExhaustedError, StopAskedError) as reason:
                return str(reason)
        return None

    def _finish(self, session: Session, stopped: str | None) -> Run:
        plan, files = self.plan, session.files
        plan.layout.load(plan.model, session.params)
        plan.model.eval()
        files.write_model(plan.model.state_dict())
        charges = session.ledger.charges()
        found = accounting.guarantees(plan.spec, charges)
        card = cards.privacy_card(
            plan.config,
            plan.spec,
            charges,
            found,
            disjoint=plan.federation.disjoint,
            isolation=plan.isolation,
            rounds=session.round,
            extended=session.ledger.extensions > 0,
            incomplete=session.ledger.incomplete_rounds,
            device=session.device,
            digests={
                name: cards.digest((files.path / name).read_bytes())
                for name in ("config.json", "ledger.jsonl", "metrics.jsonl", "model.safetensors")
            },
        )
        files.write_json("privacy.json", card)
        files.write_json(manifest.NAME, manifest.manifest_of(files.path))
        files.forget_keys()
        closing = closing_sentences(plan, found, session, stopped)
        self._end(files.path, [*closing, f"run digest: {manifest.run_digest(files.path)}"], stopped, card)
        return Run(model=plan.model, history=tuple(files.metrics()), privacy=card, path=files.path, stopped=stopped)

    def _complete_already(self) -> Run:
        assert self._restored is not None
        state, plan, path = self._restored.state, self.plan, self._restored.files.path
        plan.layout.load(plan.model, state.checkpoint.params)
        card = parse_json(read_regular(path / "privacy.json"))
        self._restored.files.forget_keys()  # a crash may have come before it
        self._end(path, [self._restored.already_complete()], None, card)
        self._stack.close()
        return Run(model=plan.model.eval(), history=tuple(state.history), privacy=card, path=path)

    def _end(self, path: Path, sentences: Sequence[str], stopped: str | None, card: Mapping[str, Any]) -> None:
        end = End(path=path, sentences=sentences, stopped=stopped, privacy=card)
        with user_code("the run is complete, but a callback failed at its end"):
            for callback in self._callbacks:
                callback.on_end(end)


def _remedy(session: Session | None) -> str:
    if session is None:
        return " Nothing was written."
    if not session.resumable:
        return f" What was written is in {session.files.path}; without its key it cannot be resumed."
    return f" Go on with: python -m fedray --resume {session.files.path}"
