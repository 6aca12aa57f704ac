"""What the throughput benchmark runs: one case a workload, the systems that run it, and how many rounds each takes.

Sizes are those of the issue's acceptance: MLP 32-64-64-10, batch 32, 20 local steps, Adam, sigma 1, C 1. Private runs
sample Poisson batches. Where nothing is private, loops and pfl take batches in order (what pfl can do) and fedray still
samples, which is more work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import workload
from workload import Workload

from suite.systems import FEDRAY, FEDRAY_TRAINER, FLOOR, FLOWER, OPACUS_LOOP, PFL, PLAIN_LOOP, System

MOST_GATEWAYS = 10_000
DOCUMENTED = "Flower + Opacus, as documented"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A system in a case: rounds of its own, so that fast systems are timed long enough, and changes to the job."""

    system: System
    rounds: int
    changes: dict[str, Any] = field(default_factory=dict)
    name: str | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.system.name


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload and the systems that run it, each run `repeats` times in turn."""

    key: str
    title: str
    job: Workload
    entries: tuple[Entry, ...]
    records: int | None = None
    lazy: bool = False
    repeats: int | None = None

    @property
    def num_records(self) -> int:
        """Records a gateway."""
        return workload.default_records(self.job.gateways) if self.records is None else self.records

    def job_of(self, entry: Entry) -> Workload:
        """Return the workload of one entry."""
        return dataclasses.replace(self.job, rounds=entry.rounds, **entry.changes)


def job(**changes: Any) -> Workload:
    """Return the benchmark's MLP workload with changes."""
    standard: dict[str, Any] = {
        "model": "mlp", "gateways": 16, "rounds": 2, "local_steps": 20, "batch_size": 32, "lr": 1e-3,
        "noise_multiplier": 1.0, "clip_norm": 1.0, "seed": 0, "threads": 1, "processes": 2, "privacy": "sample",
        "sampling": "poisson",
    }  # fmt: skip
    return Workload(**(standard | changes))


def cases(quick: bool) -> list[Case]:
    """Return the cases in the order in which they are run; --quick leaves out the slowest peers and sizes."""
    found = [_sample(16, quick), _sample(256, quick), *_without_record_noise(quick)]
    return found if quick else [*found, _cnn(), _transformer(), _batch(), _big_model(), *_many_gateways()]


def _sample(gateways: int, quick: bool) -> Case:
    large = gateways > 16
    fused = {"optimizer": "fused_adam"}
    entries = [
        Entry(system=FEDRAY_TRAINER, rounds=8 if large else 40),
        Entry(system=FLOOR, rounds=8 if large else 40),
        Entry(system=FEDRAY, rounds=12 if large else 40),
    ]
    if not (quick and large):
        entries.append(Entry(system=OPACUS_LOOP, rounds=2 if large else 6, changes=fused))
        entries.append(Entry(system=FLOWER, rounds=3 if large else 6, changes=fused))
    if not quick:
        entries.append(
            Entry(system=FLOWER, rounds=2 if large else 6, changes={"clients": "documented"}, name=DOCUMENTED)
        )
    return Case(
        key=f"sample-{gateways}",
        title=f"per-sample DP, MLP, {gateways} gateways",
        job=job(gateways=gateways),
        entries=tuple(entries),
    )


def _without_record_noise(quick: bool) -> list[Case]:
    in_order = {"sampling": "sequential"}
    fused = in_order | {"optimizer": "fused_adam"}
    found = []
    for level in ("none",) if quick else ("none", "gateway"):
        entries = [
            Entry(system=FEDRAY_TRAINER, rounds=10),
            Entry(system=PFL, rounds=3, changes=fused, name="pfl (fused Adam)"),
        ]
        if not quick:
            entries.append(Entry(system=FEDRAY, rounds=12))
        if level == "none" and not quick:
            entries.append(Entry(system=PLAIN_LOOP, rounds=3, changes=fused, name="plain loop (fused Adam)"))
            entries.append(Entry(system=PFL, rounds=3, changes=in_order, name="pfl (plain Adam)"))
        title = "no privacy" if level == "none" else "DP of whole gateways (central noise)"
        found.append(
            Case(key=f"{level}-256", title=f"{title}, MLP, 256 gateways",
                 job=job(gateways=256, privacy=level), entries=tuple(entries))
        )  # fmt: skip
    return found


def _cnn() -> Case:
    return Case(
        key="cnn-16",
        title="per-sample DP, small CNN on 8×8 images, 16 gateways",
        job=job(model="cnn"),
        entries=(
            Entry(system=FEDRAY_TRAINER, rounds=8),
            Entry(system=OPACUS_LOOP, rounds=4, changes={"optimizer": "fused_adam"}),
        ),
    )


def _transformer() -> Case:
    return Case(
        key="transformer",
        title="per-sample DP, 2-layer transformer encoder on 16 tokens, 16 gateways",
        job=job(model="transformer"),
        entries=(
            Entry(system=FEDRAY_TRAINER, rounds=3),
            Entry(system=OPACUS_LOOP, rounds=3, changes={"optimizer": "fused_adam"}),
        ),
        records=1024,
    )


def _batch() -> Case:
    return Case(
        key="batch-256",
        title="noise on whole batches, MLP, 256 gateways",
        job=job(gateways=256, privacy="batch"),
        entries=(Entry(system=FEDRAY_TRAINER, rounds=8), Entry(system=FEDRAY, rounds=12)),
    )


def _big_model() -> Case:
    one_step = job(model="big_mlp", gateways=2, local_steps=1, privacy="none")
    return Case(
        key="big-model",
        title="no privacy, 25-MB MLP, 2 gateways, one local step",
        job=one_step,
        entries=(
            Entry(system=FEDRAY, rounds=10),
            Entry(
                system=FLOWER, rounds=6, changes={"sampling": "sequential", "optimizer": "fused_adam"}, name="Flower"
            ),
        ),
    )


def _many_gateways() -> list[Case]:
    """One round each on lazy shards, beside some of 256 and 16 gateways on shards of the same size."""
    sizes = {16: 20, 256: 10, 100: 1, 1_000: 1, MOST_GATEWAYS: 1}
    return [
        Case(
            key=f"lazy-{gateways}",
            title=f"per-sample DP, MLP, {gateways:,} gateways, lazy shards",
            job=job(gateways=gateways),
            entries=(Entry(system=FEDRAY, rounds=rounds),),
            records=512,
            lazy=True,
            repeats=1 if gateways > 1_000 else None,
        )
        for gateways, rounds in sizes.items()
    ]
