"""One process at a time works on a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedray.errors import InputError
from fedray.privacy.durable import open_regular


@contextlib.contextmanager
def locked(directory: Path, path: Path) -> Iterator[None]:
    """Hold a directory for this process; the operating system lets go when the process ends, however it ends.

    Args:
        directory: The run directory.
        path: A file in it that is never replaced. (Network file systems lock files that are open for writing only.)

    Raises:
        InputError: Another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path, os.O_RDWR))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{directory} is no run directory (it has no {path.name}); check the path.") from error
        except BlockingIOError as error:
            raise InputError(f"{directory} is in use by another process; wait for it to end, or stop it.") from error
        except OSError as error:
            raise InputError(f"{path} cannot be locked ({error}); it must be a file that you may write.") from error
        yield
