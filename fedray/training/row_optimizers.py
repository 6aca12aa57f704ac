"""Adam and SGD on a matrix whose rows are independent gateways; torch.optim's arithmetic, row by row."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from fedray.privacy.constants import constant

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


class RowOptimizer(Protocol):
    """Steps all rows, or some."""

    def step(self, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Move the parameters against gradient / divisor.

        Args:
            gradient: `[G, P]`; may be overwritten.
            rows: Indices of the rows that step, None for all; a row that does not step keeps its state.
        """
        ...


class RowSGD:
    """Plain stochastic gradient descent (Robbins and Monro 1951)."""

    def __init__(self, params: torch.Tensor, lr: float, divisor: float) -> None:
        self._params = params
        self._rate = lr / divisor

    def step(self, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See `RowOptimizer.step`."""
        if rows is None:
            self._params.add_(gradient, alpha=-self._rate)
        else:
            self._params.index_add_(0, rows, gradient[rows], alpha=-self._rate)


class RowAdam:
    """Adam (Kingma and Ba 2015) with torch's defaults; state starts at zero, as local optimizers start fresh each round.

    While all rows step together this is torch's fused kernel on the whole matrix; rows that skipped a step need bias
    corrections of their own. The moments are those of the gradient before its division, which spares the division: in the
    quotient of the two, with epsilon as much larger, the divisor cancels.
    """

    def __init__(self, params: torch.Tensor, lr: float, divisor: float) -> None:
        self._params = params
        self._lr = lr
        self._eps = _EPS * divisor
        self._mean = torch.zeros_like(params)
        self._square = torch.zeros_like(params)
        self._steps = torch.zeros((), device=params.device)
        self._own_steps: torch.Tensor | None = None  # per row, once rows have stepped apart

    def step(self, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See `RowOptimizer.step`."""
        if rows is not None and self._own_steps is None:
            self._own_steps = self._steps.expand(len(self._params), 1).clone()
        if self._own_steps is not None:
            self._step_apart(gradient, rows)
            return
        self._steps += constant(1.0)
        # torch.optim would check and group its arguments anew each step, which takes longer than the kernel.
        torch._fused_adam_(
            [self._params],
            [gradient],
            [self._mean],
            [self._square],
            [],
            [self._steps],
            lr=self._lr,
            beta1=_BETA1,
            beta2=_BETA2,
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )

    def _step_apart(self, gradient: torch.Tensor, rows: torch.Tensor | None) -> None:
        assert self._own_steps is not None
        chosen = torch.arange(len(self._params), device=self._params.device) if rows is None else rows
        self._own_steps[chosen] += 1
        own = gradient[chosen]
        mean = self._mean[chosen].mul_(_BETA1).add_(own, alpha=1 - _BETA1)
        square = self._square[chosen].mul_(_BETA2).addcmul_(own, own, value=1 - _BETA2)
        self._mean[chosen], self._square[chosen] = mean, square
        steps = self._own_steps[chosen].double()
        correction1, correction2 = (1 - _BETA1**steps).float(), (1 - _BETA2**steps).sqrt().float()
        change = mean / correction1 / (square.sqrt() / correction2 + self._eps)
        self._params.index_add_(0, chosen, change, alpha=-self._lr)


def new_row_optimizer(kind: Literal["adam", "sgd"], params: torch.Tensor, lr: float, divisor: float) -> RowOptimizer:
    """Return a fresh optimizer of `params` `[G, P]`, which it updates in place; `divisor` divides every gradient."""
    return RowAdam(params, lr, divisor) if kind == "adam" else RowSGD(params, lr, divisor)
