"""Metrics for other tools: anything with `log` and `close` can follow a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fedray.errors import InputError


class Tracker(Protocol):
    """Follows a run."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one round's metrics record."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class NoTracker:
    """Follows nothing."""

    def log(self, record: dict[str, Any]) -> None:
        """Take no note."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardTracker:
    """Writes scalars for TensorBoard.

    Args:
        path: Folder of the event files.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, path: Path) -> None:
        check_available("tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

        self._writer: Any = SummaryWriter(str(path))

    def log(self, record: dict[str, Any]) -> None:
        """Write accuracy, loss, epsilon, samples/s and seconds at the round's number."""
        scalars = {name: record[name] for name in ("accuracy", "loss", "samples_per_s")}
        scalars |= {f"epsilon/{unit}": value for unit, value in record["epsilon"].items()}
        scalars |= {f"seconds/{phase}": value for phase, value in record["seconds"].items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record["round"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def check_available(track: str) -> None:
    """Raise InputError when the package that --track needs is missing."""
    if track == "tensorboard":
        try:
            import tensorboard  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise InputError('--track is tensorboard, which is not installed; pip install "fedray[track]".') from error


def new_tracker(track: str, run_path: Path) -> Tracker:
    """Return the tracker of --track."""
    return TensorBoardTracker(run_path / "tensorboard") if track == "tensorboard" else NoTracker()
