"""Runs LSTM, GRU and RNN layers as explicit loops over time, so that a trace sees how their weights are used.

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
        dropout: Applied between layers.

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
    if kind != "gru" and b_in is not None:  # the two are added, so one sum for all steps does for both
        b_in, b_state = b_in + b_state, None  # type: ignore[operator]  # both are there or neither is
    inputs = torch.nn.functional.linear(x, w_in, b_in)
    if tapped[0] is not None:
        inputs = tap(tapped[0], x, inputs)
    if reverse:
        inputs = inputs.flip(0)
    with torch.no_grad():
        kept, before, last = _FORWARD[kind](inputs, *state, w_state, b_state)
    # What each step's state gives: of no use for values, which are there already, but for the weight's gradient.
    through = torch.nn.functional.linear(before, w_state, b_state)
    if tapped[1] is not None:
        through = tap(tapped[1], before, through)
    output, *finals = _Recurrence.apply(kind, len(state), inputs, through, *state, w_state.detach(), *kept, *last)  # type: ignore[no-untyped-call]  # torch is untyped here
    return (output.flip(0) if reverse else output), finals


class _Recurrence(torch.autograd.Function):
    """Values that are known, with the gradient of the recurrence that they come from."""

    @staticmethod
    def forward(ctx: Any, kind: str, num_states: int, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs `[T, 1, H]` and the last states."""
        _inputs, _through, *rest = values
        w_state, *kept = rest[num_states:]
        last = kept[len(kept) - num_states :]
        ctx.kind, ctx.num_states = kind, num_states
        kept = kept[: len(kept) - num_states]
        ctx.save_for_backward(w_state, *kept)
        return (kept[0].clone(), *(value.clone() for value in last))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs, of what states gave, and of the first states."""
        w_state, *kept = ctx.saved_tensors
        found = _BACKWARD[ctx.kind](gradients[0], gradients[1:], w_state, kept)
        return (None, None, *found, *(None for _ in range(1 + len(kept) + ctx.num_states)))


_Kept = list[torch.Tensor]


def _lstm(
    inputs: torch.Tensor, h: torch.Tensor, c: torch.Tensor, w_state: torch.Tensor, b_state: Any
) -> tuple[_Kept, torch.Tensor, _Kept]:
    """Run an LSTM (Hochreiter and Schmidhuber 1997): gates i, f, g, o in torch's order."""
    befores, outputs, cells, opened, new, bent = [], [], [], [], [], []
    turned, size = w_state.t(), h.shape[-1]
    for step in inputs:
        befores.append(h)
        cells.append(c)
        gates = torch.addmm(step, h, turned)
        gate, fresh = torch.sigmoid(gates), torch.tanh(gates[:, 2 * size : 3 * size])
        i, f, _, o = gate.chunk(4, -1)
        c = torch.addcmul(f * c, i, fresh)
        curved = torch.tanh(c)
        h = o * curved
        outputs.append(h)
        opened.append(gate)
        new.append(fresh)
        bent.append(curved)
    kept = [torch.stack(values) for values in (outputs, cells, opened, new, bent)]
    return kept, torch.stack(befores), [h, c]


def _lstm_backward(
    output: torch.Tensor, last: Sequence[torch.Tensor], w_state: torch.Tensor, kept: _Kept
) -> list[torch.Tensor]:
    _, cells, opened, new, bent = kept
    i, f, _, o = opened.chunk(4, -1)
    # What the gates' gradients are of those of cell and state, for all steps at once.
    shares = torch.cat([new * i * (1 - i), cells * f * (1 - f), i * (1 - new * new), bent * o * (1 - o)], -1)
    curve = o * (1 - bent * bent)
    dh, dc = last
    found = []
    for step in range(len(output) - 1, -1, -1):
        dh = output[step] + dh
        dc = torch.addcmul(dc, dh, curve[step])
        found.append(torch.cat([dc, dc, dc, dh], -1) * shares[step])
        dh, dc = torch.mm(found[-1], w_state), dc * f[step]
    gates = torch.stack(found[::-1])
    return [gates, gates, dh, dc]


