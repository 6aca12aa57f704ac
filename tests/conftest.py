"""What the whole suite shares: one local Ray, a place for run directories, and the engines that proofs run on."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ENGINES = ["opacus", "stacked", "alone"]
"""Every trainer that must obey the law; add a new engine here and all proofs and mutants run on it."""

# Before anything imports numpy or torch: one thread, as in an actor; several fight over the cores of a busy machine.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# Before anything imports Ray: a local start would else write a token into the home directory and warn about it.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "180")


def pytest_configure(config: pytest.Config) -> None:
    """Older Rays leave files open, and tell what later ones will do; with the newest one every warning is an error."""
    if tuple(map(int, version("ray").split(".")[:2])) < (2, 60):
        for kind in ("ResourceWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Name of a trainer, for `fedray.training.engines.new_trainer`."""
    name: str = request.param
    return name


@pytest.fixture
def outdir(tmp_path: Path) -> Path:
    """Path for a run directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one local Ray with 2 CPUs for the whole session; pools use it, since it is initialised already."""
    import ray

    from tests.zygote import forked_workers

    # Ray's socket paths must stay below 107 bytes: pytest's own temporary directories are too long.
    place = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    with forked_workers():
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=150 * 10**6,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=place,
        )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
