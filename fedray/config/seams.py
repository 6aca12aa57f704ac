"""What can be added to fedray without changing it: nine seams, the names of what is there, and how others are found.

A flag names an implementation: one of fedray's own, one that an installed package offers as an entry point in the group
`fedray.<seam>`, or a user's as module:name. What follows a colon is the implementation's argument, as in dirichlet:0.5.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedray.config.rules import flag
from fedray.config.settings import SETTINGS
from fedray.config.user_code import call, find_function, is_reference
from fedray.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A place where implementations plug in.

    Args:
        setting: Whose value names one.
        own: fedray's own, by name: module:name of a class or function that makes one.
        protocol: module:name of what an implementation must be.
    """

    setting: str
    own: Mapping[str, str]
    protocol: str


SEAMS: dict[str, Seam] = {
    "task": Seam(
        setting="task",
        own={"classification": "fedray.tasks.classification:Classification"},
        protocol="fedray.tasks.task:Task",
    ),
    "algorithm": Seam(
        setting="algorithm",
        own={"fedavg": "fedray.algorithms.fedavg:FedAvg"},
        protocol="fedray.algorithms.algorithm:Algorithm",
    ),
    "aggregator": Seam(
        setting="aggregator",
        own={"mean": "fedray.algorithms.aggregator:Mean"},
        protocol="fedray.algorithms.aggregator:Aggregator",
    ),
    "server_optimizer": Seam(
        setting="server_optimizer",
        own={"sgd": "fedray.algorithms.server_optimizer:ServerSGD"},
        protocol="fedray.algorithms.server_optimizer:ServerOptimizer",
    ),
    "clipping": Seam(
        setting="clip",
        own={"fixed": "fedray.privacy.shapes:FixedClipping"},
        protocol="fedray.privacy.shapes:Clipping",
    ),
    "noise_shape": Seam(
        setting="noise_shape",
        own={"independent": "fedray.privacy.shapes:IndependentNoise"},
        protocol="fedray.privacy.shapes:NoiseShape",
    ),
    "source": Seam(
        setting="dataset",
        own={"toy": "fedray.data.toy:Toy", "digits": "fedray.data.digits:Digits"},
        protocol="fedray.data.source:Source",
    ),
    "partitioner": Seam(
        setting="partition",
        own={"iid": "fedray.data.partition:Iid", "dirichlet": "fedray.data.partition:Dirichlet"},
        protocol="fedray.data.partition:Partitioner",
    ),
    "callback": Seam(
        setting="track",
        own={"tensorboard": "fedray.reports.tensorboard:TensorBoard"},
        protocol="fedray.reports.callback:Callback",
    ),
}


def is_named(seam: str, value: str) -> bool:
    """Tell whether a value names an implementation of fedray or of an installed package."""
    name = value.partition(":")[0]
    return name in SEAMS[seam].own or name in importlib.metadata.entry_points(group=f"fedray.{seam}").names


def users_code(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the module:name texts in settings that name a user's own code, by setting."""
    seams = {seam.setting: name for name, seam in SEAMS.items()}
    found: dict[str, list[str]] = {}
    for setting in (*seams, "model"):
        values = (
            str(settings.get(setting) or "").split(",") if setting == "track" else [str(settings.get(setting) or "")]
        )
        own = [
            reference
            for value in values
            if (reference := reference_in(value)) is not None
            and (setting not in seams or not is_named(seams[setting], value))
        ]
        if own:
            found[setting] = own
    return found


def find(seam: str, value: str) -> Any:
    """Return the implementation that a setting's value names, newly made.

    Args:
        seam: One of `SEAMS`.
        value: NAME, NAME:ARGUMENT, module:name or module:name:ARGUMENT.

    Raises:
        InputError: Nothing has that name, or it cannot be made.
    """
    name, colon, argument = value.partition(":")
    given, known = [argument][: len(colon)], SEAMS[seam]
    where = flag(known.setting)
    if name in known.own:
        module, _, attribute = known.own[name].partition(":")
        make = getattr(importlib.import_module(module), attribute)
        if given and not inspect.signature(make).parameters:
            raise InputError(
                f"{where} is {value!r} but {name}, which is fedray's own, takes no argument; leave it out, or give a module of "
                "yours another name."
            )
        return make(*given)
    offered = importlib.metadata.entry_points(group=f"fedray.{seam}")
    if name in offered.names:
        try:
            make = offered[name].load()
        except Exception as error:  # importing runs the package's code, which may raise anything
            raise InputError(
                f"{where} is {value!r}, of the package {_package(offered[name])}, which does not load "
                f"({type(error).__name__}: {error}); mend or remove the package."
            ) from error
        return _made(make, value, where, *given)
    if (reference := reference_in(value)) is not None:
        return _made(find_function(reference, where), value, where, *value.split(":", 2)[2:])
    installed = f" (packages offer {', '.join(sorted(offered.names))})" if offered.names else ""
    raise InputError(f"{where} is {value!r}; it must be {SETTINGS[known.setting].words}{installed}.")


def reference_in(value: str) -> str | None:
    """Return the module:name of a value of that form, with or without :ARGUMENT; None for other values."""
    reference = ":".join(value.split(":", 2)[:2])
    return reference if is_reference(reference) else None


def _made(make: Any, value: str, where: str, *arguments: str) -> Any:
    """Return what a class or function makes."""
    try:
        return call(make, value, where, *arguments)
    except InputError as error:
        if isinstance(error.__cause__, InputError):  # it refused its argument in its own words
            raise error.__cause__ from None
        raise


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else entry.dist.name


def check_is(found: Any, kind: type, seam: str, value: object) -> None:
    """Check that an implementation has all that its protocol asks for.

    Args:
        found: The implementation.
        kind: A protocol that can be checked at run time.
        seam: One of `SEAMS`.
        value: What the setting says, or the object that was handed in.

    Raises:
        InputError: Something is missing.
    """
    if isinstance(found, type):
        raise InputError(
            f"{flag(SEAMS[seam].setting)} {value!r} is the class {found.__name__}; hand in what it makes: {found.__name__}()."
        )
    if not isinstance(found, kind):
        asked = [name for name in dir(kind) if not name.startswith("_") and not hasattr(found, name)]
        lacks = f"; it has no {', '.join(asked)}" if asked else ""
        raise InputError(
            f"{flag(SEAMS[seam].setting)} {value!r} is {type(found).__name__}, no {kind.__name__}{lacks}: see "
            f"{SEAMS[seam].protocol.replace(':', '.')}."
        )
