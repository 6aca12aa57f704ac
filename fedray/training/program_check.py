"""A program against the code that it was traced from, on a few records: a courtesy, as isolation holds whatever comes out."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from fedray.data.inputs import leaves, rebuilt, taken
from fedray.data.shards import Shard
from fedray.models import Loss, call_model
from fedray.params import Layout
from fedray.streams import RoundKeys
from fedray.training.alone import AloneGradients
from fedray.training.draws import Batch
from fedray.training.program import Program, Untraceable

_RECORDS = 3
_MOST_APART = 1e-2  # relative; float32 in another order is 1e-6 apart, other code 1
_CPU = torch.device("cpu")


def check_program(program: Program, model: nn.Module, loss: Loss, shard: Shard) -> None:
    """Check that a program gives the gradients that autograd gives, record by record, away from the initial parameters.

    Args:
        program: Of the model and loss. One that draws is not checked: its draws are its own.
        model: In train mode; stays unchanged.
        loss: Maps (output, target) to one value a record.
        shard: Gives a few records.

    Raises:
        Untraceable: It does not, so the code does something that a trace does not see.
    """
    if program.draws:
        return
    model, layout = copy.deepcopy(model), Layout.of(model)
    random = torch.Generator().manual_seed(0)  # any values do
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=random)
                parameter.add_(noise, alpha=0.05 * float(parameter.std(correction=0)) + 0.01)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = AloneGradients(lambda _: program, layout, _CPU, 2**31)
    gradients.bytes_per_record(shard)
    gradients.bind(
        torch.from_numpy(layout.flatten(model)).unsqueeze(0), (RoundKeys(round_key=bytes(32), round_index=1), [0])
    )
    for record in range(min(_RECORDS, shard.num_records)):
        x, y = taken(shard.x, slice(record, record + 1)), shard.y[record : record + 1]
        expected = _by_autograd(model, loss, rebuilt(x, [leaf.clone() for leaf in leaves(x)]), y.clone(), params)
        found = torch.zeros(1, layout.num_params)
        with torch.no_grad():
            gradients.add_weighted(found, _batch(x, y, record), 0, np.ones(1))
        distance, length = float((found[0] - expected).norm()), float(expected.norm())
        if np.isfinite(length) and distance > _MOST_APART * length + 1e-5:
            raise Untraceable(
                f"its gradient on a record is not the one that was traced ({distance:.2g} apart, of length {length:.2g}); what "
                "it computes must follow from its inputs by operations of torch alone"
            )


def _by_autograd(model: nn.Module, loss: Loss, x: object, y: torch.Tensor, params: list[nn.Parameter]) -> torch.Tensor:
    total = loss(call_model(model, x), y).sum()  # type: ignore[arg-type]  # inputs, rebuilt
    if not total.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in params))
    found = torch.autograd.grad(total, params, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
    return torch.cat([part.flatten() for part in parts])


def _batch(x: object, y: torch.Tensor, record: int) -> Batch:
    return Batch(
        x=rebuilt(x, [leaf.unsqueeze(0) for leaf in leaves(x)]),
        y=y.unsqueeze(0),
        mask=torch.ones(1, 1),
        sizes=np.ones(1, np.int64),
        drawn=[np.array([record])],
        starts=np.zeros(1, np.int64),
    )
