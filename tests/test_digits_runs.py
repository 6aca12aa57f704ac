"""The runs of docs/models.md on real handwritten digits reach the accuracy that the page states."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedray
from fedray.commands.cli import parse

GATEWAY = (
    "--dataset digits --gateways 20 --partition dirichlet:0.5 --noise-level gateway --noise-multiplier 1.25 "
    "--clip-norm 0.5 --rounds 30 --local-steps 8 --batch-size 64 --optimizer sgd --lr 0.2"
)
SAMPLE = (
    "--dataset digits --gateways 16 --noise-level sample --target-epsilon 8 --rounds 30 --local-steps 8 "
    "--batch-size 32 --optimizer sgd --lr 0.5"
)


def _run(command: str, seed: int, outdir: Path) -> fedray.Run:
    config = parse([*command.split(), "--seed", str(seed), "--pool", "inline", "--out", str(outdir)])
    return fedray.Orchestrator(config=config).run()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_gateway_level_reaches_its_accuracy_under_label_skew(seed: int, outdir: Path) -> None:
    run = _run(GATEWAY, seed, outdir)
    promise = run.privacy["guarantees"][0]
    assert run.history[-1]["accuracy"] >= 0.80
    assert (promise["unit"], promise["adjacency"], promise["delta"]) == ("gateway", "zero-out", 1e-5)
    assert promise["epsilon"] <= 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_sample_level_reaches_its_accuracy(seed: int, outdir: Path) -> None:
    run = _run(SAMPLE, seed, outdir)
    promise = run.privacy["guarantees"][0]
    assert run.history[-1]["accuracy"] >= 0.85
    assert (promise["unit"], promise["adjacency"], promise["delta"]) == ("record", "add-or-remove", 1e-5)
    assert promise["epsilon"] <= 8
