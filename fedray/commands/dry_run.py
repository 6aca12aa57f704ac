"""--dry-run: what a run would do, where, and what it would cost; trains nothing and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedray.config.seams import users_code
from fedray.config.settings import RunConfig
from fedray.errors import InputError
from fedray.orchestrator.panel import privacy_rows
from fedray.orchestrator.plan import Plan
from fedray.orchestrator.preparing import UserParts
from fedray.orchestrator.resuming import ResumedRun, planned
from fedray.orchestrator.session import new_run_path
from fedray.pool.pool import Inspection
from fedray.privacy import accounting
from fedray.privacy.accounting import Charges
from fedray.reports.progress import Terminal


def dry_run(config: RunConfig, explicit: Collection[str]) -> None:
    """Check everything that a run checks, place its actors, and print the plan; on a cluster, check every node.

    Args:
        config: The settings; with `resume` the run directory's own hold.
        explicit: Settings that the caller insists on when resuming.

    Raises:
        InputError: The run would not start, or not go on.
    """
    with ExitStack() as stack:
        plan, reopened = planned(config, UserParts(), explicit, stack)
        if reopened is not None and reopened.is_complete(plan.config):
            Terminal().say([reopened.already_complete()])
            return
        if reopened is not None:
            reopened.check_goes_on(plan, None if plan.federation.lazy else {})
        _show(plan, reopened)


def _show(plan: Plan, reopened: ResumedRun | None) -> None:
    config, pool = plan.config, plan.new_pool()
    done = 0 if reopened is None else reopened.state.checkpoint.round
    charges = plan.charges if reopened is None else reopened.charges_at_end(config)
    try:
        where = pool.describe()
        inspection = Inspection()
        address = config.machine.ray_address or os.environ.get("RAY_ADDRESS")
        if config.machine.pool == "ray" and address not in (None, "", "local"):
            with _marker(config) as marker:
                inspection = pool.inspect(_modules(config), marker)
    finally:
        pool.close()
    rows = [
        ("where", where),
        *inspection.rows,
        ("what", f"{config.federation.gateways} gateways, {config.federation.rounds} rounds × "
         f"{config.training.local_steps} local steps"
         + (f"; {done} are done" if done else "")),
        ("model", f"{config.training.model}, {plan.layout.num_params:,} trainable parameters"),
        *privacy_rows(plan, accounting.guarantees(plan.spec, charges)),
        *_stops(plan, charges),
    ]  # fmt: skip
    terminal = Terminal()
    terminal.show_plan(
        "fedray --dry-run: nothing was trained or written", rows, [*inspection.remarks, *plan.warnings()]
    )
    terminal.close()


def _stops(plan: Plan, charges: Charges) -> list[tuple[str, str]]:
    """Return a row that says where --max-epsilon ends the run, if it does."""
    limit, rounds = plan.config.privacy.max_epsilon, plan.config.federation.rounds
    if limit is None or accounting.first_epsilon(plan.spec, charges) <= limit:
        return []
    fit = accounting.affordable_rounds(plan.spec, limit, charges.rounds) - (charges.rounds - rounds)
    return [("stops", f"before round {fit + 1} of {rounds}, which would pass --max-epsilon {limit:g}")]


def _modules(config: RunConfig) -> list[str]:
    """Return the modules that hold the user's code."""
    names = [name for own in users_code(config.as_dict()).values() for name in own]
    return list(dict.fromkeys(name.partition(":")[0] for name in names))


@contextmanager
def _marker(config: RunConfig) -> Iterator[Path]:
    """Yield a file beside the future run directory, or in the one to resume: its creation shows that it can be written."""
    flag, path = (
        ("--out", new_run_path(config)) if config.run.resume is None else ("--resume", config.run.resume / "any")
    )
    path = path.absolute()
    parent = next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())
    try:
        handle, file = tempfile.mkstemp(prefix=".fedray-dry-run-", dir=parent)
    except OSError as error:
        raise InputError(
            f"{flag}: files in {parent} cannot be created ({error}); name a directory that the driver's user may write to."
        ) from error
    os.close(handle)
    try:
        yield Path(file)
    finally:
        os.unlink(file)
