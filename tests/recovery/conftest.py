"""What tests of recovery share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.recovery.jobs import train


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder whose syncs cost nothing: killed processes leave the same files there as on a disk."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="fedray-test-", dir=memory if memory.is_dir() else None))
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resuming") / "finished"
    train(path, rounds=2, seed=None)
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small jobs gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
