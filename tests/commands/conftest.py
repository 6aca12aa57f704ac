"""Finished run directories of every level, made once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedray.commands.cli import main

KINDS = {
    "none": ["--noise-level", "none"],
    "sample": ["--noise-level", "sample"],
    "batch": ["--noise-level", "batch"],
    "gateway": ["--noise-level", "gateway"],
    "stopped": ["--noise-level", "gateway", "--max-epsilon", "5"],
    "target": ["--noise-level", "sample", "--target-epsilon", "4"],
    "participation": ["--noise-level", "gateway", "--participation", "0.5"],
    "records": ["--noise-level", "batch", "--weights", "records"],
    "extended": ["--noise-level", "batch", "--noise-multiplier", "4"],
    "digits": ["--dataset", "digits", "--batch-size", "16"],
}
SMALL = ["--gateways", "4", "--rounds", "3", "--local-steps", "2", "--pool", "inline", "--quiet"]


def new_run(kind: str, out: Path) -> Path:
    """Train a small run of one of KINDS into a new directory."""
    size = [] if kind == "digits" else ["--samples-per-gateway", "256"]
    assert main([*SMALL, *size, *KINDS[kind], "--out", str(out)]) == 0
    if kind == "extended":
        assert main(["--resume", str(out), "--rounds", "5", "--pool", "inline", "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by kind, filled as they are asked for; copy before changing one."""
    return {"": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def run(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a finished run directory: of the kind in the test's parameter, else `sample`."""
    kind = getattr(request, "param", "sample")
    if kind not in originals:
        originals[kind] = new_run(kind, originals[""] / kind)
    return Path(shutil.copytree(originals[kind], tmp_path / "copy"))
