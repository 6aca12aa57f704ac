"""On a GPU: fedray's sums are the CPU's, its noise obeys the law and is repeated bit for bit, and memory keeps its limit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from device.models import models
from families import gate
from families.catalogue import FAMILIES
from families.job import Job, new_keys

from fedray.privacy.noise import LocalNoise
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import new_trainer
from tests.privacy.checks import check_independence, check_noise_law
from tests.privacy.worlds import keys_of, spec_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
GPU = torch.device("cuda:0")
TOLERANCE = 1e-4  # relative L2
COORDINATES = 120_000
WITHOUT_PACKAGES = {key: family for key, family in FAMILIES.items() if not family.needs}


@pytest.mark.parametrize("key", WITHOUT_PACKAGES)
def test_clipped_sums_are_those_of_the_cpu(key: str) -> None:
    _compare(Job(WITHOUT_PACKAGES[key], gateways=3, local_steps=1, batch=gate.BATCH))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("key", [key for key in FAMILIES if key not in WITHOUT_PACKAGES])
def test_clipped_sums_of_hugging_face_models_are_those_of_the_cpu(key: str) -> None:
    for name in FAMILIES[key].needs:
        pytest.importorskip(name)
    _compare(Job(FAMILIES[key], gateways=3, local_steps=1, batch=gate.BATCH))


@pytest.mark.parametrize("key", models(quick=False))
def test_clipped_sums_of_large_models_are_those_of_the_cpu(key: str) -> None:
    _compare(Job(models(quick=False)[key], gateways=2, local_steps=1, batch=gate.BATCH))


def _compare(job: Job) -> None:
    plan = job.plan()

    def apart(keys: RoundKeys) -> float:  # Dropout draws by record and key, so it is the same on both
        here, there = gate.first_sums(plan, job, keys), gate.first_sums(plan, job, keys, GPU)
        assert all(map(np.array_equal, here.batches, there.batches))
        return gate.distance(there.sums, here.sums)

    assert gate.least_distance(apart, TOLERANCE) <= TOLERANCE


def test_round_is_repeated_bit_for_bit() -> None:
    job = Job(FAMILIES["mlp"], gateways=4, local_steps=3)
    plan, keys = job.plan(), new_keys()
    params = plan.layout.flatten(plan.model)
    trainers = [
        new_trainer(plan.setup.engine, plan.model, plan.training, GPU, program=plan.setup.program) for _ in "ab"
    ]
    one, other = (trainer.train(keys, params, range(4), job.shards) for trainer in trainers)
    assert np.array_equal(one, other)


def test_noise_on_the_device_obeys_the_law() -> None:
    check_noise_law(_noise(1, [0, 1], 0), spec_of("sample").noise_std)


def test_noise_on_the_device_is_another_for_each_gateway_step_and_round() -> None:
    rows = [_noise(1, [0, 1], 0), _noise(1, [0, 1], 1), _noise(2, [0, 1], 0)]
    check_independence(np.concatenate(rows))


def test_noise_on_the_device_does_not_depend_on_who_trains_beside() -> None:
    assert np.array_equal(_noise(1, [0, 1], 0)[1], _noise(1, [1], 0)[0])


def _noise(seed: int, gateways: list[int], step: int) -> np.ndarray:
    out = torch.empty(len(gateways), COORDINATES, device=GPU)
    LocalNoise(spec_of("sample"), keys_of(seed), gateways).fill_on_device(step, out)
    return out.cpu().numpy()


@pytest.mark.parametrize("key", ["mlp", "cnn", "lstm", "encoder-layer"])
def test_memory_keeps_its_limit(key: str) -> None:
    job, limit = Job(FAMILIES[key], gateways=2048, local_steps=1), 64 * 2**20
    plan, keys = job.plan(), new_keys()
    params = plan.layout.flatten(plan.model)
    assert 4 * 5 * job.gateways * len(params) > limit, "parameters, gradients and moments of all gateways would fit"
    trainer = new_trainer(plan.setup.engine, plan.model, plan.training, GPU, limit, plan.setup.program)
    trainer.train(keys, params, range(1), job.shards)  # libraries take their workspaces, which no limit is about
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    trainer.train(keys, params, range(job.gateways), job.shards)
    # An actor hands half of its limit to the trainer: what the trainer cannot foresee has as much room again.
    assert torch.cuda.max_memory_allocated(GPU) - before <= 2 * limit
