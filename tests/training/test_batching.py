"""Every rule keeps records apart: operations on many records give what they give for each, whoever else is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedray.data.shards import Shard
from fedray.tasks.classification import cross_entropy
from fedray.training.batching import Batched
from fedray.training.engines import traced
from fedray.training.gateway_rules import MIXED
from fedray.training.program import Instruction, Program, Spec, Value, operator
from fedray.training.rules.table import RULES

A = "aten."
Make = Callable[[torch.Generator], tuple[list[Any], dict[str, Any]]]


def normal(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Return a source of normal values."""
    return lambda random: torch.randn(*shape, generator=random)


def whole(high: int, *shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Return a source of whole numbers."""
    return lambda random: torch.randint(high, shape, generator=random)


def share(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Return a source of values between 0 and 1."""
    return lambda random: torch.rand(*shape, generator=random)


N, W, U = normal, whole, share
# Operation, and its arguments for one record: sources give tensors, of which every choice is tried as of records or constant.
CALLS: list[tuple[str, list[Any]]] = [
    ("view.default", [N(2, 6), [3, 4]]),
    ("_unsafe_view.default", [N(2, 6), [12]]),
    ("unsqueeze.default", [N(2, 3), -1]),
    ("unsqueeze.default", [N(2, 3), 0]),
    ("squeeze.default", [N(1, 3, 1)]),
    ("squeeze.dim", [N(1, 3), 0]),
    ("squeeze.dims", [N(1, 3, 1), [0, 2]]),
    ("expand.default", [N(1, 3), [4, 3]]),
    ("expand.default", [N(3), [2, 4, 3]]),
    ("permute.default", [N(2, 3, 4), [2, 0, -2]]),
    ("transpose.int", [N(2, 3, 4), 0, -1]),
    ("t.default", [N(2, 3)]),
    ("t.default", [N(3)]),
    ("select.int", [N(2, 3), 0, 1]),
    ("select.int", [N(2, 3), -1, -1]),
    ("slice.Tensor", [N(5, 3), 0, 1, 4, 2]),
    ("slice.Tensor", [N(5, 3), -1, 0, 2, 1]),
    ("flip.default", [N(2, 3), [0]]),
    ("flip.default", [N(2, 3), [-1, 0]]),
    ("index_select.default", [N(4, 3), 0, lambda _: torch.tensor([2, 0])]),
    ("cumsum.default", [N(4, 3), 0]),
    ("_softmax.default", [N(4, 3), 0, False]),
    ("_softmax.default", [N(4, 3), -1, False]),
    ("_log_softmax.default", [N(4, 3), 1, False]),
    ("_softmax_backward_data.default", [N(4, 3), N(4, 3), 0, torch.float32]),
    ("_log_softmax_backward_data.default", [N(4, 3), N(4, 3), -1, torch.float32]),
    ("slice_backward.default", [N(2, 3), [5, 3], 0, 1, 3, 1]),
    ("select_backward.default", [N(3), [5, 3], 0, 4]),
    ("sum.dim_IntList", [N(4, 3), [0], False]),
    ("sum.dim_IntList", [N(4, 3), [-1, 0], True]),
    ("sum.dim_IntList", [N(1, 3), [0], True]),
    ("sum.dim_IntList", [N(1, 3), [0], False]),
    ("sum.dim_IntList", [N(4, 3), None, False]),
    ("sum.dim_IntList", [N(4, 3), [], False]),
    ("mean.dim", [N(4, 3), [0], True]),
    ("amax.default", [N(4, 3), [0], False]),
    ("amax.default", [N(4, 3), [], False]),
    ("amin.default", [N(4, 3), [1], True]),
    ("logsumexp.default", [N(4, 3), [0], False]),
    ("var.correction", [N(4, 3), [0]]),
    ("any.dim", [lambda r: torch.randn(4, 3, generator=r) > 0, 0, True]),
    ("all.dim", [lambda r: torch.randn(4, 3, generator=r) > 0, -1, False]),
    ("argmax.default", [N(4, 3), 0, False]),
    ("argmin.default", [N(4, 3), -1, True]),
    ("sum.default", [N(4, 3)]),
    ("mean.default", [N(4, 3)]),
    ("mm.default", [N(2, 3), N(3, 4)]),
    ("mm.default", [N(1, 3), N(3, 4)]),
    ("addmm.default", [N(4), N(2, 3), N(3, 4)]),
    ("addmm.default", [N(2, 4), N(2, 3), N(3, 4)]),
    ("bmm.default", [N(2, 3, 4), N(2, 4, 5)]),
    ("bmm.default", [N(1, 3, 4), N(1, 4, 5)]),
    ("constant_pad_nd.default", [N(2, 3), [1, 2], 0.5]),
    ("tril.default", [N(3, 3), 0]),
    ("triu.default", [N(3, 3), 1]),
    ("repeat.default", [N(3), [2, 2]]),
    ("repeat.default", [N(2, 3), [2, 1, 2]]),
    ("embedding.default", [N(7, 3), W(7, 2, 4), -1, False, False]),
    ("embedding_dense_backward.default", [N(4, 3), W(7, 4), 7, -1, False]),
    ("embedding_dense_backward.default", [N(4, 3), W(7, 4), 7, 2, False]),
    ("nll_loss_backward.default", [N(3), N(3, 4), W(4, 3), None, 0, -100, lambda _: torch.zeros(())]),
    ("gather.default", [N(4, 3), 1, W(3, 4, 2)]),
    ("scatter_add.default", [N(4, 3), 1, W(3, 4, 2), N(4, 2)]),
    ("scatter.src", [N(4, 1), 1, lambda _: torch.zeros(4, 1, dtype=torch.int64), N(4, 1)]),
    ("scatter.value", [N(4, 3), 1, W(3, 4, 1), 2.0]),
    ("convolution.default", [N(1, 4, 6, 6), N(6, 2, 3, 3), N(6), [2, 1], [1, 0], [1, 2], False, [0, 0], 2]),
    ("convolution.default", [N(1, 3, 6), N(3, 4, 2), None, [1], [0], [1], True, [0], 1]),
    ("avg_pool2d.default", [N(1, 2, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None]),
    ("_adaptive_avg_pool2d.default", [N(1, 2, 4, 4), [2, 2]]),
    ("_adaptive_avg_pool2d_backward.default", [N(1, 2, 2, 2), N(1, 2, 4, 4)]),
    ("avg_pool2d_backward.default", [N(1, 2, 2, 2), N(1, 2, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None]),
    ("avg_pool3d.default", [N(1, 2, 4, 4, 4), [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, None]),
    ("add.Tensor", [N(2, 3), N(3)]),
    ("mul.Tensor", [N(3), N(2, 3)]),
    ("where.self", [lambda r: torch.randn(2, 3, generator=r) > 0, N(3), N(())]),
    ("gelu.default", [N(2, 3)]),
    ("lerp.Tensor", [N(2, 3), N(3), N(2, 1)]),
    ("elu_backward.default", [N(2, 3), 1.0, 1.0, 1.0, False, N(2, 3)]),
    ("hardshrink_backward.default", [N(2, 3), N(2, 3), 0.5]),
    ("hardsigmoid_backward.default", [N(2, 3), N(2, 3)]),
    ("hardswish.default", [N(2, 3)]),
    ("hardswish_backward.default", [N(2, 3), N(2, 3)]),
    ("hardtanh_backward.default", [N(2, 3), N(2, 3), -1.0, 1.0]),
    ("leaky_relu_backward.default", [N(2, 3), N(2, 3), 0.1, False]),
    ("log_sigmoid_backward.default", [N(2, 3), N(2, 3), N(2, 3)]),
    ("mish_backward.default", [N(2, 3), N(2, 3)]),
    ("softplus_backward.default", [N(2, 3), N(2, 3), 1.0, 20.0]),
    ("softshrink_backward.default", [N(2, 3), N(2, 3), 0.5]),
    ("binary_cross_entropy.default", [U(2, 3), U(2, 3), None, 0]),
    ("binary_cross_entropy_backward.default", [N(2, 3), U(2, 3), U(2, 3), None, 0]),
    ("huber_loss.default", [N(3), N(3), 0, 1.0]),
    ("huber_loss_backward.default", [N(3), N(3), N(3), 0, 1.0]),
    ("mse_loss.default", [N(3), N(3), 0]),
    ("mse_loss.default", [N(3), N(3), 1]),
    ("mse_loss_backward.default", [N(3), N(3), N(3), 0]),
    ("smooth_l1_loss.default", [N(3), N(3), 0, 1.0]),
    ("smooth_l1_loss_backward.default", [N(3), N(3), N(3), 0, 1.0]),
    ("glu.default", [N(4, 3), 0]),
    ("glu_backward.default", [N(2, 3), N(4, 3), 0]),
    # Without a rule; torch.vmap would fill all records with one record's value.
    ("index_fill.int_Tensor", [N(4, 3), 0, lambda _: torch.tensor([2, 0]), N(())]),
    ("roll.default", [N(4, 3), [1], [0]]),
    ("trace.default", [N(3, 3)]),
]  # fmt: skip
# Operations with several results, or arguments that must belong together; tried with all tensors of records.
WHOLE: list[tuple[str, Callable[[torch.Generator], list[Any]]]] = [
    ("split.Tensor", lambda r: [N(4, 3)(r), 2, 0]),
    ("split_with_sizes.default", lambda r: [N(4, 3)(r), [1, 2], -1]),
    ("unbind.int", lambda r: [N(4, 3)(r), 0]),
    ("unbind.int", lambda r: [N(4, 3)(r), 1]),
    ("max.dim", lambda r: [N(4, 3)(r), 0, False]),
    ("min.dim", lambda r: [N(4, 3)(r), -1, True]),
    ("native_layer_norm.default", lambda r: [N(2, 3)(r), [3], None, None, 1e-5]),
    ("native_group_norm.default", lambda r: [N(1, 4, 3)(r), None, None, 1, 4, 3, 2, 1e-5]),
    ("max_pool2d_with_indices.default", lambda r: [N(1, 2, 4, 4)(r), [2, 2], [2, 2], [0, 0], [1, 1], False]),
    ("max_pool3d_with_indices.default", lambda r: [N(1, 2, 4, 4, 4)(r), [2] * 3, [2] * 3, [0] * 3, [1] * 3, False]),
    ("nll_loss_forward.default", lambda r: [N(3, 4)(r), W(4, 3)(r), None, 0, -100]),
    ("log_sigmoid_forward.default", lambda r: [N(2, 3)(r)]),
    (
        "convolution_backward.default",
        lambda r: [N(1, 6, 4, 4)(r), N(1, 4, 6, 6)(r), N(6, 2, 3, 3)(r), [6], *CONVOLUTION, 2, [True] * 3],
    ),
]  # fmt: skip
CONVOLUTION: list[Any] = [[1, 1], [0, 0], [1, 1], False, [0, 0]]
SHARED_WEIGHT = {"convolution_backward.default": {2}}
"""Arguments that belong to a gateway or are constant, never to a record."""


def run(op: str, single: list[Any], kinds: dict[int, str], m: int, b: int, random: torch.Generator) -> None:
    """Run an operation by its rule, and record by record; compare.

    Args:
        op: Without its namespace.
        single: Arguments for one record.
        kinds: Of tensor arguments by position: "record", "gateway" or "constant".
        m: Gateways.
        b: Records of each.
        random: Gives the values of the other records.
    """

    def more(value: torch.Tensor, number: int) -> torch.Tensor:
        if value.is_floating_point():
            make = torch.rand if op.startswith("binary") else torch.randn
            return make(number, *value.shape, generator=random)
        # Any whole numbers of the record's would do; each record has its own order.
        return torch.stack(
            [value.flatten()[torch.randperm(value.numel(), generator=random)].view_as(value) for _ in range(number)]
        )

    n, sizes = m * b, {"record": m * b, "gateway": m}
    tensors = [position for position, value in enumerate(single) if isinstance(value, torch.Tensor)]
    filled = {p: more(single[p], sizes[kinds[p]]) if kinds[p] in sizes else single[p] for p in tensors}
    of_kind = {kind: [p for p in tensors if kinds[p] == kind] for kind in ("gateway", "constant", "record")}
    order = [*of_kind["gateway"], *of_kind["constant"], *of_kind["record"]]
    index = {position: number for number, position in enumerate(order)}
    args = tuple(Value(index[p]) if p in index else value for p, value in enumerate(single))
    expected_one = operator(A + op)(*single)
    spec = None
    out = len(order) + 1  # after the target
    if isinstance(expected_one, torch.Tensor):
        spec = Spec(shape=tuple(expected_one.shape), dtype=expected_one.dtype)
    program = Program(
        params=tuple(tuple(single[p].shape) for p in of_kind["gateway"]),
        constants=tuple(single[p] for p in of_kind["constant"]),
        draws=(),
        num_inputs=len(of_kind["record"]),
        instructions=(Instruction(op=A + op, args=args, kwargs={}, out=out, spec=spec),),
        gradients=(out,),
        sites=(),
        specs={index[p]: Spec(shape=tuple(single[p].shape), dtype=single[p].dtype) for p in tensors},
    )
    batched = Batched(program, "gateways")
    assert not batched.without_rule or A + op in batched.without_rule
    (found,) = batched.run(
        [filled[p] for p in of_kind["gateway"]],
        program.constants,
        (),
        [filled[p] for p in of_kind["record"]],
        torch.zeros(n),
        n,
        m,
        b,
    )
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    for record in range(n):
        own = [
            filled[p][record] if p in filled and kinds[p] == "record"
            else filled[p][record // b] if p in filled and kinds[p] == "gateway"
            else value
            for p, value in enumerate(single)
        ]  # fmt: skip
        expected = operator(A + op)(*own)
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        for part, one in zip(parts, expected, strict=True):
            if part is None or one is None or (op.startswith("nll_loss_forward") and one.dim() == 0):
                continue
            row = (
                part[record] if out in batched.of_records else part[record // b] if out in batched.of_gateways else part
            )
            torch.testing.assert_close(row, one, rtol=1e-4, atol=1e-5)


def _choices(single: list[Any]) -> list[dict[int, str]]:
    tensors = [p for p, value in enumerate(single) if isinstance(value, torch.Tensor)]
    found: list[dict[int, str]] = [{}]
    for position in tensors:
        found = [{**one, position: kind} for one in found for kind in ("record", "gateway", "constant")]
    return [one for one in found if any(kind != "constant" for kind in one.values())]


@pytest.mark.parametrize(("op", "sources"), CALLS, ids=[f"{op} {i}" for i, (op, _) in enumerate(CALLS)])
def test_rule_gives_what_each_record_gives(op: str, sources: list[Any]) -> None:
    random = torch.Generator().manual_seed(1)
    single = [source(random) if callable(source) else source for source in sources]
    for kinds in _choices(single):
        run(op, single, kinds, 2, 3, random)


@pytest.mark.parametrize(("op", "make"), WHOLE, ids=[f"{op} {i}" for i, (op, _) in enumerate(WHOLE)])
def test_rule_with_several_results_gives_what_each_record_gives(op: str, make: Callable[..., list[Any]]) -> None:
    random = torch.Generator().manual_seed(1)
    single = make(random)
    fixed = SHARED_WEIGHT.get(op, set())
    for weights in ("gateway", "constant") if fixed else ("record",):
        kinds = {p: weights if p in fixed else "record" for p, v in enumerate(single) if isinstance(v, torch.Tensor)}
        run(op, single, kinds, 2, 3, random)


ACTIVATIONS = [
    *(nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.LogSigmoid, nn.Sigmoid, nn.GLU, nn.PReLU),
]  # fmt: skip
LOSSES = [
    *(functional.mse_loss, functional.huber_loss, functional.smooth_l1_loss, functional.l1_loss),
    *(functional.binary_cross_entropy_with_logits, functional.poisson_nll_loss),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_usual_activations_do_not_run_record_by_record(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(4 if activation is nn.GLU else 8, 3)).train()
    shard = Shard(x=torch.randn(3, 6), y=torch.tensor([0, 2, 1]))
    program = traced("alone", model, cross_entropy, shard)
    assert program is not None
    assert not Batched(program).without_rule + Batched(program, "gateways").without_rule


def of_shares(output: torch.Tensor, y: torch.Tensor, reduction: str) -> torch.Tensor:
    """Binary cross-entropy of probabilities, whose kernel takes no NaN."""
    return functional.binary_cross_entropy(output.sigmoid(), y, reduction=reduction)


@pytest.mark.parametrize("loss", [*LOSSES, of_shares])
def test_usual_losses_do_not_run_record_by_record(loss: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0)).train()
    shard = Shard(x=torch.randn(3, 6), y=torch.tensor([0.0, 1.0, 1.0]))
    program = traced("alone", model, lambda output, y: loss(output, y, reduction="none"), shard)
    assert program is not None
    assert not Batched(program).without_rule + Batched(program, "gateways").without_rule


BY_FAMILIES = {
    "cat.default",
    "stack.default",
    "index.Tensor",
    "_to_copy.default",
    "reshape.default",
    "native_layer_norm_backward.default",
    "native_group_norm_backward.default",
    "max_pool2d_with_indices_backward.default",
    "max_pool3d_with_indices_backward.default",
    "avg_pool3d_backward.default",
}
"""Rules that only whole models try (tests/training/test_families.py): their arguments come from other operations."""


def test_every_rule_is_tried() -> None:
    tried = {A + op for op, _ in CALLS} | {A + op for op, _ in WHOLE} | {A + op for op in BY_FAMILIES}
    assert not {*RULES, *MIXED} - tried
