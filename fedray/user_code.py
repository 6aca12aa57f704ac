"""Finding and calling what users name as module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from fedray.errors import InputError


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
