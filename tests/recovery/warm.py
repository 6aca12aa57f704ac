"""Imported once by the process that children are forked from: everything is loaded and has run, on one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)  # threads would not survive the fork

from tests.recovery import jobs  # noqa: E402

with tempfile.TemporaryDirectory() as _folder:
    for _level in ("gateway", "sample"):
        jobs.train(Path(_folder) / _level, noise_level=_level)
