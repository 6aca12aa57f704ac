"""Where a run stands: its directory, ledger, parameters and round key; opened anew or taken up again."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.algorithms.server_optimizer import State
from fedray.config.files import upgraded
from fedray.config.seams import users_code
from fedray.config.settings import RunConfig
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.resuming import ResumedRun, code_mac
from fedray.pool.pool import PoolInfo
from fedray.privacy.core_dumps import without_core_dumps
from fedray.privacy.ledger import Ledger
from fedray.privacy.streams import (
    RoundKeys,
    commitment,
    extension_root,
    first_round_key,
    new_incarnation,
    next_round_key,
)
from fedray.rundir import cards
from fedray.rundir.checkpoint import Checkpoint
from fedray.rundir.directory import RunDirectory


@dataclass(kw_only=True)
class Session:
    """The moving state of a run.

    Args:
        files: The run directory.
        ledger: What was charged.
        last_record: Metrics record of the last finished round; None before the first.
        speeds: Samples a second of each finished round.
        round: The last finished round.
        generation: How often the run was extended.
        params: `[P]` after it.
        server_state: Of algorithm and server optimizer after it, by name.
        round_key: Its key.
        card: Content of config.json.
        keep_key: Whether checkpoints hold the round key.
        device: Kind of device that gateways train on.
    """

    files: RunDirectory
    ledger: Ledger
    last_record: Mapping[str, Any] | None
    speeds: array[float]
    round: int
    generation: int
    params: npt.NDArray[np.float32]
    server_state: State
    round_key: bytes = field(repr=False)
    card: Mapping[str, Any]
    keep_key: bool
    device: str
    noted: int = 0  # lines of the ledger that `note_ledger` has seen

    @classmethod
    def open(
        cls, plan: Plan, reopened: ResumedRun | None, info: PoolInfo, macs: dict[int, str], stack: ExitStack
    ) -> Session:
        """Create the run directory, or go on with one; it stays locked until `stack` closes.

        Raises:
            InputError: Data or model of a resumed run are not what they were.
            RunFailedError: The disk refuses.
        """
        without_core_dumps()
        config = plan.config
        card = cards.config_card(config.resolve(resume=None), plan.spec, info.summary)
        if reopened is None:
            params, key = plan.layout.flatten(plan.model), plan.first_round_key
            named = users_code(config.as_dict())
            card |= {"code": {setting: code_mac(plan.setup_key, names) for setting, names in named.items()}}
            start = Checkpoint(
                round=0,
                params=params,
                round_key=None if config.run.no_keep_key else key,
                card=card,
            )
            files = RunDirectory.create(new_run_path(config), plan.setup_key, start, plan.identity(macs))
            stack.enter_context(files.lock())
            ledger = Ledger(files.ledger)
            ledger.charge_under(new_incarnation(config.run.seed))
            return cls(
                files=files,
                ledger=ledger,
                last_record=None,
                speeds=array("d"),
                round=0,
                generation=0,
                params=params,
                server_state={},
                round_key=key,
                card=card,
                keep_key=not config.run.no_keep_key,
                device=info.device,
            )
        return cls._resumed(plan, reopened, info, macs)

    @classmethod
    def _resumed(cls, plan: Plan, reopened: ResumedRun, info: PoolInfo, macs: dict[int, str]) -> Session:
        files, state, config = reopened.files, reopened.state, plan.config
        reopened.check_goes_on(plan, macs)
        last = state.checkpoint
        # Nobody can know whether this directory is a copy, or older than what was released: the noise is drawn anew.
        state.ledger.charge_under(new_incarnation(config.run.seed))
        session = cls(
            files=files,
            ledger=state.ledger,
            last_record=state.history[-1] if state.history else None,
            speeds=array("d", [record["samples_per_s"] for record in state.history]),
            round=last.round,
            generation=last.generation,
            params=last.params,
            server_state=last.server_state,
            round_key=last.round_key or b"",
            card=upgraded(last.card),
            keep_key=not config.run.no_keep_key,
            device=info.device,
        )
        if reopened.extends(config):
            session._extend(plan)
        elif not state.finished:
            files.remove_final_files()  # a crash may have left what an earlier end wrote
            if session.card != last.card:  # the run goes on in this version's format
                session._save_card()
        return session

    def _extend(self, plan: Plan) -> None:
        """Give a finished run more rounds under a fresh root key: its old keys are gone, and must not come back."""
        config = plan.config
        self.generation += 1
        root = extension_root(plan.setup_key, config.run.seed is not None, self.generation)
        self.round_key = first_round_key(root)
        self.ledger.extend(
            finished=self.round,
            rounds=config.federation.rounds,
            level=config.privacy.noise_level,
            root_commitment=commitment(root),
        )
        self.note_ledger()
        self.card = {**self.card, "config": {**self.card["config"], "rounds": config.federation.rounds}}
        self._save_card()
        self.files.remove_final_files()

    def _save_card(self) -> None:
        self.files.save(self.checkpoint(), self.ledger)  # first: config.json is mended from it
        self.files.write_json("config.json", self.card)

    def rounds_left(self, rounds: int) -> range:
        """Return the rounds that are still to be done of `rounds`; none when the run had ended."""
        return range(self.round + 1, rounds + 1) if self.round_key else range(0)

    def keys(self, attempt: int | None = None) -> RoundKeys:
        """Return the keys of the round that follows.

        Args:
            attempt: Which attempt at it, charged by now; None for what is drawn before, the same in each attempt and
                for each process that opens the run.
        """
        key, index = next_round_key(self.round_key), self.round + 1
        if attempt is None:
            return RoundKeys(round_key=key, round_index=index)
        incarnation = self.ledger.incarnation(index, attempt)
        return RoundKeys(round_key=key, round_index=index, attempt=attempt, incarnation=incarnation)

    @property
    def resumable(self) -> bool:
        """Whether the run can go on after a stop."""
        return self.keep_key

    @property
    def started(self) -> bool:
        """Whether anything was charged."""
        return len(self.ledger) > 0

    def note_ledger(self) -> None:
        """Remember the ledger's length outside of it."""
        if len(self.ledger) > self.noted:
            self.files.note_ledger(self.ledger)
            self.noted = len(self.ledger)

    def advance(self, index: int, params: npt.NDArray[np.float32], server_state: State) -> None:
        """A round is done."""
        self.round, self.params, self.server_state = index, params, server_state
        self.round_key = next_round_key(self.round_key)

    def checkpoint(self) -> Checkpoint:
        """Return the present state for the disk."""
        return Checkpoint(
            round=self.round,
            generation=self.generation,
            params=self.params,
            server_state=self.server_state,
            round_key=self.round_key if self.keep_key else None,
            card=self.card,
        )


def new_run_path(config: RunConfig) -> Path:
    """Return --out, or runs/<UTC time>-<level>."""
    if config.run.out is not None:
        return config.run.out
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{config.privacy.noise_level}"
    candidates = [Path("runs") / stem, *(Path("runs") / f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())
