"""How often does the audit, at default effort, flag what is broken, and pass what is not?

    python benchmarks/audit_power.py [--honest N] [--mutants N] [--default-job N] [--levels sample,batch,gateway]

Honest runs with fresh seeds play every attack; broken ones (tests/audit/mutants.py) end with the first attack that flags
them. Most are small jobs; --default-job plays the broken ones on the default job as well. Finished audits are kept in
benchmarks/results/audit-power.jsonl, and a second call goes on behind them (delete it after a change of the audit); the result
is benchmarks/results/<date>-audit-power.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from suite import RESULTS, machine  # noqa: E402
from torch import nn  # noqa: E402

from fedray.audit.audit import attacks  # noqa: E402
from fedray.audit.lab import DEFAULT, Lab  # noqa: E402
from fedray.orchestrator.preparing import UserParts  # noqa: E402
from fedray.pool.inline_pool import one_thread  # noqa: E402
from tests.audit.coupled import Gated  # noqa: E402
from tests.audit.mutants import COHORTS, MUTANTS  # noqa: E402
from tests.audit.worlds import plan_of  # noqa: E402

KEPT = RESULTS / "audit-power.jsonl"
HONEST = "honest"
DEFAULT_JOB = {"gateways": 16, "rounds": 10, "local_steps": 16, "batch_size": 64, "samples_per_gateway": 4096}


def audit(level: str, mutant: str, job: str, seed: int) -> dict[str, Any]:
    """Audit one run; return which attack flagged it, if any."""
    broken = {**MUTANTS[level], **(COHORTS if level == "gateway" else {})}.get(mutant, nullcontext)
    changes = {**(DEFAULT_JOB if job == "default" else {}), **({"participation": 0.5} if mutant in COHORTS else {})}
    began, flags = time.monotonic(), []
    with one_thread(), broken():
        plan = plan_of(level, _honest(seed) if mutant == HONEST else UserParts(model=Gated), seed=seed, **changes)
        for finding in attacks(Lab(plan, DEFAULT)):
            if finding.violated:
                flags.append(f"{finding.name}: {finding.lower_bound:.5g} > {finding.claim:.5g}")
                if mutant != HONEST:
                    break
    return {
        "level": level,
        "mutant": mutant,
        "job": job,
        "seed": seed,
        "flags": flags,
        "seconds": round(time.monotonic() - began, 2),
    }


class Dropped(Gated):
    """An honest model that no proven layers make, and that draws: every record is trained alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def _honest(seed: int) -> UserParts:
    """Return the default model for even seeds, and one of the user's own for odd ones."""
    return UserParts(model=Dropped) if seed % 2 else UserParts()


def main() -> int:
    """Play what is missing; exit with 1 when an honest run was flagged or a broken one was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--honest", type=int, default=200)
    parser.add_argument("--mutants", type=int, default=20)
    parser.add_argument("--default-job", type=int, default=3)
    parser.add_argument("--levels", default=",".join(MUTANTS))
    wanted = parser.parse_args()
    levels = wanted.levels.split(",")
    cases = []
    for level in levels:
        for mutant in [*MUTANTS[level], *(COHORTS if level == "gateway" else ())]:
            cases += [(level, mutant, "small", seed) for seed in range(wanted.mutants)]
            cases += [(level, mutant, "default", seed) for seed in range(wanted.default_job)]
    cases += [(level, HONEST, "small", seed) for seed in range(wanted.honest) for level in levels]
    done = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    known = {(one["level"], one["mutant"], one["job"], one["seed"]) for one in done}
    before = machine.describe()
    with KEPT.open("a") as kept:
        for case in cases:
            if case not in known:
                done.append(audit(*case))
                kept.write(json.dumps(done[-1]) + "\n")
                kept.flush()
    return 0 if write(done, before) else 1


def write(done: list[dict[str, Any]], before: dict[str, Any]) -> bool:
    """Write the table; return whether every run was judged rightly."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in done:
        groups.setdefault((one["level"], one["mutant"], one["job"]), []).append(one)
    rows, right = [], True
    for (level, mutant, job), found in groups.items():
        flagged = sum(bool(one["flags"]) for one in found)
        right &= flagged == (0 if mutant == HONEST else len(found))
        by = Counter(one["flags"][0].partition(":")[0] for one in found if one["flags"])
        names = ", ".join(f"{name} {number}" for name, number in by.most_common()) or "-"
        slowest = max(one["seconds"] for one in found)
        rows.append(f"| {level} | {mutant} | {job} | {flagged} of {len(found)} | {names} | {slowest:.1f} |")
    text = f"""# The audit at default effort: what it flags and what it passes

Broken runs end with the first attack that flags them; honest ones play all attacks, every second one on a
model of the user's own with Dropout. Jobs: small (4 gateways, 256 records each,
B 16, 2 rounds of 4 steps) and the default one. {"All judged rightly." if right else "**Some were judged wrongly.**"}
Machine: {machine.one_line(before)}.

| level | what is broken | job | flagged | first by | slowest, s |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    (RESULTS / f"{datetime.datetime.now(datetime.UTC).date().isoformat()}-audit-power.md").write_text(text)
    print(text)
    return right


if __name__ == "__main__":
    sys.exit(main())
