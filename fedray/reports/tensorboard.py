"""--track tensorboard: a run's metrics as scalars for TensorBoard."""

from __future__ import annotations

from typing import Any

from fedray.errors import InputError
from fedray.reports.callback import End, RoundDone, Start


class TensorBoard:
    """Writes event files into the folder `tensorboard` of the run directory.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            import tensorboard  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise InputError('--track is tensorboard, which is not installed; pip install "fedray[track]".') from error
        self._writer: Any = None

    def on_start(self, start: Start) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(start.path / "tensorboard"))

    def on_round(self, done: RoundDone) -> None:
        """Write metrics, epsilon, samples/s and seconds at the round's number."""
        record = done.record
        scalars = {name: record[name] for name in ("loss", "samples_per_s")} | dict(record["metrics"])
        scalars |= {f"epsilon/{unit}": value for unit, value in record["epsilon"].items()}
        scalars |= {f"seconds/{phase}": value for phase, value in record["seconds"].items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()  # a run that fails is not told to its callbacks

    def on_end(self, end: End) -> None:
        """Close the event file."""
        self._writer.close()
