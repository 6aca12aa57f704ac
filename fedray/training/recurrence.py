"""LSTM, GRU and RNN layers as explicit loops over time: torch's own ones hide their weights from whoever looks on.

The input's part of all time steps is one product. The gradient of a weight comes from the loop's inputs and output
gradients, as that of any other matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tap = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
Dropout = Callable[[torch.Tensor, float, bool], torch.Tensor]


def run(kind: str, arguments: Sequence[Any], tapped: Sequence[int | None], tap: Tap, dropout: Dropout) -> Any:
    """Run a recurrent layer as torch defines it.

    Args:
        kind: "lstm", "gru", "tanh" or "relu".
        arguments: Of torch's operator: input, state(s), weights, has_biases, num_layers, dropout, train, bidirectional,
            batch_first.
        tapped: For each weight: which trainable parameter it is, if it is tapped.
        tap: Notes one use of a tapped weight.
        dropout: Between layers.

    Raises:
        ValueError: A packed sequence, or a layer with projections.
    """
    x, state, weights, has_biases, num_layers, rate, train, bidirectional, batch_first = arguments
    if isinstance(has_biases, list | tuple):
        raise ValueError("packed sequences are not supported; hand in padded ones and mask the loss")
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if len(weights) != each * num_layers * directions:
        raise ValueError("recurrent layers with proj_size are not supported; use a Linear layer behind it")
    x = x.transpose(0, 1) if batch_first else x  # [T, 1, in]
    states = list(state) if kind == "lstm" else [state]
    finals: list[list[torch.Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = slice(each * number, each * (number + 1))
            output, last = _direction(
                kind, x, [one[number] for one in states], weights[own], tapped[own], tap, reverse=direction == 1
            )
            outputs.append(output)
            for kept, value in zip(finals, last, strict=True):
                kept.append(value)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if layer < num_layers - 1:
            x = dropout(x, rate, train)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(kept) for kept in finals))


def _direction(
    kind: str,
    x: torch.Tensor,
    state: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    tapped: Sequence[int | None],
    tap: Tap,
    reverse: bool,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Run one direction of one layer: x `[T, 1, in]` to `[T, 1, H]`, and the last state."""
    w_in, w_state, *biases = weights
    b_in, b_state = biases or (None, None)
    if kind != "gru" and b_in is not None:  # the two are added, so one sum per step does for both
        b_in, b_state = b_in + b_state, None  # type: ignore[operator]  # both are there or neither is
    inputs = torch.nn.functional.linear(x, w_in, b_in)
    if tapped[0] is not None:
        inputs = tap(tapped[0], x, inputs)
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    h, *cells = state
    outputs: dict[int, torch.Tensor] = {}
    for step in order:
        through = torch.nn.functional.linear(h, w_state, b_state)
        if tapped[1] is not None:
            through = tap(tapped[1], h, through)
        if kind == "lstm":
            gates = inputs[step] + through
            gates = gates.view(*gates.shape[:-1], 4, -1)
            opened = torch.sigmoid(gates)
            cells = [opened[..., 1, :] * cells[0] + opened[..., 0, :] * torch.tanh(gates[..., 2, :])]
            h = opened[..., 3, :] * torch.tanh(cells[0])
        elif kind == "gru":
            size = through.shape[-1] // 3
            opened = torch.sigmoid(inputs[step][..., : 2 * size] + through[..., : 2 * size])
            new = torch.tanh(inputs[step][..., 2 * size :] + opened[..., :size] * through[..., 2 * size :])
            h = new + opened[..., size:] * (h - new)
        else:
            h = (torch.tanh if kind == "tanh" else torch.relu)(inputs[step] + through)
        outputs[step] = h
    return torch.stack([outputs[step] for step in range(len(x))]), [h, *cells]
