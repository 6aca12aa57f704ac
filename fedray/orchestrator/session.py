"""Where a run stands: its directory, ledger, parameters and round key; opened anew or taken up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.settings import RunConfig, flag
from fedray.errors import InputError
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.pool.pool import PoolInfo
from fedray.privacy.accounting import Charges
from fedray.privacy.ledger import Ledger
from fedray.privacy.streams import (
    RoundKeys,
    commitment,
    extension_root,
    first_round_key,
    new_incarnation,
    next_round_key,
)
from fedray.rundir import cards, manifest
from fedray.rundir.checkpoint import Checkpoint
from fedray.rundir.directory import Restored, RunDirectory

# What may differ when a run goes on: where and how it is computed, never what it computes or promises.
_FREE = frozenset(
    {
        "pool",
        "ray_address",
        "gateways_per_actor",
        "device",
        "engine",
        "memory_limit",
        "max_failures",
        "round_timeout",
        "placement_timeout",
        "quiet",
        "track",
        "resume",
        "rounds",
        "dry_run",
    }
)


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A run directory that was read back, under its lock."""

    files: RunDirectory
    state: Restored

    def extends(self, config: RunConfig) -> bool:
        """Tell whether the run had ended and gets more rounds."""
        saved = self.state.checkpoint.card["config"]["rounds"]
        return self.state.finished and config.rounds > max(saved, self.state.checkpoint.round)

    def is_complete(self, config: RunConfig) -> bool:
        """Tell whether nothing is left to do: no round, and no file of the finished run to write again."""
        return self.state.finished and not self.extends(config) and manifest.holds(self.files.path)

    def check_goes_on(self, plan: Plan, macs: dict[int, str] | None) -> None:
        """Check that the run can go on: its key was kept, and model and data are what it began with.

        Args:
            plan: Of the run that goes on.
            macs: Of lazy shards; None when they were not loaded, and so cannot be compared.

        Raises:
            InputError: It cannot.
        """
        different = self.files.differences(plan.identity(macs or {}))
        if macs is None:
            different = [name for name in different if not name.startswith("shard ")]
        if different:
            raise InputError(
                f"{', '.join(different[:5])} of {self.files.path} {'is' if len(different) == 1 else 'are'} not what the run "
                "began with; a run goes on with the same model and data only: restore them."
            )
        if not self.state.finished and self.state.checkpoint.round_key is None:
            raise InputError(f"{self.files.path} was run with --no-keep-key, so it cannot be resumed; start a new run.")

    def charges_at_end(self, config: RunConfig) -> Charges:
        """Return what the finished run will have been charged, its repeated rounds included."""
        done = self.state.checkpoint.round
        charged, left = self.state.ledger.charges(through=done), config.rounds - done
        return Charges(steps=charged.steps + left * config.local_steps, rounds=charged.rounds + left)

    def already_complete(self) -> str:
        """Say what can be done with a complete run."""
        return f"{self.files.path} is complete already; give --rounds N to add rounds to it."


def planned(
    config: RunConfig, parts: UserParts, explicit: Collection[str] | None, stack: ExitStack
) -> tuple[Plan, Reopened | None]:
    """Return the plan of a new run, or of the one that --resume goes on with, and that run's directory.

    Args:
        config: What the caller asks for.
        parts: What a Python caller brought.
        explicit: See `settings_of`.
        stack: Holds the lock of a resumed directory.

    Raises:
        InputError: The run cannot start or go on.
    """
    if config.resume is None:
        return prepare(config, parts), None
    reopened = reopen(config.resume, stack, mend=not config.dry_run)
    config, sigma = settings_of(reopened, config, explicit)
    return prepare(config, parts, reopened.state.setup_key, sigma), reopened


def reopen(path: Path, stack: ExitStack, mend: bool = True) -> Reopened:
    """Lock a run directory (until `stack` closes) and read it back.

    Args:
        path: Of the directory.
        stack: Holds the lock.
        mend: Whether to remove what a crash left torn.

    Raises:
        InputError: It is no run directory, or in use.
        DamagedRunError: A file is damaged beyond repair.
    """
    files = RunDirectory(path.absolute())
    stack.enter_context(files.lock())
    return Reopened(files=files, state=files.restore(mend))


def settings_of(
    reopened: Reopened, asked: RunConfig, explicit: Collection[str] | None
) -> tuple[RunConfig, float | None]:
    """Return the settings that a resumed run goes on with, and its noise multiplier.

    Args:
        reopened: The run directory.
        asked: What the caller asks for.
        explicit: Names of the settings that the caller insists on; None for those that differ from their defaults.

    Raises:
        InputError: The caller insists on another value than the run's.
    """
    saved: dict[str, Any] = dict(reopened.state.checkpoint.card["config"])
    sigma = saved["noise_multiplier"]
    fields = dataclasses.fields(RunConfig)
    if explicit is None:
        explicit = {field.name for field in fields if getattr(asked, field.name) != field.default}
    path = reopened.files.path
    for name in sorted(explicit):
        value = getattr(asked, name)
        value = str(value) if isinstance(value, Path) else value
        if name not in _FREE and value != saved[name]:
            raise InputError(
                f"{flag(name)} is {value} but {path} was begun with {saved[name]}; what a run computes cannot change: "
                "leave it out, or start a new run."
            )
    if saved["target_epsilon"] is not None:
        saved["noise_multiplier"] = None
    saved["out"] = None
    if "rounds" in explicit:
        _check_rounds(asked.rounds, saved["rounds"], reopened)
        saved["rounds"] = asked.rounds
    saved |= {name: getattr(asked, name) for name in explicit if name in _FREE and name != "rounds"}
    saved["resume"] = path
    try:
        return RunConfig(**saved), sigma
    except TypeError as error:
        raise InputError(f"{path} was written by another version of fedray ({error}); go on with that one.") from error


