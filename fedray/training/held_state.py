"""Lists what a user's model and loss hold besides parameters, to name what their code changes or a resume differs in.

A model that remembers (a counter, a running mean, a closure's list) would let one record influence another's pass.
Traced programs do not remember, so nothing could leak; but they would not compute what the code says: it is refused by
name.
"""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedray.config.user_code import is_library
from fedray.tasks.own_loss import Loss

_DEEPEST = 6  # containers in containers
_LONGEST = 10_000  # entries of a container that are looked at
_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has: parameters, hooks and the like


def held_state(model: nn.Module, loss: Loss) -> dict[str, Any]:
    """Return a description of all that model and loss hold, by its name in errors; equal as long as nothing changes.

    It covers buffers, plain attributes of modules and of the loss, closures, default arguments and module globals that
    the code names, and the states of random number generators outside of torch.

    Args:
        model: Of the user.
        loss: Of the user, or the default one.
    """
    found: dict[str, Any] = {}
    for name, value in _held(model, loss):
        found.setdefault(name, []).append(_described(value))
    found["numpy's global random numbers"] = _described(np.random.get_state())
    found["Python's global random numbers"] = hash(random.getstate())
    return found


def held_arrays(model: nn.Module, loss: Loss) -> dict[str, bytes]:
    """Return a digest of type, shape and values of the tensors and arrays that the code holds, by their name in errors.

    Digests are the same in every process and version of Python, so that a resumed run can name what changed. What keeps
    noise from being reused with other values is the program's digest, which covers all that is computed with.

    Args:
        model: Of the user; its parameters are left out.
        loss: Of the user, or the default one.

    Returns:
        By name, the SHA-256 of what is held there; names that hold no array are left out.
    """
    found: dict[str, Any] = {}
    for name, value in _held(model, loss):
        for text in _arrays_in(value):
            found.setdefault(name, hashlib.sha256()).update(text.encode())
    return {name: digest.digest() for name, digest in found.items()}


def _held(model: nn.Module, loss: Loss) -> Iterator[tuple[str, Any]]:
    """Yield what the code holds, by name and in an order that is the same in every process."""
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", buffer
    seen: set[int] = set()
    for name, module in model.named_modules():
        if is_library(type(module).__module__):
            continue
        for word, value in vars(module).items():
            if word not in _OF_TORCH:
                yield f"attribute {f'{name}.' if name else ''}{word} of the model", value
        yield from _of_functions(_methods(type(module)), seen)
    yield from _of_loss(loss, seen)


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return [name for name in {**before, **after} if before.get(name, _NOTHING) != after.get(name, _NOTHING)]


_NOTHING = object()


def _methods(kind: type) -> list[types.FunctionType]:
    own = [base for base in kind.__mro__ if not is_library(base.__module__)]
    members = [getattr(item, "__func__", getattr(item, "fget", item)) for base in own for item in vars(base).values()]
    return [member for member in members if isinstance(member, types.FunctionType)]


def _of_loss(loss: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    while isinstance(loss, functools.partial):
        yield "arguments of the loss", [*loss.args, *loss.keywords.values()]
        loss = loss.func
    if isinstance(loss, types.MethodType):
        yield from _attributes(loss.__self__)
        loss = loss.__func__
    if isinstance(loss, types.FunctionType):
        yield from _of_functions([loss], seen)
        return
    yield from _attributes(loss)
    yield from _of_functions(_methods(type(loss)), seen)


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    values = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
    if isinstance(holder, nn.Module):
        values = {word: value for word, value in values.items() if word not in _OF_TORCH}
        values |= dict(holder.named_parameters()) | dict(holder.named_buffers())
    for word, value in values.items():
        yield f"attribute {word} of the loss", value


def _of_functions(functions: list[types.FunctionType], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield what functions of the user's own hold and name, and those that they call."""
    waiting = list(functions)
    for function in waiting:  # grows
        if id(function) in seen or is_library(function.__module__ or ""):
            continue
        seen.add(id(function))
        name = function.__qualname__
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        held = {
            f"variable {word} around {name}": cell.cell_contents for word, cell in cells if cell != types.CellType()
        }
        held |= {f"attribute {word} of {name}": value for word, value in vars(function).items()}
        held |= {f"default arguments of {name}": [function.__defaults__, function.__kwdefaults__]}
        words = dict.fromkeys(word for code in _codes(function.__code__) for word in code.co_names)
        held |= {f"global {word}": function.__globals__[word] for word in words if word in function.__globals__}
        for label, value in held.items():
            if isinstance(value, types.FunctionType):
                waiting.append(value)
            elif not isinstance(value, types.ModuleType | type):
                yield label, value


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _described(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911 - one return a kind
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter):
            return ("a value of the pass", id(value))  # what only a forward pass can have put there
        return (str(value.dtype), tuple(value.shape), _digest(value.detach().cpu()))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return _digest(value.get_state())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if depth >= _DEEPEST:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return (
            "dict",
            len(value),
            [(repr(key), _described(item, depth + 1)) for key, item in list(value.items())[:_LONGEST]],
        )
    if isinstance(value, list | tuple):
        return ("list", len(value), [_described(item, depth + 1) for item in value[:_LONGEST]])
    if isinstance(value, set | frozenset):
        return ("set", len(value))
    if isinstance(value, nn.Module | types.ModuleType | types.FunctionType | types.MethodType | type):
        return getattr(value, "__qualname__", type(value).__qualname__)
    kind = type(value)
    own = {} if is_library(kind.__module__) or not hasattr(value, "__dict__") else vars(value)
    return (kind.__qualname__, [(word, _described(item, depth + 1)) for word, item in own.items()])


def _arrays_in(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield a text for each tensor and array in a value; other processes give the same ones."""
    if isinstance(value, torch.Tensor):
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
            yield f"{value.dtype} {tuple(value.shape)} {_digest(value.detach().cpu())}"
    elif isinstance(value, np.ndarray):
        if not value.dtype.hasobject:
            data = np.ascontiguousarray(value).tobytes()
            yield f"{value.dtype.str} {value.shape} {hashlib.sha256(data).hexdigest()}"
    elif depth < _DEEPEST:
        for part in _parts(value):
            yield from _arrays_in(part, depth + 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, types.ModuleType | types.FunctionType | type) or is_library(type(value).__module__):
        return ()
    return vars(value).values() if hasattr(value, "__dict__") else ()


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
