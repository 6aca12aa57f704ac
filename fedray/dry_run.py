"""--dry-run: what a run would do, where, and what it would cost; trains nothing and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedray.config import RunConfig
from fedray.errors import InputError
from fedray.plan import Plan, UserParts
from fedray.pool.pool import Inspection
from fedray.privacy import accounting
from fedray.progress import Terminal
from fedray.session import new_run_path, planned
from fedray.summary import privacy_rows
from fedray.user_code import is_reference


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
            Terminal().finish([reopened.already_complete()])
            return
        if reopened is not None:
            reopened.check_goes_on(plan, None if plan.federation.lazy else {})
        _show(plan, 0 if reopened is None else reopened.state.checkpoint.round)


def _show(plan: Plan, done: int) -> None:
    """Print the plan of a run of which some rounds are done."""
    config, pool = plan.config, plan.new_pool()
    try:
        where = pool.describe()
        inspection = Inspection()
        if config.pool == "ray" and (config.ray_address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local"):
            with _marker(config) as marker:
                inspection = pool.inspect(_modules(config), marker)
    finally:
        pool.close()
    rows = [
        ("where", where),
        *inspection.rows,
        ("what", f"{config.gateways} gateways, {config.rounds} rounds × {config.local_steps} local steps"
         + (f"; {done} are done" if done else "")),
        ("model", f"{config.model}, {plan.layout.num_params:,} trainable parameters"),
        *privacy_rows(plan, accounting.guarantees(plan.spec, plan.charges)),
    ]  # fmt: skip
    terminal = Terminal()
    terminal.start("fedray --dry-run: nothing was trained or written", rows, [*inspection.remarks, *plan.warnings()])
    terminal.finish([])


def _modules(config: RunConfig) -> list[str]:
    """Return the modules that hold the user's code."""
    names = [name for name in (config.dataset, config.model) if is_reference(name)]
    return list(dict.fromkeys(name.partition(":")[0] for name in names))


@contextmanager
def _marker(config: RunConfig) -> Iterator[Path]:
    """Yield a file beside the future run directory, whose creation shows that this process can write there."""
    path = (config.resume or new_run_path(config)).absolute()
    parent = next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())
    try:
        handle, name = tempfile.mkstemp(prefix=".fedray-dry-run-", dir=parent)
    except OSError as error:
        raise InputError(
            f"--out {path} cannot be created ({error}); name a directory that the driver's user may write to."
        ) from error
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
