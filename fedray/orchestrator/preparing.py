"""From settings, data and model to a plan: checked, before any actor starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedray.algorithms.aggregator import Aggregator
from fedray.algorithms.algorithm import Algorithm
from fedray.algorithms.server_optimizer import ServerOptimizer
from fedray.config.seams import check_is, find
from fedray.config.settings import RunConfig
from fedray.data import inputs, source
from fedray.data.shards import RecordRules, Shard
from fedray.data.source import Federation
from fedray.errors import InputError
from fedray.models import checks, reference
from fedray.models.layout import Layout
from fedray.orchestrator.plan import Plan
from fedray.pool.worker import WorkerSetup
from fedray.privacy import accounting
from fedray.privacy.accounting import Charges
from fedray.privacy.clipping import check_clipping
from fedray.privacy.levels import level_of
from fedray.privacy.shapes import Clipping, NoiseShape, held_shape
from fedray.privacy.spec import PrivacySpec
from fedray.privacy.streams import first_round_key, forked_global_rng, new_root_key, setup_key, torch_seed
from fedray.tasks.task import Task
from fedray.training.engines import Engine, isolation_of, traced
from fedray.training.program import Program, Untraceable
from fedray.training.stacking import reason_against
from fedray.training.trainer import LocalTraining


@dataclass(frozen=True, kw_only=True)
class UserParts:
    """What a Python caller hands in instead of --dataset, --model and --task; None where a flag speaks.

    Args:
        shards: A sequence of `Gateway` or `(x, y)`, one a gateway.
        test: `(x, y)` or None.
        model: Returns a torch module.
        task: What is learned.
    """

    shards: Any = None
    test: Any = None
    model: Callable[[], Any] | None = None
    task: Task | None = None


def prepare(
    config: RunConfig, parts: UserParts, key: bytes | None = None, noise_multiplier: float | None = None
) -> Plan:
    """Load data, build the model, check both, and calibrate the noise.

    Args:
        config: The settings.
        parts: What the caller brought.
        key: The setup key of a run that goes on; None for a fresh run.
        noise_multiplier: Of a run that goes on, which never changes; None to take or find it from the settings.

    Raises:
        InputError: Anything in settings, data or model breaks a rule.
    """
    root_key = new_root_key(config.run.seed)
    key = setup_key(root_key) if key is None else key
    task = parts.task or seam("task", config.training.task, Task)
    wanted = source.wanted_of(config, task, key)
    if parts.shards is None:
        federation = source.load(config.data.dataset, wanted)
    else:
        federation = wanted.take(parts.shards, parts.test, "gateways")
    if config.training.batch_size > federation.nominal_records:
        raise InputError(
            f"--batch-size is {config.training.batch_size} but the nominal shard size is {federation.nominal_records} records "
            f"(q would be {config.training.batch_size / federation.nominal_records:.3g} > 1); lower it, or use fewer gateways."
        )
    model, rules = _model(config, parts, federation, task, key)
    clipping = seam("clipping", config.privacy.clip, Clipping)
    shape = held_shape(seam("noise_shape", config.privacy.noise_shape, NoiseShape), config.privacy.noise_shape)
    check_clipping(clipping, config.privacy.clip)
    spec = config.spec(federation.nominal_records, clipping, shape)
    spec = _calibrated(spec, config, noise_multiplier)
    aggregator = seam("aggregator", config.federation.aggregator, Aggregator)
    if aggregator.form != "sum" and level_of(spec).central_noise:
        raise InputError(
            f"--aggregator is {config.federation.aggregator} with --noise-level {spec.noise_level}, whose noise and epsilon "
            "are for a sum of updates; use mean, or a level at which gateways noise what they upload (sample, batch)."
        )
    training = LocalTraining(
        privacy=spec,
        optimizer=config.training.optimizer,
        lr=config.training.lr,
        loss=task.losses,
        algorithm=seam("algorithm", config.federation.algorithm, Algorithm),
    )
    engine, program = _engine(config, model, training, federation)
    setup = WorkerSetup(
        model=model,
        training=training,
        shards=federation.shards,
        rules=rules,
        engine=engine,
        program=program,
        memory_limit=None if config.machine.memory_limit is None else config.machine.memory_limit * 2**20,
        max_update_norm=config.federation.max_update_norm,
        drop_failures=config.federation.on_failure == "drop",
        steady_cohort=config.federation.participation >= 1.0,
        each_row=aggregator.form != "sum",
    )
    return Plan(
        config=config,
        setup_key=key,
        first_round_key=first_round_key(root_key),
        spec=spec,
        federation=federation,
        model=model,
        layout=Layout.of(model),
        training=training,
        task=task,
        aggregator=aggregator,
        server_optimizer=seam("server_optimizer", config.federation.server_optimizer, ServerOptimizer),
        setup=setup,
        isolation="alone" if engine == "alone" else "sequence",
    )


def seam(name: str, value: str, kind: type[Any]) -> Any:
    """Return the implementation that a setting names.

    Raises:
        InputError: There is none, or it lacks something.
    """
    found = find(name, value)
    check_is(found, kind, name, value)
    return found


def _model(
    config: RunConfig, parts: UserParts, federation: Federation, task: Task, key: bytes
) -> tuple[torch.nn.Module, RecordRules]:
    sample = _few(federation)
    record_shape = tuple(sample.x.shape[1:]) if isinstance(sample.x, torch.Tensor) else None
    with forked_global_rng(torch_seed(key, "model")):
        if parts.model is not None:
            model = reference.from_function(parts.model, getattr(parts.model, "__name__", "model"))
        else:
            model = reference.build(config.training.model, record_shape, federation.num_outputs)
        if config.training.fix_model:
            model = checks.fix(model)
        outputs = checks.check(model, sample.x, sample.y, task)
    rules = RecordRules.of(federation.example[0], task, outputs)
    if not federation.lazy and not federation.generated:
        for index in range(len(federation.shards)):
            rules.check(*_pair(federation, index), f"shard {index}")
    if federation.test is not None:
        rules.check(*federation.test, "test data")
    return model, rules


def _engine(
    config: RunConfig, model: torch.nn.Module, training: LocalTraining, federation: Federation
) -> tuple[Engine, Program | None]:
    """Return the trainer of --engine, and the program that it runs unless the model is a sequence of proven layers.

    Raises:
        InputError: The engine cannot keep the records of this model apart.
    """
    asked: Engine = "stacked" if config.training.engine == "auto" else config.training.engine
    reason = reason_against(model)
    if asked in ("opacus", "sequence") and reason is not None:
        raise InputError(
            f"--engine is {asked} but {reason}, so nothing proves that it keeps records apart; use --engine auto."
        )
    isolation = isolation_of(asked, model)
    try:
        program = traced(isolation, model, training.loss, _few(federation))
    except Untraceable as untraceable:
        raise InputError(f"--model: {untraceable}.") from untraceable
    except SystemExit as left:  # it ran well when no gradient was asked for, and leaves the program now
        raise InputError(
            "--model: its forward pass on a single record, with gradients, raised SystemExit; it must return an output."
        ) from left
    return ("opacus" if asked == "opacus" else isolation), program


def _few(federation: Federation) -> Shard:
    """Return up to three records to try the model on."""
    x, y = federation.example
    return Shard(x=inputs.tensors(inputs.taken(x, slice(3))), y=torch.from_numpy(y[:3].copy()))


def _pair(federation: Federation, index: int) -> tuple[Any, Any]:
    x, y = federation.shards[index]
    return inputs.rebuilt(x, [np.asarray(leaf) for leaf in inputs.leaves(x)]), np.asarray(y)


def _calibrated(spec: PrivacySpec, config: RunConfig, noise_multiplier: float | None) -> PrivacySpec:
    if noise_multiplier is not None:
        return replace(spec, noise_multiplier=noise_multiplier)
    charges = Charges(steps=config.federation.rounds * config.training.local_steps, rounds=config.federation.rounds)
    if config.privacy.target_epsilon is not None:
        try:
            spec = replace(spec, noise_multiplier=accounting.calibrate(spec, charges, config.privacy.target_epsilon))
        except ValueError as error:
            raise InputError(
                f"--target-epsilon is {config.privacy.target_epsilon:g} but {error}; raise it, or plan fewer rounds or steps."
            ) from error
        least = accounting.first_epsilon(spec, charges)
        if spec.noise_multiplier <= accounting.SMALLEST_SIGMA and least < 0.999 * config.privacy.target_epsilon:
            raise InputError(
                f"--target-epsilon is {config.privacy.target_epsilon:g} but the least noise that is looked for, sigma "
                f"{accounting.SMALLEST_SIGMA:g}, ends at {least:.4g} already; lower it, or give --noise-multiplier."
            )
    if config.privacy.max_epsilon is not None:
        first = accounting.first_epsilon(spec, Charges(steps=config.training.local_steps, rounds=1))
        if first > config.privacy.max_epsilon:
            raise InputError(
                f"--max-epsilon is {config.privacy.max_epsilon:g} but round 1 alone costs {first:.4g}; raise it, or raise "
                "--noise-multiplier."
            )
    return spec
