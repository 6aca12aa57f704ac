"""Ray that does not answer: ends the process with a sentence where a call into Ray would wait without end.

A call waits in Ray's own code, which neither a Python exception nor Ctrl-C reaches when its raylet is stopped; and when the
raylet or the GCS dies, Ray ends the process in its own words. So a thread looks at both, and at a deadline for each call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

GRACE_S = 10.0
"""What a call gets beyond the time-out that is its own."""
_LOOK_S = 0.25
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Due:
    """When a call should have come back, by the monotonic clock, and what it does."""

    at: float
    what: str


class Watch:
    """Watches the calls of one pool.

    Attributes:
        remedy: What the last sentence ends with: how the run can go on.
    """

    def __init__(self) -> None:
        self.remedy = ""
        self._due: _Due | None = None
        self._handles: dict[int, str] = {}  # of processes, by pidfd
        self._over = threading.Event()
        self._old: list[int] = []
        self._thread: threading.Thread | None = None

    def processes(self, ray: Any) -> None:
        """Look at the raylet and the GCS of a local Ray from now on; those of a cluster are other machines' matter."""
        node = getattr(getattr(ray, "_private", None), "worker", None)
        started = getattr(getattr(node, "_global_node", None), "all_processes", None) or {}
        for name in ("raylet", "gcs_server"):
            for info in started.get(name, []):
                with contextlib.suppress(OSError):  # dead already: Ray itself says so
                    self._handles[os.pidfd_open(info.process.pid)] = name

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """End the process when the block takes longer.

        Args:
            seconds: Beyond which `GRACE_S` is granted, so that time-outs of the call itself come first.
            what: Ray did not do, for the sentence: "train round 3".
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="fedray watches Ray")
            self._thread.start()
        before, self._due = self._due, _Due(time.monotonic() + seconds + GRACE_S, what)
        try:
            yield
        finally:
            self._due = before

    def close_processes(self) -> None:
        """Expect the raylet and the GCS to end from now on."""
        handles, self._handles = self._handles, {}
        self._old += handles

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for handle in [*self._old, *self._handles]:
            os.close(handle)
        self._old, self._handles = [], {}

    def _look(self) -> None:
        while not self._over.is_set():
            handles = dict(self._handles)
            dead, _, _ = select.select(list(handles), [], [], _LOOK_S)  # at once when a process ends
            due = self._due
            if due is not None and time.monotonic() > due.at:
                self._end(f"Ray did not {due.what} in time; a process of it may be stopped, or its machine overloaded.")
            for handle in dead:
                if handle in self._handles:
                    self._end(f"Ray's {handles[handle]} died, and with it all actors; see its logs.")

    def _end(self, sentence: str) -> None:
        """Say why, stop what is left of a local Ray, and leave: the main thread is out of reach."""
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {sentence}{self.remedy}", file=sys.stderr, flush=True)
        for handle in self._handles:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        os._exit(1)


def watched(what: str, limit: Callable[[Any], float]) -> Callable[[Method], Method]:
    """Give a method of whoever has a `watch` a deadline.

    Args:
        what: Ray did not do, should the deadline pass.
        limit: From the object to the seconds that the method may take by its own time-outs.
    """

    def with_deadline(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            with self.watch.within(limit(self), what):
                return method(self, *arguments, **named)

        return cast("Method", call)

    return with_deadline
