"""Makes figures as PNG bytes with matplotlib, an optional extra."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fedray.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches; no global state, no display.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError as error:
        raise InputError('pictures need matplotlib: pip install "fedray[bench]".') from error
    return Figure(figsize=(width, height), layout="constrained")


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
