"""Where sub-commands that make files put them: --out, or runs/<UTC time>-<command>."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedray.config.settings import RunConfig
from fedray.errors import RunFailedError


def new_output(config: RunConfig, command: str) -> Path:
    """Return --out, or a new runs/<UTC time>-<command>."""
    if config.run.out is not None:
        return config.run.out
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{command}"
    candidates = [Path("runs") / stem, *(Path("runs") / f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def write_output(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory that is made if need be.

    Raises:
        RunFailedError: The disk refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
    except OSError as error:
        raise RunFailedError(f"--out {path} cannot be written ({error}); choose another place.") from error
