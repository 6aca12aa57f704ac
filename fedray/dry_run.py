"""--dry-run: what a run would do, where, and what it would cost; trains and writes nothing."""

from __future__ import annotations

from fedray.config import RunConfig
from fedray.plan import UserParts, prepare
from fedray.privacy import accounting
from fedray.progress import Terminal
from fedray.summary import privacy_rows


def dry_run(config: RunConfig) -> None:
    """Check everything that a run checks, place its actors, and print the plan.

    Raises:
        InputError: The run would not start.
    """
    plan = prepare(config, UserParts())
    pool = plan.new_pool()
    try:
        where = pool.describe()
    finally:
        pool.close()
    rows = [
        ("where", where),
        ("what", f"{config.gateways} gateways, {config.rounds} rounds × {config.local_steps} local steps"),
        ("model", f"{config.model}, {plan.layout.num_params:,} trainable parameters"),
        *privacy_rows(plan, accounting.guarantees(plan.spec, plan.charges)),
    ]
    terminal = Terminal()
    terminal.start("fedray --dry-run: nothing was trained or written", rows, plan.warnings())
    terminal.finish([])
