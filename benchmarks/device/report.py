"""Tables of the GPU benchmark as Markdown, and its JSON, at any moment of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from families.family import Family
from families.job import BATCH, RECORDS
from suite import machine
from suite.report import markdown_table

from device.rows import ALL, GHOST, HOOKS, LOOP, ONE, SHARED, TOLERANCE, Equality, Row

CONDITIONS = (
    f"One process, one device, float32. Poisson batches of {BATCH} expected records from shards of {RECORDS} (16 differ; "
    "past 16 gateways hold the same ones again), Adam, sigma 1, C 1. fedray: its own trainer, whose shards lie in the "
    "host's memory, with a generator on the device for noise; all gateways in one call, or each in a call of its own. "
    "Opacus and the loop without privacy: one model, one gateway after the other, records on the device, the same batches; "
    "their rate does not depend on how many gateways there are. One large batch: autograd and Adam, what the hardware "
    "allows. Samples/s: gateways × local steps × B over the median round, after one to warm up."
)


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the device is and how torch may compute on it."""
    found: dict[str, Any] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def as_json(
    equalities: Sequence[Equality], rows: Sequence[Row], families: dict[str, Family], config: dict[str, Any]
) -> dict[str, Any]:
    """Return everything, raw numbers included."""
    return {
        **config,
        "conditions": CONDITIONS,
        "models": {key: {"title": family.title, **sizes(family)} for key, family in families.items()},
        "equality": [{**one.__dict__, "tolerance": TOLERANCE, "met": one.met} for one in equalities],
        "rows": [row.as_dict() for row in rows],
    }


def sizes(family: Family) -> dict[str, int]:
    """Return how many parameters a model has, and what a round of it is made of."""
    parameters = list(family.build().parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "local_steps": family.local_steps,
        "shared_batch": family.shared_batch,
    }


def markdown(
    equalities: Sequence[Equality], rows: Sequence[Row], families: dict[str, Family], config: dict[str, Any]
) -> str:
    """Return the whole report."""
    where = config["hardware"]
    parts = [
        f"# GPU, {config['date']}",
        f"{where.get('gpu', 'no GPU: a dry run on the CPU')}; {machine.one_line(config['machine'])}; "
        f"TF32 in cuDNN {where['cudnn_tf32']}, in matmul {where['matmul_tf32']}.",
        CONDITIONS,
        f"{config['seconds']} s{', --quick' if config['quick'] else ''}; {'complete' if config['complete'] else 'PARTIAL'}.",
        "## Equality with the CPU (clipped sums of the first step, relative L2)",
        markdown_table(
            ("model", "distance", "allowed", "same bits again", "verdict"),
            [
                (
                    one.model,
                    one.failure or f"{one.distance:.1e}",
                    f"{TOLERANCE:g}",
                    str(one.repeatable),
                    "met" if one.met else "MISSED",
                )
                for one in equalities
            ],
        ),
    ]
    for key, family in families.items():
        own = [row for row in rows if row.model == key]
        if own:
            size = sizes(family)
            title = f"## {family.title}: {size['parameters']:,} parameters, {size['trainable']:,} trainable"
            parts += [title, _table(own), _ratios(own)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        rate = "" if row.samples_per_s is None else f"{row.samples_per_s:,.0f}"
        first = "" if row.first_round_s is None else f"{row.first_round_s:.1f}"
        lines.append(
            (row.system, f"{row.gateways:,}", row.engine, rate, first, f"{row.peak_mb:,.0f}", row.failure or "")
        )
    return markdown_table(("system", "gateways", "engine", "samples/s", "first round s", "peak MB", "failure"), lines)


def _ratios(rows: Sequence[Row]) -> str:
    best = max((row.samples_per_s or 0.0 for row in rows if row.system == ALL), default=0.0)
    rates = {row.system: row.samples_per_s for row in rows if row.samples_per_s is not None}
    parts = [
        f"{best / rate:.2f}× {name}"
        for name in (ONE, HOOKS, GHOST, LOOP, SHARED)
        if (rate := rates.get(name)) is not None
    ]
    return f"fedray's best, all at once: {', '.join(parts) or 'nothing to compare with'}."
