"""Finding and calling what users name as module:function."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from fedray.errors import InputError

_LIBRARIES = frozenset({"fedray", "numpy", "opacus", "ray", "torch", *sys.stdlib_module_names})
_PLAIN = (bool, int, float, str, list, tuple, types.FunctionType, types.MethodType, functools.partial)


def is_reference(name: str) -> bool:
    """Tell whether a flag's value has the form module:function."""
    module, _, function = name.partition(":")
    return bool(module and function) and all(part.isidentifier() for part in [*module.split("."), function])


def find_function(name: str, flag: str) -> Callable[..., Any]:
    """Import module:function; the current directory is searched first.

    Raises:
        InputError: The module does not import, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise InputError(
            f"{flag} {name}: module {module_name} does not import ({type(error).__name__}: {error}); it must lie in the "
            "current directory or be installed."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{flag} {name}: module {module_name} has no function {function_name}; check the spelling.")
    return function  # type: ignore[no-any-return]  # checked to be callable


def call(function: Callable[..., Any], name: str, flag: str, *arguments: Any) -> Any:
    """Call a user's function.

    Raises:
        InputError: It raised.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(
            f"{flag} {name}: {name.rpartition(':')[2]} raised {type(error).__name__}: {error}; it must return without error."
        ) from error


def code_digest(parts: Iterable[Any]) -> str:
    """Return the SHA-256 of what functions and objects compute, the same in every process of one Python version.

    Covers bytecode, constants, defaults, closures, plain attributes and the functions of the user's own that these
    name; libraries count by name, as their versions are known. Data in other kinds of object is not seen.

    Args:
        parts: Functions, partials, classes or objects.
    """
    seen: dict[int, Any] = {}  # holds what it names, so that no number is used twice
    return hashlib.sha256(repr([_described(part, seen) for part in parts]).encode()).hexdigest()


def _described(value: Any, seen: dict[int, Any]) -> Any:  # noqa: PLR0911 - one return a kind
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, types.ModuleType):
        return value.__name__
    if id(value) in seen:
        return "again"
    seen[id(value)] = value
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_described(item, seen) for item in value)]
    if isinstance(value, frozenset | set):
        return sorted(repr(_described(item, seen)) for item in value)
    if isinstance(value, dict):
        return [(_described(key, seen), _described(item, seen)) for key, item in value.items()]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, [_described(constant, seen) for constant in value.co_consts]]
    if isinstance(value, functools.partial):
        return ["partial", *(_described(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return [_described(part, seen) for part in (value.__func__, value.__self__)]
    kind = value if isinstance(value, type | types.FunctionType) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name.partition(".")[0] in _LIBRARIES:
        own: Any = [] if kind is value else _plain(value, seen)
    elif isinstance(kind, types.FunctionType):
        cells = [cell.cell_contents for cell in kind.__closure__ or () if cell != types.CellType()]
        named = [kind.__globals__[word] for word in kind.__code__.co_names if word in kind.__globals__]
        parts = (kind.__code__, kind.__defaults__, kind.__kwdefaults__, cells, named)
        own = [_described(part, seen) for part in parts]
    else:
        methods = {word: item for word, item in vars(kind).items() if isinstance(item, types.FunctionType)}
        own = [_described(methods, seen), [] if kind is value else _plain(value, seen)]
    return [name, own]


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """Describe an object's attributes as far as they are plain values or functions."""
    return _described(
        {word: item for word, item in getattr(value, "__dict__", {}).items() if isinstance(item, _PLAIN)}, seen
    )