def _check_rounds(rounds: int, saved: int, reopened: Reopened) -> None:
    done, finished = reopened.state.checkpoint.round, reopened.state.finished
    if rounds < done or (not finished and rounds != saved):
        raise InputError(
            f"--rounds is {rounds} but {reopened.files.path} has done {done} of {saved} rounds; only a finished run can be "
            "extended, and only to more rounds than it has: resume it without --rounds first."
        )


@dataclass(kw_only=True)
class Session:
    """The moving state of a run.

    Args:
        files: The run directory.
        ledger: What was charged.
        history: Metrics records of the finished rounds.
        round: The last finished round.
        generation: How often the run was extended.
        params: `[P]` after it.
        round_key: Its key.
        card: Content of config.json.
        keep_key: Whether checkpoints hold the round key.
        device: Kind of device that gateways train on.
    """

    files: RunDirectory
    ledger: Ledger
    history: list[dict[str, Any]]
    round: int
    generation: int
    params: npt.NDArray[np.float32]
    round_key: bytes
    card: Mapping[str, Any]
    keep_key: bool
    device: str
    noted: int = 0  # lines of the ledger that `note_ledger` has seen

    @classmethod
    def open(
        cls, plan: Plan, reopened: Reopened | None, info: PoolInfo, macs: dict[int, str], stack: ExitStack
    ) -> Session:
        """Create the run directory, or go on with one; it stays locked until `stack` closes.

        Raises:
            InputError: Data or model of a resumed run are not what they were.
            RunFailedError: The disk refuses.
        """
        config = plan.config
        card = cards.config_card(config.resolve(resume=None), plan.spec, info.summary)
        if reopened is None:
            params, key = plan.layout.flatten(plan.model), plan.first_round_key
            start = Checkpoint(
                round=0,
                params=params,
                round_key=None if config.no_keep_key else key,
                card=card,
            )
            files = RunDirectory.create(new_run_path(config), plan.setup_key, start, plan.identity(macs))
            stack.enter_context(files.lock())
            ledger = Ledger(files.ledger)
            ledger.charge_under(new_incarnation(config.seed))
            return cls(
                files=files,
                ledger=ledger,
                history=[],
                round=0,
                generation=0,
                params=params,
                round_key=key,
                card=card,
                keep_key=not config.no_keep_key,
                device=info.device,
            )
        return cls._resumed(plan, reopened, info, macs)

    @classmethod
    def _resumed(cls, plan: Plan, reopened: Reopened, info: PoolInfo, macs: dict[int, str]) -> Session:
        files, state, config = reopened.files, reopened.state, plan.config
        reopened.check_goes_on(plan, macs)
        last = state.checkpoint
        # Nobody can know whether this directory is a copy, or older than what was released: the noise is drawn anew.
        state.ledger.charge_under(new_incarnation(config.seed))
        session = cls(
            files=files,
            ledger=state.ledger,
            history=state.history,
            round=last.round,
            generation=last.generation,
            params=last.params,
            round_key=last.round_key or b"",
            card=last.card,
            keep_key=not config.no_keep_key,
            device=info.device,
        )
        if reopened.extends(config):
            session._extend(plan)
        elif not state.finished:
            files.reopen()  # a crash may have left what an earlier end wrote
        return session

    def _extend(self, plan: Plan) -> None:
        """Give a finished run more rounds under a fresh root key: its old keys are gone, and must not come back."""
        config = plan.config
        self.generation += 1
        root = extension_root(plan.setup_key, config.seed is not None, self.generation)
        self.round_key = first_round_key(root)
        self.ledger.extend(
            finished=self.round, rounds=config.rounds, level=config.noise_level, root_commitment=commitment(root)
        )
        self.note_ledger()
        self.card = {**self.card, "config": {**self.card["config"], "rounds": config.rounds}}
        self.files.save(self.checkpoint(), self.ledger)
        self.files.reopen()
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

    def advance(self, index: int, params: npt.NDArray[np.float32]) -> None:
        """A round is done."""
        self.round, self.params, self.round_key = index, params, next_round_key(self.round_key)

    def checkpoint(self) -> Checkpoint:
        """Return the present state for the disk."""
        return Checkpoint(
            round=self.round,
            generation=self.generation,
            params=self.params,
            round_key=self.round_key if self.keep_key else None,
            card=self.card,
        )


def new_run_path(config: RunConfig) -> Path:
    """Return --out, or runs/<UTC time>-<level>."""
    if config.out is not None:
        return config.out
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{config.noise_level}"
    candidates = [Path("runs") / stem, *(Path("runs") / f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())