def _gru(
    inputs: torch.Tensor, h: torch.Tensor, w_state: torch.Tensor, b_state: Any
) -> tuple[_Kept, torch.Tensor, _Kept]:
    """Run a GRU (Cho et al. 2014) as torch defines it: gates r, z, n."""
    befores, outputs, opened, new, states = [], [], [], [], []
    turned, size = w_state.t(), h.shape[-1]
    first, second = inputs[..., : 2 * size], inputs[..., 2 * size :]
    for step in range(len(inputs)):
        befores.append(h)
        through = torch.mm(h, turned) if b_state is None else torch.addmm(b_state, h, turned)
        gate = torch.sigmoid(first[step] + through[:, : 2 * size])
        r, z = gate.chunk(2, -1)
        fresh = torch.tanh(torch.addcmul(second[step], r, through[:, 2 * size :]))
        h = torch.lerp(fresh, h, z)
        outputs.append(h)
        opened.append(gate)
        new.append(fresh)
        states.append(through[:, 2 * size :])
    before = torch.stack(befores)
    kept = [torch.stack(outputs), before, *(torch.stack(values) for values in (opened, new, states))]
    return kept, before, [h]


def _gru_backward(
    output: torch.Tensor, last: Sequence[torch.Tensor], w_state: torch.Tensor, kept: _Kept
) -> list[torch.Tensor]:
    _, before, opened, new, states = kept
    r, z = opened.chunk(2, -1)
    fresh = (1 - z) * (1 - new * new)
    gates = torch.cat([fresh * states * r * (1 - r), (before - new) * z * (1 - z)], -1)
    shares = torch.cat([gates, fresh * r], -1)
    (dh,) = last
    found, states_found = [], []
    for step in range(len(output) - 1, -1, -1):
        dh = output[step] + dh
        states_found.append(dh)
        found.append(torch.cat([dh, dh, dh], -1) * shares[step])
        dh = torch.addmm(dh * z[step], found[-1], w_state)
    through, all_dh = torch.stack(found[::-1]), torch.stack(states_found[::-1])
    inputs = torch.cat([through[..., : gates.shape[-1]], all_dh * fresh], -1)
    return [inputs, through, dh]


def _plain(bend: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def run(
        inputs: torch.Tensor, h: torch.Tensor, w_state: torch.Tensor, b_state: Any
    ) -> tuple[_Kept, torch.Tensor, _Kept]:
        """Run a recurrence with one activation (Elman 1990)."""
        befores, outputs, turned = [], [], w_state.t()
        for step in inputs:
            befores.append(h)
            h = bend(torch.addmm(step, h, turned))
            outputs.append(h)
        return [torch.stack(outputs)], torch.stack(befores), [h]

    return run


def _plain_backward(slope: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def run(
        output: torch.Tensor, last: Sequence[torch.Tensor], w_state: torch.Tensor, kept: _Kept
    ) -> list[torch.Tensor]:
        slopes, (dh,), found = slope(kept[0]), last, []
        for step in range(len(output) - 1, -1, -1):
            found.append((output[step] + dh) * slopes[step])
            dh = torch.mm(found[-1], w_state)
        gates = torch.stack(found[::-1])
        return [gates, gates, dh]

    return run


_FORWARD: dict[str, Any] = {"lstm": _lstm, "gru": _gru, "tanh": _plain(torch.tanh), "relu": _plain(torch.relu)}
_BACKWARD: dict[str, Any] = {
    "lstm": _lstm_backward,
    "gru": _gru_backward,
    "tanh": _plain_backward(lambda output: 1 - output * output),
    "relu": _plain_backward(lambda output: (output > 0).to(output.dtype)),
}
