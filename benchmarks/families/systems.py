"""How fedray and Opacus train a job with privacy per record, and torch without any, on the same keyed batches.

Each system is built once and then trains whole rounds; building is not timed. A system that does not take the family
raises `Refused` with its reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from families.family import call
from families.job import LR, Job, Refused, batches, new_keys, reason, trainer_of
from fedray.data.inputs import Inputs, taken
from fedray.errors import FedrayError
from fedray.orchestrator.plan import Plan

LARGEST_STACK_BYTES = 2 * 2**30  # of updates that fedray hands back at a time


class System(Protocol):
    """Trains rounds of a job; `samples` says how many (expected) records each takes, `engine` in a word how."""

    samples: int
    engine: str

    def round(self) -> None:
        """Train one round and wait for the device to end it.

        Raises:
            Refused: The system failed in the middle of a step.
        """


class Fedray:
    """fedray's own trainer and noise, each round with new keys.

    Args:
        job: What is trained.
        plan: The job's; None to make it here.
        one_by_one: Whether each gateway is a call of its own rather than all of them one.
    """

    def __init__(self, job: Job, plan: Plan | None = None, *, one_by_one: bool = False) -> None:
        plan = job.plan() if plan is None else plan
        self.engine: str = plan.setup.engine
        self.samples = job.samples
        self._job = job
        self._trainer = trainer_of(plan, job.device)
        self._params = plan.layout.flatten(plan.model)
        most = max(1, LARGEST_STACK_BYTES // (4 * plan.layout.num_params))
        size = 1 if one_by_one else min(most, job.gateways)
        self._calls = [range(first, min(first + size, job.gateways)) for first in range(0, job.gateways, size)]

    def round(self) -> None:
        """See `System.round`; updates come back to the CPU, so the device has ended."""
        keys = new_keys()
        try:
            for gateways in self._calls:
                self._trainer.train(keys, self._params, gateways, self._job.shards)
        except FedrayError as error:
            raise Refused(reason(error)) from error


class Opacus:
    """Opacus as a careful user has it: one wrapped model and optimizer for all gateways, one after the other.

    Args:
        job: What is trained.
        ghost: Whether norms come from ghost clipping rather than from per-record gradients by hooks.
        replace: Whether layers that Opacus refuses are first replaced by its own (`ModuleValidator.fix`).
    """

    def __init__(self, job: Job, *, ghost: bool = False, replace: bool = False) -> None:
        from opacus import GradSampleModule  # seconds, which whoever measures fedray alone does without
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
        from opacus.validators import ModuleValidator

        self.samples = job.samples
        self.engine = "ghost" if ghost else "hooks"
        self._job = job
        self._shards = job.shards_on_device()
        privacy, model = job.privacy, job.model()
        try:
            if replace:
                with torch.random.fork_rng(devices=[]):
                    fixed = ModuleValidator.fix(model)
                    if not replaced(model, fixed):
                        raise Refused("it has nothing to replace")
                    model = fixed
            model = model.to(job.device)
            if ghost:
                self._private = GradSampleModuleFastGradientClipping(
                    model, loss_reduction="sum", max_grad_norm=privacy.clip_norm
                )
            else:
                self._private = GradSampleModule(model, loss_reduction="sum")
        except Refused:
            raise
        except Exception as error:  # whatever Opacus says to a family
            raise Refused(reason(error)) from error
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sent = [parameter.detach().clone() for parameter in self._parameters]
        self._adam = torch.optim.Adam(self._parameters, lr=LR)
        self._optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
            self._adam,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=privacy.batch_size,
            loss_reduction="mean",
        )
        self._ghost: Callable[..., Any] | None = DPTensorFastGradientClipping if ghost else None

    def round(self) -> None:
        """See `System.round`."""
        job, keys = self._job, new_keys()
        with warnings.catch_warnings():
            # torch's word on the hooks of a first layer, whose input needs no gradient: right, and of no consequence here.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for gateway, shard in enumerate(self._shards):
                load(self._parameters, self._sent, self._adam)
                for chosen in batches(job.privacy, keys, gateway):
                    there = chosen.to(job.device)
                    self._step(taken(shard.x, there), shard.y[there])
        wait(job.device)

    def _step(self, x: Inputs, y: torch.Tensor) -> None:
        try:
            losses = self._job.family.loss(call(self._private, x), y)
            if self._ghost is None:
                losses.sum().backward()
            else:
                self._private.enable_hooks()
                self._ghost(self._private, self._optimizer, losses, "sum").backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        except Exception as error:  # whatever Opacus' hooks make of a family
            raise Refused(reason(error)) from error


def replaced(model: torch.nn.Module, fixed: torch.nn.Module) -> bool:
    """Tell whether Opacus replaced a layer of a model."""
    return [type(module) for module in model.modules()] != [type(module) for module in fixed.modules()]


class Plain:
    """The same model without privacy: autograd and Adam on one large batch, what the hardware allows."""

    engine = ""

    def __init__(self, job: Job) -> None:
        self.samples = job.family.shared_batch
        self._job, self._batch = job, job.shared_batch()
        self._model = job.model().to(job.device)
        self._adam = torch.optim.Adam([p for p in self._model.parameters() if p.requires_grad], lr=LR)

    def round(self) -> None:
        """Take one step."""
        self._adam.zero_grad()
        self._job.family.loss(call(self._model, self._batch.x), self._batch.y).mean().backward()
        self._adam.step()
        wait(self._job.device)


class PlainLoop:
    """The same model without privacy: one gateway after the other, on the batches that private training takes."""

    engine = ""

    def __init__(self, job: Job) -> None:
        self.samples = job.samples
        self._job, self._shards = job, job.shards_on_device()
        self._model = job.model().to(job.device)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._sent = [parameter.detach().clone() for parameter in self._parameters]
        self._adam = torch.optim.Adam(self._parameters, lr=LR)

    def round(self) -> None:
        """See `System.round`."""
        keys = new_keys()
        for gateway, shard in enumerate(self._shards):
            load(self._parameters, self._sent, self._adam)
            for chosen in batches(self._job.privacy, keys, gateway):
                there = chosen.to(self._job.device)
                self._adam.zero_grad()
                self._job.family.loss(call(self._model, taken(shard.x, there)), shard.y[there]).mean().backward()
                self._adam.step()
        wait(self._job.device)


FEDRAY, HOOKS, GHOST, REPLACED, PLAIN = "fedray", "Opacus hooks", "Opacus ghost", "Opacus, its own layers", "no privacy"
SYSTEMS: dict[str, Callable[[Job], System]] = {
    FEDRAY: Fedray,
    HOOKS: Opacus,
    GHOST: lambda job: Opacus(job, ghost=True),
    REPLACED: lambda job: Opacus(job, replace=True),
    PLAIN: Plain,
}


def quieten() -> None:
    """Keep words of torch and Hugging Face that are right and of no consequence here out of the output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def load(
    parameters: Sequence[torch.Tensor], received: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Copy the received parameters in place and bring the optimizer back to its first step."""
    for parameter, value in zip(parameters, received, strict=True):
        parameter.copy_(value)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
