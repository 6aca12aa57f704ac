"""Settings of one run: its randomness, its directory, and what is shown of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedray.config.rules import RunPath, Seed, check, text


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run's randomness, its directory, and what is shown of it."""

    seed: Seed | None = None
    """Makes the run reproducible, and its noise predictable: simulation only. Without it the noise is strong."""
    out: RunPath | None = None
    """Run directory to create (default: runs/<UTC time>-<noise level>)."""
    resume: RunPath | None = None
    """Go on with this run directory; with --rounds, extend a finished run to that many rounds."""
    no_keep_key: bool = False
    """Keep the round keys in memory only: a stopped run cannot be resumed, its directory gives no noise away."""
    track: Annotated[str, text("none, tensorboard or module:name, several with commas between")] = "none"
    """Who else follows the run: tensorboard (metrics for TensorBoard in the run directory), or module:name; a,b for both."""
    quiet: bool = False
    """Print the closing sentences only."""
    dry_run: bool = False
    """Print plan, placement, sigma and the final epsilon; train nothing, write nothing."""

    def __post_init__(self) -> None:
        """Turn paths that are text into paths, and check every field on its own."""
        for name in ("out", "resume"):
            if isinstance(value := getattr(self, name), str) and value:  # Path("") is the current directory
                object.__setattr__(self, name, Path(value))
        check(self)
