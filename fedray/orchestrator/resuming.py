"""A run directory that is taken up again: what may differ from before, and what must not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.config.rules import flag
from fedray.config.seams import users_code
from fedray.config.settings import DEFAULTS, RunConfig
from fedray.config.user_code import source_of
from fedray.errors import DamagedRunError, InputError
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts, prepare
from fedray.privacy.accounting import Charges
from fedray.privacy.streams import mac
from fedray.rundir import manifest
from fedray.rundir.directory import RunDirectory, SavedState

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
class ResumedRun:
    """A run directory that was read back, under its lock."""

    files: RunDirectory
    state: SavedState

    def extends(self, config: RunConfig) -> bool:
        """Tell whether the run had ended and gets more rounds."""
        saved = self.state.checkpoint.card["config"]["rounds"]
        return self.state.finished and config.federation.rounds > max(saved, self.state.checkpoint.round)

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
            different = [name for name in different if not name.startswith("shard")]
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
        charged, left = self.state.ledger.charges(through=done), config.federation.rounds - done
        return Charges(steps=charged.steps + left * config.training.local_steps, rounds=charged.rounds + left)

    def already_complete(self) -> str:
        """Say what can be done with a complete run."""
        return f"{self.files.path} is complete already; give --rounds N to add rounds to it."


def planned(
    config: RunConfig, parts: UserParts, explicit: Collection[str] | None, stack: ExitStack
) -> tuple[Plan, ResumedRun | None]:
    """Return the plan of a new run, or of the one that --resume goes on with, and that run's directory.

    Args:
        config: What the caller asks for.
        parts: What a Python caller brought.
        explicit: See `settings_of`.
        stack: Holds the lock of a resumed directory.

    Raises:
        InputError: The run cannot start or go on, or the directory names code that nobody else does.
    """
    if config.run.resume is None:
        return prepare(config, parts), None
    reopened = reopen(config.run.resume, stack, mend=not config.run.dry_run)
    config, sigma = settings_of(reopened, config, explicit)
    _check_code(reopened, config, parts, explicit)
    return prepare(config, parts, reopened.state.setup_key, sigma), reopened


def _check_code(reopened: ResumedRun, config: RunConfig, parts: UserParts, explicit: Collection[str] | None) -> None:
    """Refuse to run code that a run directory names and nobody else does: it may be anybody's directory.

    It is run when its source is the one that the run began with, or when the caller names it again.
    """
    recorded = reopened.state.checkpoint.card.get("code") or {}
    brought = {"dataset": parts.shards, "model": parts.model, "task": parts.task}
    for setting, names in users_code(config.as_dict()).items():
        if setting in (explicit or ()) or brought.get(setting) is not None:
            continue
        found = code_mac(reopened.state.setup_key, names)
        if found is None or found != recorded.get(setting):
            value = ",".join(names)
            raise InputError(
                f"{reopened.files.path} names {value} for {flag(setting)}, code that would run now, and it is not the code "
                f"that the run began with; if you trust it, name it again: {flag(setting)} {value}."
            )


def code_mac(setup_key: bytes, names: Sequence[str]) -> str | None:
    """Return the MAC of the sources that module:name texts name; None where one has no source."""
    sources = [source_of(name) for name in names]
    return None if None in sources else mac(setup_key, b"code " + repr(sources).encode())


def reopen(path: Path, stack: ExitStack, mend: bool = True) -> ResumedRun:
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
    try:
        state = files.restore(mend)
    except OSError as error:
        raise DamagedRunError(f"{path} cannot be read and mended ({error}); see to its files.") from error
    return ResumedRun(files=files, state=state)


def settings_of(
    reopened: ResumedRun, asked: RunConfig, explicit: Collection[str] | None
) -> tuple[RunConfig, float | None]:
    """Return the settings that a resumed run goes on with, and its noise multiplier.

    Args:
        reopened: The run directory.
        asked: What the caller asks for.
        explicit: Names of the settings that the caller insists on; None for those that differ from their defaults.

    Raises:
        InputError: The caller insists on another value than the run's.
    """
    saved: dict[str, Any] = DEFAULTS | reopened.state.checkpoint.card["config"]  # an older format lacks some
    sigma = saved["noise_multiplier"]
    wanted = asked.as_dict()
    if explicit is None:
        explicit = {name for name, value in wanted.items() if value != DEFAULTS[name]}
    path = reopened.files.path
    for name in sorted(explicit):
        if name not in _FREE and wanted[name] != saved[name]:
            raise InputError(
                f"{flag(name)} is {wanted[name]} but {path} was begun with {saved[name]}; what a run computes cannot change: "
                "leave it out, or start a new run."
            )
    if saved["target_epsilon"] is not None:
        saved["noise_multiplier"] = None
    saved["out"] = None
    if "rounds" in explicit:
        _check_rounds(asked.federation.rounds, saved["rounds"], reopened)
        saved["rounds"] = asked.federation.rounds
    saved |= {name: wanted[name] for name in explicit if name in _FREE and name != "rounds"}
    saved["resume"] = path
    try:
        return RunConfig().resolve(**saved), sigma
    except TypeError as error:
        raise InputError(f"{path} was written by another version of fedray ({error}); go on with that one.") from error


def _check_rounds(rounds: int, saved: int, reopened: ResumedRun) -> None:
    done, finished = reopened.state.checkpoint.round, reopened.state.finished
    if rounds < done or (not finished and rounds != saved):
        raise InputError(
            f"--rounds is {rounds} but {reopened.files.path} has done {done} of {saved} rounds; only a finished run can be "
            "extended, and only to more rounds than it has: resume it without --rounds first."
        )
