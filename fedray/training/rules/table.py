"""The rules by which operations run with a leading dimension of records, by the operation's name.

A rule gets a `Call` and returns the expression that gives the result, or None where it does not cover the call.
"""

from __future__ import annotations

from fedray.training.rules.call import Rule
from fedray.training.rules.images import (
    convolution,
    convolution_backward,
    group_norm,
    group_norm_backward,
    max_pool2d,
    max_pool2d_gradient,
    pool,
)
from fedray.training.rules.matrices import addmm, bmm, mm
from fedray.training.rules.rows import embedding, embedding_backward, layer_norm_backward, nll, nll_backward
from fedray.training.rules.values import (
    copied,
    dims,
    expand,
    full_reduction,
    gather,
    glu_backward,
    index,
    joined,
    leading,
    log_sigmoid,
    matrix_transpose,
    one_dim,
    permute,
    reduction,
    repeat,
    reshape,
    softmax_backward,
    transpose,
    value_by_value,
    view_backward,
)

_A = "aten."

# Operations on single values that lack torch's tag for them; losses with the position of their reduction.
_VALUES: dict[str, int | None] = {
    "elu_backward.default": None,
    "hardshrink_backward.default": None,
    "hardsigmoid_backward.default": None,
    "hardswish.default": None,
    "hardswish_backward.default": None,
    "hardtanh_backward.default": None,
    "leaky_relu_backward.default": None,
    "log_sigmoid_backward.default": None,
    "mish_backward.default": None,
    "softplus_backward.default": None,
    "softshrink_backward.default": None,
    "binary_cross_entropy.default": 3,
    "binary_cross_entropy_backward.default": 4,
    "huber_loss.default": 2,
    "huber_loss_backward.default": 3,
    "mse_loss.default": 2,
    "mse_loss_backward.default": 3,
    "smooth_l1_loss.default": 2,
    "smooth_l1_loss_backward.default": 3,
}
VALUE_BY_VALUE: dict[str, Rule] = {f"aten.{name}": value_by_value(place) for name, place in _VALUES.items()}
"""Rules that hold for arguments of records and of their gateways alike."""
RULES: dict[str, Rule] = {
    **VALUE_BY_VALUE,
    "aten.log_sigmoid_forward.default": log_sigmoid,
    "aten.glu.default": dims(1),
    "aten.glu_backward.default": glu_backward,
    **dict.fromkeys(
        [
            _A + name
            for name in (
                "view.default",
                "_unsafe_view.default",
                "reshape.default",
                "unsqueeze.default",
                "squeeze.default",
                "squeeze.dim",
                "squeeze.dims",
            )
        ],
        reshape,
    ),
    "aten.expand.default": expand,
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    "aten.t.default": matrix_transpose,
    "aten.select.int": dims(1),
    "aten.slice.Tensor": dims(1),
    "aten.split.Tensor": dims(2),
    "aten.split_with_sizes.default": dims(2),
    "aten.unbind.int": dims(1),
    "aten.flip.default": dims(1),
    "aten.index_select.default": dims(1),
    "aten.cumsum.default": dims(1),
    "aten._softmax.default": dims(1),
    "aten._log_softmax.default": dims(1),
    "aten._softmax_backward_data.default": softmax_backward,
    "aten._log_softmax_backward_data.default": softmax_backward,
    "aten.cat.default": joined,
    "aten.stack.default": joined,
    "aten.slice_backward.default": view_backward,
    "aten.select_backward.default": view_backward,
    "aten.sum.dim_IntList": reduction,
    "aten.mean.dim": reduction,
    "aten.amax.default": reduction,
    "aten.amin.default": reduction,
    "aten.logsumexp.default": reduction,
    "aten.var.correction": reduction,
    "aten.any.dim": one_dim,
    "aten.all.dim": one_dim,
    "aten.argmax.default": one_dim,
    "aten.argmin.default": one_dim,
    "aten.max.dim": one_dim,
    "aten.min.dim": one_dim,
    "aten.sum.default": full_reduction("aten.sum.dim_IntList"),
    "aten.mean.default": full_reduction("aten.mean.dim"),
    "aten.mm.default": mm,
    "aten.addmm.default": addmm,
    "aten.bmm.default": bmm,
    "aten.constant_pad_nd.default": leading,
    "aten.tril.default": leading,
    "aten.triu.default": leading,
    "aten._to_copy.default": copied,
    "aten.native_layer_norm.default": lambda call: (
        leading(call) if call.args[2] is None and call.args[3] is None else None
    ),
    "aten.native_layer_norm_backward.default": layer_norm_backward,
    "aten.native_group_norm.default": group_norm,
    "aten.native_group_norm_backward.default": group_norm_backward,
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": convolution_backward,
    "aten.max_pool2d_with_indices.default": max_pool2d,
    "aten.max_pool2d_with_indices_backward.default": max_pool2d_gradient,
    "aten.max_pool3d_with_indices.default": pool(3),
    "aten.max_pool3d_with_indices_backward.default": pool(3, 2),
    "aten.avg_pool2d.default": pool(2),
    "aten.avg_pool2d_backward.default": pool(2, 2),
    "aten.avg_pool3d.default": pool(3),
    "aten.avg_pool3d_backward.default": pool(3, 2),
    "aten._adaptive_avg_pool2d.default": pool(2),
    "aten._adaptive_avg_pool2d_backward.default": pool(2, 2),
    "aten.embedding.default": embedding,
    "aten.embedding_dense_backward.default": embedding_backward,
    "aten.nll_loss_forward.default": nll,
    "aten.nll_loss_backward.default": nll_backward,
    "aten.index.Tensor": index,
    "aten.gather.default": gather,
    "aten.scatter_add.default": gather,
    "aten.scatter.src": gather,
    "aten.scatter.value": gather,
    "aten.repeat.default": repeat,
}
"""By name of the operation; operations on single values need none."""
