"""Checks a traced program on a few records: against the user's code, and many records at once against each alone.

Isolation rests on how programs are made and repeated; these checks find what that reasoning may have missed, at the shapes
and memory layouts of the model at hand, before anything is released.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedray.data.inputs import Inputs, leaves, rebuilt, taken
from fedray.data.shards import Shard
from fedray.models.calls import call_model
from fedray.models.layout import Layout
from fedray.privacy.shapes import FixedClipping
from fedray.privacy.streams import RoundKeys
from fedray.tasks.own_loss import Loss
from fedray.training.draws import Batch
from fedray.training.program import Draw, Untraceable
from fedray.training.record_draws import RecordDraws
from fedray.training.record_gradients import RecordGradients

_GROUPS = (([0], [[0, 1, 2, 3]]), ([0, 1], [[0, 1], [2, 3]]))  # gateways, and each one's records
_MOST_APART = 1e-2  # relative; float32 in another order is 1e-6 apart, other code 1
_ROUNDING = 1e-5  # relative
_CLIP_NORM = 1e17  # clips nothing, and leaves out what is not finite
_CPU = torch.device("cpu")
_KEYS = RoundKeys(round_key=bytes(32), round_index=1)  # of draws that train nobody
_A = torch.ops.aten


def check_gradients(
    make: Callable[[], RecordGradients], draws: Sequence[Draw], model: nn.Module, loss: Loss, shard: Shard
) -> None:
    """Check that per-record gradients are right and independent of other records, away from the initial parameters.

    Each record's gradient must equal autograd's with the same random numbers; records side by side must have the
    gradients of each alone; and a record or gateway that is replaced by NaN must leave other gateways' sums the same to
    the bit, and the sum over its own gateway's other records but for rounding.

    Args:
        make: Returns new `RecordGradients` on the CPU.
        draws: Random numbers that the model's forward pass draws.
        model: In train mode; stays unchanged.
        loss: Maps (output, target) to one value a record.
        shard: Its first records are used.

    Raises:
        Untraceable: One of these does not hold, so the code does something that a trace does not see.
    """
    try:
        checked = _Checked(make, draws, model, loss, shard)
        for record in range(min(3, shard.num_records)):
            checked.against_autograd(record)
        checked.side_by_side()
        checked.apart()
    except Untraceable:
        raise
    except Exception as error:  # the user's code may do anything, and so may its operations
        text = str(error).strip().split("\n")[0][:300]
        raise Untraceable(f"its gradients on a few records raised {type(error).__name__}: {text}") from error


class _Checked:
    def __init__(
        self, make: Callable[[], RecordGradients], draws: Sequence[Draw], model: nn.Module, loss: Loss, shard: Shard
    ) -> None:
        self._make, self._draws, self._loss, self._shard = make, draws, loss, shard
        self._model, self._layout = copy.deepcopy(model), Layout.of(model)
        random = torch.Generator().manual_seed(0)  # any values do
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.add_(noise, alpha=0.05 * float(parameter.std(correction=0)) + 0.01)
        first = torch.from_numpy(self._layout.flatten(self._model))
        # The gateways' parameters differ a little.
        self._params = torch.stack([first * (1 + 0.05 * gateway) for gateway in range(2)])

    def against_autograd(self, record: int) -> None:
        """Compare a record's gradient with autograd's through the user's code."""
        x, y = self._record(record)
        params = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        draws = RecordDraws(self._draws, _KEYS, [0], _CPU).of(0, np.array([[record]]))
        x, y = rebuilt(x, [leaf.clone() for leaf in leaves(x)]), y.clone()  # what is changed in place harms nobody
        with _SameDraws(draws) as same:
            total = self._loss(call_model(self._model, x), y).sum()
        if same.differ:
            raise Untraceable(
                "it draws other random numbers than those that were traced; draw the same for every record"
            )
        expected = torch.zeros(self._layout.num_params)
        if total.requires_grad:
            found = torch.autograd.grad(total, params, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
            expected = torch.cat([part.flatten() for part in parts])
        alone = self._sums([0], [[record]], self._params)[0]
        self._compare(
            alone,
            expected,
            "its gradient on a record is not the one that was traced ({}); what it computes must follow from its inputs by "
            "operations of torch alone, without hooks on gradients",
        )

    def side_by_side(self) -> None:
        """Compare the gradients of records side by side with those of each alone."""
        for gateways, batches in _GROUPS:
            together = self._sums(gateways, batches, self._params)
            for gateway, batch in zip(gateways, batches, strict=True):
                alone = [self._sums([gateway], [[record]], self._params)[0] for record in batch]
                self._compare(
                    together[gateway],
                    torch.stack(alone).sum(0),
                    "records side by side have another gradient than alone ({}), so one of its operations cannot be repeated "
                    "for many records",
                )

    def apart(self) -> None:
        """Check that a record or gateway of NaN moves no other one's gradient."""
        for gateways, batches in _GROUPS:
            without, spoilt = (
                self._sums(gateways, batches, self._params, without=1, spoilt=own) for own in (False, True)
            )
            self._same_bits(without, spoilt, slice(1, None))
            if not float((without[0] - spoilt[0]).norm()) <= _ROUNDING * float(without[0].norm()):
                raise Untraceable("one record moves another's gradient, so one of its operations couples them")
        first = self._sums(*_GROUPS[1], self._params)
        try:
            other = self._sums(*_GROUPS[1], self._with_second(torch.nan))
        except (IndexError, RuntimeError):  # a kernel that takes no NaN, as that of binary_cross_entropy
            other = self._sums(*_GROUPS[1], self._with_second(0.5))
        self._same_bits(first, other, slice(0, 1))

    def _with_second(self, factor: float) -> torch.Tensor:
        params = self._params.clone()
        params[1] *= factor
        return params

    def _record(self, record: int) -> tuple[Inputs, torch.Tensor]:
        record %= self._shard.num_records
        return taken(self._shard.x, slice(record, record + 1)), self._shard.y[record : record + 1]

    def _sums(
        self,
        gateways: Sequence[int],
        batches: Sequence[Sequence[int]],
        params: torch.Tensor,
        without: int | None = None,
        spoilt: bool = False,
    ) -> torch.Tensor:
        """Return each gateway's sum of gradients; the first gateway's record `without` does not count, and may be NaN."""
        gradients = self._make()
        gradients.bytes_per_record(self._shard)
        gradients.bind(params[list(gateways)], (_KEYS, list(gateways)))
        rows = [[self._record(record) for record in batch] for batch in batches]
        mask = torch.ones(len(batches), len(batches[0]))
        if without is not None:
            mask[0, without] = 0.0

        def run(other: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
            def stacked(parts: list[list[torch.Tensor]]) -> torch.Tensor:
                own = [list(row) for row in parts]
                if without is not None and spoilt:
                    own[0][without] = other(own[0][without], own[0][0])
                return torch.stack([torch.cat(row) for row in own])

            x = [stacked([[leaves(x)[i] for x, _ in row] for row in rows]) for i in range(len(leaves(rows[0][0][0])))]
            y = stacked([[y for _, y in row] for row in rows])
            batch = Batch(
                x=rebuilt(rows[0][0][0], x),
                y=y,
                mask=mask,
                sizes=np.full(len(batches), len(batches[0]), np.int64),
                drawn=[np.array(batch) for batch in batches],
                starts=np.zeros(len(batches), np.int64),
            )
            found = torch.zeros(len(gateways), self._layout.num_params)
            with torch.no_grad():
                gradients.add_clipped(found, batch, 0, _CLIP_NORM, FixedClipping())
            return found

        try:
            return run(lambda own, first: torch.full_like(own, torch.nan) if own.is_floating_point() else first)
        except (IndexError, RuntimeError):  # NaN makes no index
            if not spoilt:
                raise
        return run(lambda _, first: first)

    def _compare(self, found: torch.Tensor, expected: torch.Tensor, text: str) -> None:
        distance, length = float((found - expected).norm()), float(expected.norm())
        # Larger ones, and what is no number, count for nothing or are clipped.
        if length < 0.1 * _CLIP_NORM and not distance <= _MOST_APART * length + 1e-5:
            raise Untraceable(text.format(f"{distance:.2g} apart, of length {length:.2g}"))

    def _same_bits(self, one: torch.Tensor, other: torch.Tensor, gateways: slice) -> None:
        if not torch.equal(one[gateways], other[gateways]):
            raise Untraceable("one gateway moves another's gradient, so one of its operations couples them")


class _SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Gives code the random numbers that a program would be given, in the same order."""

    def __init__(self, draws: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._draws = list(draws)
        self._differ = False

    @property
    def differ(self) -> bool:
        """Whether other numbers were asked for, or too few."""
        return self._differ or bool(self._draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        law = _LAWS.get(func)
        if law is None:
            return func(*args, **named)
        like = args[0] if isinstance(args[0], torch.Tensor) else torch.empty(args[0])
        if not self._draws or self._draws[0].numel() != like.numel():
            self._differ = True
            return func(*args, **named)
        found = law(self._draws.pop(0).reshape(like.shape), *args)
        if func._schema.is_mutable:
            return args[0].copy_(found)
        return found.to(named.get("dtype") or (like.dtype if like is args[0] else torch.get_default_dtype()))


_LAWS: dict[Any, Callable[..., torch.Tensor]] = {
    _A.bernoulli_.float: lambda u, _, rate=0.5: u >= 1 - rate,
    _A.bernoulli.p: lambda u, _, rate=0.5: u >= 1 - rate,
    _A.bernoulli.default: lambda u, x: u >= 1 - x,
    _A.rand.default: lambda u, *_: u,
    _A.rand_like.default: lambda u, *_: u,
    _A.randn.default: lambda z, *_: z,
    _A.randn_like.default: lambda z, *_: z,
    _A.uniform_.default: lambda u, _, low=0.0, high=1.0: low + (high - low) * u,
    _A.normal_.default: lambda z, _, mean=0.0, std=1.0: mean + std * z,
}
