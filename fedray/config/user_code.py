"""Finding and calling what users name as module:function."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedray.errors import InputError

_LIBRARIES = frozenset({"fedray", "numpy", "opacus", "peft", "ray", "torch", "transformers", *sys.stdlib_module_names})
_LONGEST = 10_000
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


def source_of(name: str) -> bytes | None:
    """Return the source of the module that module:function names, found without running any of it; None where there is none.

    Libraries and the standard library have none here: their functions are nobody's model or data.
    """
    module = name.partition(":")[0]
    if is_library(module):
        return None
    places: list[str] | None = [os.getcwd(), *sys.path]
    spec = None
    parts = module.split(".")
    for number in range(len(parts)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: number + 1]), places)
        if spec is None:
            return None
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    try:
        return Path(str(spec.origin)).read_bytes() if spec is not None else None
    except OSError:
        return None


def call(function: Callable[..., Any], name: str, flag: str, *arguments: Any) -> Any:
    """Call a user's function.

    Raises:
        InputError: It raised.
    """
    process = os.getpid()
    try:
        found = function(*arguments)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(
            f"{flag} {name}: {name.rpartition(':')[2]} raised {type(error).__name__}: {error}; it must return without error."
        ) from error
    finally:
        if os.getpid() != process:  # it forked: this process must not go on with the run as well
            os._exit(1)
    return found


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
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, _contents(value.co_consts, seen)]
    if isinstance(value, tuple | frozenset):  # equal constants may or may not be one object
        return _contents(value, seen)
    if id(value) in seen:
        return "again"
    seen[id(value)] = value
    if isinstance(value, list | set | dict):
        return _contents(value, seen)
    if isinstance(value, functools.partial):
        return ["partial", *(_described(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return [_described(part, seen) for part in (value.__func__, value.__self__)]
    return _named(value, seen)


def is_library(name: str) -> bool:
    """Tell whether a module is a library, whose version says what it does."""
    return name.partition(".")[0] in _LIBRARIES


def _contents(values: Collection[Any], seen: dict[int, Any]) -> Any:
    kind = type(values).__name__
    if len(values) > _LONGEST:
        return [kind, len(values)]  # data rather than code
    if isinstance(values, dict):
        return [kind, *((_described(key, seen), _described(item, seen)) for key, item in values.items())]
    found = [_described(value, seen) for value in values]
    return [kind, *(sorted(map(repr, found)) if isinstance(values, set | frozenset) else found)]


def _named(value: Any, seen: dict[int, Any]) -> Any:
    """Describe a function, class, module or object by its name, and what is the user's own by its code as well."""
    kind = value if hasattr(value, "__name__") else type(value)
    name = f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', kind.__name__)}"
    own: list[Any] = [] if kind is value else [_plain(vars(value) if hasattr(value, "__dict__") else {}, seen)]
    if is_library(name):
        return [name, own]
    if isinstance(kind, types.FunctionType):
        cells = tuple(cell.cell_contents for cell in kind.__closure__ or () if cell != types.CellType())
        named: list[Any] = []
        namespaces = [kind.__globals__]
        for names in namespaces:  # grows: what is named through modules of the user's own counts as well
            found = [names[word] for word in kind.__code__.co_names if word in names]
            inner = [vars(f) for f in found if isinstance(f, types.ModuleType) and not is_library(f.__name__)]
            namespaces += [one for one in inner if not any(one is known for known in namespaces)]
            named += found
        parts = (kind.__code__, kind.__defaults__, kind.__kwdefaults__, cells, tuple(named))
        own += [_described(part, seen) for part in parts]
    elif isinstance(kind, type):
        own += [_members(base, seen) for base in kind.__mro__]
    return [name, own]


def _members(kind: type, seen: dict[int, Any]) -> Any:
    """Describe the functions and plain values of a user's class."""
    if is_library(kind.__module__):
        return kind.__qualname__
    found = {word: getattr(item, "__func__", getattr(item, "fget", item)) for word, item in vars(kind).items()}
    return _plain({w: f for w, f in found.items() if isinstance(f, types.FunctionType) or not w.startswith("__")}, seen)


def _plain(values: Mapping[str, Any], seen: dict[int, Any]) -> Any:
    """Describe those that are plain values or functions."""
    return [(word, _described(item, seen)) for word, item in values.items() if isinstance(item, _PLAIN)]
