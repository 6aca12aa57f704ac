"""Chooses the trainer of a model: by which means it keeps the gradients of single records apart."""

from __future__ import annotations

import copy
import functools
from typing import Literal

import torch
from torch import nn

from fedray.data.inputs import on, only_leaf, taken
from fedray.data.shards import Shard
from fedray.models.layout import Layout
from fedray.tasks.classification import cross_entropy
from fedray.tasks.own_loss import Loss
from fedray.training.alone import AloneGradients
from fedray.training.program import Program, Untraceable
from fedray.training.record_gradients import RecordGradients, SequenceGradients
from fedray.training.stacked import StackedTrainer
from fedray.training.stacking import StackedModel, reason_against
from fedray.training.trainer import LocalTraining, Trainer

Engine = Literal["opacus", "stacked", "sequence", "alone"]
Isolation = Literal["sequence", "alone"]
"""How a record's gradient is kept apart from others': a sequence of proven layers, or code that saw one record alone."""


def isolation_of(engine: Engine, model: nn.Module) -> Isolation:
    """Return how an engine keeps the records of a model apart."""
    return "alone" if engine == "alone" or reason_against(model) is not None else "sequence"


def traced(isolation: Isolation, model: nn.Module, loss: Loss, shard: Shard) -> Program | None:
    """Trace the user's code on one record and return its program; None when training runs none of the user's code.

    Args:
        isolation: "alone" traces model and loss; "sequence" the loss alone, and nothing when it is the default one.
        model: Copied.
        loss: Maps (output, target) to one value a record.
        shard: Gives shapes and types of a record.

    Raises:
        Untraceable: The code cannot be run on one record.
    """
    _refuse_hooks_on_parameters(model)
    if isolation == "sequence" and loss is cross_entropy:
        return None
    # torch.fx takes a second to import: actors do without.
    from fedray.training.program_check import check_gradients
    from fedray.training.traced_code import Example
    from fedray.training.tracing import trace, trace_loss

    cpu = torch.device("cpu")
    few = Shard(x=on(shard.x, cpu), y=shard.y.cpu())
    x, y = taken(few.x, slice(1)), few.y[:1]
    model = copy.deepcopy(model).cpu().train()
    if isolation == "sequence":
        output, _ = StackedModel(model, cpu).one_output(only_leaf(x))
        program = trace_loss(loss, output, y)
        check_gradients(lambda: SequenceGradients(model, lambda _: program, cpu), (), model, loss, few)
    else:
        program = trace(copy.deepcopy(model), loss, Example(x=x, y=y))
        made = functools.partial(AloneGradients, lambda _: program, Layout.of(model), cpu, 2**31)
        check_gradients(made, program.draws, model, loss, few)
    return program


def _refuse_hooks_on_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise Untraceable(
                f"parameter {name} has a hook on its gradient, which sees a sum of records where fedray clips each one's; "
                "scale in the forward pass, or freeze what is not to change"
            )


def new_trainer(
    engine: Engine,
    model: nn.Module,
    training: LocalTraining,
    device: torch.device,
    memory_limit: int = 2**31,
    program: Program | None = None,
) -> Trainer:
    """Return the trainer of an engine.

    Args:
        engine: "stacked" is the fast trainer, in the way that suits the model; "sequence" and "alone" ask for one of them.
        model: Copied.
        training: How gateways train.
        device: Where it trains.
        memory_limit: Bytes that a group's matrices and activations may take.
        program: The result of `traced`; None to trace when the first shard is there.
    """
    if engine == "opacus":
        from fedray.training.reference import (
            OpacusTrainer,  # imports Opacus (seconds), which the fast trainer does without
        )

        return OpacusTrainer(model, training, device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions would be three digits from those of a CPU
    isolation: Isolation = "sequence" if engine == "sequence" else isolation_of(engine, model)

    def program_of(shard: Shard) -> Program:
        found = program if program is not None else traced(isolation, model, training.loss, shard)
        assert found is not None, "only the default loss on a sequence has no program"
        return found

    gradients: RecordGradients
    if isolation == "sequence":
        own_loss = None if training.loss is cross_entropy else program_of
        gradients = SequenceGradients(model, own_loss, device)
    else:
        gradients = AloneGradients(program_of, Layout.of(model), device, memory_limit)
    return StackedTrainer(gradients, training, device, memory_limit)
