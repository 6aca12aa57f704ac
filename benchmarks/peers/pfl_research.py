"""Measure pfl: one process, no privacy or central differential privacy (it has no per-sample gradients).

    PYTHON pfl_research.py WORKLOAD.json RESULT.json

The script is not called pfl.py, which would hide the library of that name from itself. PYTHON is that of the `pfl`
environment.
"""

from __future__ import annotations

import os

# Read when pfl is imported: it would otherwise pick an accelerator where there is one.
os.environ["PFL_PYTORCH_DEVICE"] = "cpu"

import sys
from collections.abc import Iterator
from itertools import cycle, islice

import torch
import workload
from measurement import Measurement
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch import nn
from torch.nn.functional import cross_entropy


class Shard(Dataset):
    """A dataset that starts over when a round takes more steps than one pass over it has.

    The library's own stops there, and a round of fewer steps would be another job.
    """

    num_steps: int

    def iter(self, batch_size: int | None) -> Iterator[list[torch.Tensor]]:
        batches = list(super().iter(batch_size))
        return islice(cycle(batches), self.num_steps)


class Classifier(nn.Module):
    """The workload's model with the two methods that pfl calls."""

    def __init__(self, job: workload.Workload) -> None:
        super().__init__()
        self.network = job.build_model()
        self._divisor = None if job.sampling == "full" else job.batch_size

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.network(x), y, reduction="sum") / (self._divisor or len(x))

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """Measure nothing: round 0 always evaluates every gateway, which the other systems do not."""
        return {}


class RoundClock(TrainingProcessCallback):
    """Marks the ends of rounds."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._measurement.round_ended()
        return False, Metrics()


def build_shards(job: workload.Workload) -> FederatedDataset:
    """Make every gateway's dataset once; a cohort is all of them in order."""
    x, y = (torch.from_numpy(array) for array in job.load_data())
    whole = x.shape[1] if job.sampling == "full" else x.shape[1] // job.batch_size * job.batch_size
    shards = [Shard((x[gateway, :whole], y[gateway, :whole])) for gateway in range(job.gateways)]
    for shard in shards:
        shard.num_steps = job.local_steps
    return FederatedDataset(shards.__getitem__, MinimizeReuseUserSampler(range(job.gateways)))


def run(job: workload.Workload, measurement: Measurement) -> dict[str, torch.Tensor]:
    """Run all rounds and return the final weights by state_dict name."""
    classifier = Classifier(job)
    # A step of 1 along the mean update is FedAvg's mean.
    central = torch.optim.SGD(classifier.parameters(), lr=1.0)
    model = PyTorchModel(classifier, job.build_optimizer, central)
    shards = build_shards(job)
    postprocessors = []
    if job.privacy == "gateway":
        mechanism = GaussianMechanism(job.clip_norm, job.noise_multiplier)
        postprocessors.append(CentrallyAppliedPrivacyMechanism(mechanism))
    batch_size = None if job.sampling == "full" else job.batch_size
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            # 0 is a multiple of everything: round 0 evaluates whatever stands here.
            evaluation_frequency=job.rounds,
            train_cohort_size=job.gateways,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=shards, val_data=shards, postprocessors=postprocessors),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=job.local_steps,
            local_learning_rate=job.lr,
            local_batch_size=batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=batch_size),
        callbacks=[RoundClock(measurement)],
        # Would print every round's metrics.
        send_metrics_to_platform=False,
    )
    return dict(classifier.network.state_dict())


def main(workload_path: str, result_path: str) -> None:
    """Run the workload and write its result."""
    job = workload.read(workload_path)
    if job.privacy not in ("none", "gateway") or job.sampling == "poisson":
        raise SystemExit(
            f"pfl measures privacy 'none' or 'gateway' with 'sequential' or 'full' batches, "
            f"got {job.privacy!r} with {job.sampling!r}"
        )
    torch.set_num_threads(job.threads)
    name = "pfl, central DP" if job.privacy == "gateway" else "pfl, no privacy"
    measurement = Measurement(name, job, packages=("pfl",))
    weights = run(job, measurement)
    measurement.write(result_path, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
