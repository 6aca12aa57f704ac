"""Files as a run directory needs them: written durably, and never anything but a regular file.

A run directory may come from somebody else. A link in it must not make fedray write elsewhere, and a device, a pipe or a huge
file must not hold it up: reading has a limit, and opening does not wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import IO, Any

LARGEST = 64 * 2**30
"""Bytes of the largest model or checkpoint that is read."""
LARGEST_TEXT = 2**30
"""Bytes of the largest file of text: a million rounds have 300 MB of metrics."""


def open_regular(path: Path, flags: int, mode: int = 0o600, *, follow: bool = False) -> IO[bytes]:
    """Open a regular file; nothing is waited for.

    Args:
        path: Of the file.
        flags: Of os.open.
        mode: Of a file that is made.
        follow: Whether the name may be that of a link.

    Raises:
        OSError: It is a link, a directory, a device or a pipe; or the system refuses.
    """
    descriptor = os.open(path, flags | (0 if follow else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    how = "rb" if flags & (os.O_WRONLY | os.O_RDWR) == 0 else "wb" if flags & os.O_WRONLY else "r+b"
    return os.fdopen(descriptor, how)


def read_regular(path: Path, largest: int = LARGEST_TEXT, *, follow: bool = False) -> bytes:
    """Return the content of a regular file.

    Args:
        path: Of the file.
        largest: In bytes; a larger one is refused.
        follow: Whether the name may be that of a link.

    Raises:
        OSError: It is no regular file, too large, or cannot be read.
    """
    with open_regular(path, os.O_RDONLY, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {largest:,} that are read", str(path))
        return file.read(size)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, which is never held whole.

    Raises:
        OSError: It is no regular file, too large, or cannot be read.
    """
    with open_regular(path, os.O_RDONLY) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {LARGEST:,} that are read", str(path))
        found = hashlib.sha256()
        while part := file.read(2**20):
            found.update(part)
        return found.hexdigest()


def append_durably(path: Path, data: bytes) -> None:
    """Add bytes at the end of a regular file, and sync them to the disk.

    Raises:
        OSError: It is no regular file, or the disk refuses.
    """
    with open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def truncate_durably(path: Path, size: int) -> None:
    """Cut a regular file to a size, and sync it to the disk.

    Raises:
        OSError: It is no regular file, or the disk refuses.
    """
    with open_regular(path, os.O_RDWR) as file:
        file.truncate(size)
        os.fsync(file.fileno())


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file of this name that is new, whatever had the name before, and sync it to the disk.

    Args:
        path: Of the file; what is there is removed, and if it is a link, the link alone.
        data: Its content.
        mode: Of the file.

    Raises:
        OSError: A directory has the name, somebody else makes a file of the name at this moment, or the disk refuses.
    """
    path.unlink(missing_ok=True)
    with open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def parse_json(data: bytes | str) -> Any:
    """Return a JSON value that fedray may have written.

    Raises:
        ValueError: It is no JSON, nested beyond reason, or holds what fedray never writes: numbers that are not finite or of more
            than 20 digits, or text that is no Unicode.
    """
    try:
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in (data if isinstance(data, str) else data.decode()).lower():
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # half of a pair of surrogates is a UnicodeError, which is a ValueError
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:20])


def _whole(text: str) -> int:
    return int(text) if len(text) <= 20 else int(_refuse(f"{text[:20]}…, of {len(text)} digits,"))
