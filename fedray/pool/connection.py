"""Connects to Ray, or starts it; the only module that imports it.

Starting takes seconds, most of them waiting, so the command line does it while a thread imports torch. Imports no torch
itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.errors import InputError
from fedray.pool.watch import Watch

CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_SESSIONS = "fedray-ray-"  # a process number follows


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A process' connection to Ray.

    Args:
        ray: The library.
        owned: Whether fedray made the connection, and so has to end it.
        folder: Of the session of a local Ray that fedray started; None else.
    """

    ray: Any
    owned: bool
    folder: Path | None = None

    @property
    def local(self) -> bool:
        """Whether it is a local Ray that fedray started."""
        return self.folder is not None

    def close(self) -> None:
        """End the connection, and Ray itself where it is local, if fedray made it."""
        if self.owned:
            self.ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_early: Connection | None = None


def connect_early(address: str | None) -> None:
    """Connect before the pool that will need it exists; the next `connect` takes this connection.

    Must be called on the main thread: a local Ray ends with the thread that started it.

    Raises:
        InputError: Nothing answers at the address.
    """
    global _early  # noqa: PLW0603 - a process has one connection to Ray
    _early = _connect(address)


def connect(address: str | None) -> Connection:
    """Connect to a cluster, or start a local Ray.

    Args:
        address: --ray-address; None for RAY_ADDRESS if set, else a local Ray.

    Raises:
        InputError: Nothing answers at the address.
    """
    global _early
    early, _early = _early, None
    return early or _connect(address)


def abandon_early() -> None:
    """Undo `connect_early` when no `connect` followed, because the run did not start."""
    global _early
    early, _early = _early, None
    if early is not None:
        early.close()


def _connect(address: str | None) -> Connection:
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_kind(address)
    if address == "local":
        # Ray would otherwise write a token file into the home directory and warn about it at each start. A cluster has a
        # token already, which Ray finds in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or that file.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Free objects at once, not every second: the next round's then lie in memory that is mapped already, which makes
        # the broadcast and gather of large models two to three times as fast.
        os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers of a local Ray import these while they wait for their first actor.
    os.environ.setdefault("RAY_preload_python_modules", "torch,fedray.pool.worker")
    import ray  # a second, and only runs on Ray pay for it
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        return Connection(ray=ray, owned=False)
    # A pool raises what its calls raise. Ray would print those as well that nobody asked for as the run had failed already.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    _check_reachable(address)
    folder, options = None, dict[str, Any]()
    if address == "local":
        folder = _session_folder()
        options = {"include_dashboard": False, "_temp_dir": str(folder / "r")}
    terminate = signal.getsignal(signal.SIGTERM)
    watch = Watch()
    try:
        with (
            warnings.catch_warnings(),
            _for_this_user_alone(ray, address == "local"),
            watch.within(START_TIMEOUT_S, "answer"),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # some releases tell users what a later one will do
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray-address {address} cannot be reached ({error}); start a cluster there, or leave it out; if one runs "
            "there, RAY_AUTH_MODE and RAY_AUTH_TOKEN must be the same here as there."
        ) from error
    finally:
        watch.close()
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place, which prints and exits with 15
    return Connection(ray=ray, owned=True, folder=folder)


def _session_folder() -> Path:
    """Return a new folder, readable for nobody else, for what a local Ray keeps; remove those of processes that were killed."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_SESSIONS}*-*"):
        pid = left.name.removeprefix(_SESSIONS).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SESSIONS}{os.getpid()}-", dir=place))


@contextlib.contextmanager
def _for_this_user_alone(ray: Any, local: bool) -> Iterator[None]:
    """Let a local Ray listen on the loopback address alone, and make files that nobody else can read.

    Ray does the first where it forms no clusters, by default on macOS and Windows; elsewhere it takes the machine's address,
    whatever it is told.
    """
    if not local:
        yield
        return
    constants, umask = ray._private.ray_constants, os.umask(0o077)
    clusters, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    before = os.environ.get(_CLUSTERS)
    os.environ[_CLUSTERS] = "0"  # for Ray's own processes
    try:
        yield
    finally:
        os.umask(umask)
        constants.ENABLE_RAY_CLUSTER = clusters
        del os.environ[_CLUSTERS]
        if before is not None:
            os.environ[_CLUSTERS] = before


def _check_kind(address: str) -> None:
    if address.startswith("ray://"):
        raise InputError(
            f"--ray-address {address} is Ray Client, which is too slow for fedray; give the cluster's own host:port, or "
            "start the run with `ray job submit`."
        )


def _check_reachable(address: str) -> None:
    """Raise InputError when nothing listens at host:port; Ray itself would try for minutes and then end the process."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "local" or "auto"; Ray answers at once for anything else
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"--ray-address {address} cannot be reached ({error}); start a cluster there, or leave it out."
        ) from error
