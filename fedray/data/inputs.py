"""What a record's x may be: a tensor, a tuple of tensors or a dict of tensors; and what is done leaf by leaf.

Knows the structure of x alone: neither what its values mean nor how records are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Inputs = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
"""What a model is given for n records: each tensor is `[n, …]`. A tuple holds its arguments, a dict its named ones."""
InputArrays = Array | tuple[Array, ...] | dict[str, Array]
"""The same as numpy arrays."""


@overload
def leaves(x: Inputs) -> list[torch.Tensor]: ...
@overload
def leaves(x: InputArrays) -> list[Array]: ...
@overload
def leaves(x: object) -> list[Any]: ...
def leaves(x: Any) -> list[Any]:
    """Return the tensors or arrays of x, or what else lies in its structure, in order."""
    if isinstance(x, Mapping):
        return list(x.values())
    return list(x) if isinstance(x, tuple) else [x]


def leaf_names(x: object, name: str = "x") -> list[str]:
    """Return what errors and digests call the leaves, in order: x, x[0] or x['mask']."""
    if isinstance(x, Mapping):
        return [f"{name}[{key!r}]" for key in x]
    return [f"{name}[{index}]" for index in range(len(x))] if isinstance(x, tuple) else [name]


def rebuilt(like: object, parts: Sequence[Any]) -> Any:
    """Return `parts`, one a leaf, in the structure of `like`."""
    if isinstance(like, Mapping):
        return dict(zip(like, parts, strict=True))
    return tuple(parts) if isinstance(like, tuple) else parts[0]


@overload
def taken(x: Inputs, index: Any) -> Inputs: ...
@overload
def taken(x: InputArrays, index: Any) -> InputArrays: ...
def taken(x: Any, index: Any) -> Any:
    """Return the records that an index, a slice or a mask names."""
    return rebuilt(x, [leaf[index] for leaf in leaves(x)])


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the records of several x of one structure, one after the other."""
    columns = zip(*(leaves(part) for part in parts), strict=True)
    return rebuilt(parts[0], [torch.cat(column) for column in columns])  # type: ignore[no-any-return]  # as parts[0]


def tensors(x: InputArrays) -> Inputs:
    """Return a copy as tensors: arrays may be read-only views of memory that other processes share."""
    return rebuilt(x, [torch.from_numpy(np.array(leaf)) for leaf in leaves(x)])  # type: ignore[no-any-return]  # as x


def arrays(x: Inputs) -> InputArrays:
    """Return views of tensors on the CPU as numpy arrays."""
    return rebuilt(x, [leaf.numpy() for leaf in leaves(x)])  # type: ignore[no-any-return]  # as x


def on(x: Inputs, device: torch.device) -> Inputs:
    """Return x on a device."""
    return rebuilt(x, [leaf.to(device) for leaf in leaves(x)])  # type: ignore[no-any-return]  # as x


def only_leaf(x: Inputs) -> torch.Tensor:
    """Return the tensor of an x that has one, for models that take one argument whatever its name."""
    (leaf,) = leaves(x)
    return leaf


def same_structure(x: object, other: object) -> bool:
    """Tell whether both have leaves of the same names or number."""
    return leaf_names(x) == leaf_names(other)


def structure_name(x: object) -> str:
    """Return what errors call the structure: "one array", "a tuple of 2 arrays", "a dict of arrays 'ids', 'mask'"."""
    if isinstance(x, Mapping):
        return f"a dict of arrays {', '.join(map(repr, x))}"
    return f"a tuple of {len(x)} arrays" if isinstance(x, tuple) else "one array"
