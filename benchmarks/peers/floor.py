"""Measure the floor: the arithmetic that stacked per-sample training cannot do without, and nothing else.

    PYTHON floor.py WORKLOAD.json RESULT.json

A step of a group of gateways is its batched matrix products (forward, output gradients, clipped sums), the noise
(AES-256-CTR keystream, Box-Muller) and Adam, all on preallocated buffers, on one thread. Left out: sampling, norms,
clip factors, masks, keys and every check. No trainer that keeps its promises runs faster, so "share of the floor"
says how much of the machine a trainer uses. Groups that fit the cache win; the best size is found first, untimed.
Only models of Linear and ReLU have a floor here.
"""

from __future__ import annotations

import math
import secrets
import statistics
import sys
import time
from itertools import pairwise

import torch
import workload
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from measurement import Measurement
from torch import nn

# Most normals made at a time: torch's cost a call is spread, and the intermediate buffers stay in the last-level cache.
MAX_CHUNK = 262_144
GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Noise:
    """Standard normals from an AES-256-CTR keystream by Box-Muller.

    Each pair takes 12 bytes: 64 bits for the radius, whose tail then reaches 9.4 sigma, and 32 for the angle.
    """

    def __init__(self, num_normals: int) -> None:
        """Prepare buffers for draws of `num_normals`, in chunks of one size so that none is wasted."""
        num_chunks = math.ceil(num_normals / MAX_CHUNK)
        # Even, as pairs are made, and half of it too: 64-bit words must lie on 8-byte boundaries.
        self._half = 2 * math.ceil(num_normals / num_chunks / 4)
        cipher = Cipher(algorithms.AES(secrets.token_bytes(32)), modes.CTR(secrets.token_bytes(16)))
        self._keystream = cipher.encryptor()
        self._zeros = bytes(12 * self._half)
        # update_into asks for a block more than it fills.
        self._bytes = bytearray(len(self._zeros) + 15)
        words = torch.frombuffer(self._bytes, dtype=torch.int32, count=3 * self._half)
        self._radius_bits = words[: 2 * self._half].view(torch.int64)
        self._angle_bits = words[2 * self._half :]
        self._radius, self._angle, self._wave = (torch.empty(self._half) for _ in range(3))

    def add_to(self, target: torch.Tensor, std: float) -> None:
        """Add normals of the standard deviation to a flat tensor in place."""
        for piece in target.split(2 * self._half):
            self._draw(std)
            cut = (len(piece) + 1) // 2
            torch.cos(self._angle, out=self._wave)
            piece[:cut].addcmul_(self._radius[:cut], self._wave[:cut])
            torch.sin(self._angle, out=self._wave)
            piece[cut:].addcmul_(self._radius[: len(piece) - cut], self._wave[: len(piece) - cut])

    def _draw(self, std: float) -> None:
        self._keystream.update_into(self._zeros, self._bytes)
        # The magnitude of a signed word over 2^63 is uniform in [0, 1]; adding 1/2 instead would round small values
        # away. (A word of zero, which happens once in 2^64, would need a guard that the floor does without.)
        self._radius.copy_(self._radius_bits).abs_().mul_(2.0**-63)
        self._radius.log_().mul_(-2.0 * std * std).sqrt_()
        self._angle.copy_(self._angle_bits).mul_(math.pi * 2.0**-31)


class Group:
    """Preallocated buffers of some gateways of one Linear-ReLU model, and the step on them."""

    def __init__(self, job: workload.Workload, size: int) -> None:
        widths = linear_widths(job.build_model())
        self._job, self.size = job, size
        shapes = [shape for num_in, num_out in pairwise(widths) for shape in ((num_out, num_in), (1, num_out))]
        self.num_params = sum(math.prod(shape) for shape in shapes)
        self._noise = Noise(size * self.num_params)
        flat = [torch.zeros(size * self.num_params) for _ in range(4)]
        self.params, self._grads, self._mean, self._square = flat
        self._steps = torch.zeros(())
        # Layer by layer, gateways within: every product then reads and writes contiguous blocks.
        self.param_views, self._grad_views = (self._views(buffer, shapes) for buffer in flat[:2])
        rows = (size, job.batch_size)
        self._outputs = [torch.empty(*rows, width) for width in widths[1:]]
        self._errors = [torch.empty(*rows, width) for width in widths[1:]]
        self._active = [torch.empty(*rows, width) for width in widths[1:-1]]
        self._ones = torch.ones(size, 1, job.batch_size)

    def _views(self, flat: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
        pieces = flat.split([self.size * math.prod(shape) for shape in shapes])
        return [piece.view(self.size, *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def receive(self, current: list[torch.Tensor]) -> None:
        """Copy the round's parameters to every gateway and reset Adam."""
        for view, value in zip(self.param_views, current, strict=True):
            view.copy_(value)
        for state in (self._mean, self._square, self._steps):
            state.zero_()

    def step(self, x: torch.Tensor, one_hot: torch.Tensor) -> None:
        """Take one local step on x `[g, B, features]`."""
        self._forward(x)
        self._backward(x, one_hot)
        job = self._job
        self._noise.add_to(self._grads, job.noise_multiplier * job.clip_norm)
        self._grads.div_(job.batch_size)
        # What Adam(fused=True) calls; its bookkeeping around the kernel costs as much as the kernel.
        torch._fused_adam_(
            [self.params], [self._grads], [self._mean], [self._square], [], [self._steps.add_(1)],
            lr=job.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _forward(self, inputs: torch.Tensor) -> None:
        last = len(self._outputs) - 1
        for layer, output in enumerate(self._outputs):
            weight, bias = self.param_views[2 * layer : 2 * layer + 2]
            torch.baddbmm(bias, inputs, weight.transpose(1, 2), out=output)
            inputs = output if layer == last else output.clamp_min_(0)

    def _backward(self, x: torch.Tensor, one_hot: torch.Tensor) -> None:
        torch.softmax(self._outputs[-1], -1, out=self._errors[-1])
        self._errors[-1].sub_(one_hot)
        for layer in reversed(range(len(self._outputs))):
            error = self._errors[layer]
            inputs = self._outputs[layer - 1] if layer else x
            torch.bmm(error.transpose(1, 2), inputs, out=self._grad_views[2 * layer])
            torch.bmm(self._ones, error, out=self._grad_views[2 * layer + 1])
            if layer:
                torch.bmm(error, self.param_views[2 * layer], out=self._errors[layer - 1])
                torch.sign(inputs, out=self._active[layer - 1])
                self._errors[layer - 1].mul_(self._active[layer - 1])


def linear_widths(model: nn.Module) -> list[int]:
    """Return the widths of a chain of Linear layers with ReLU between them.

    Raises:
        SystemExit: the model holds anything else.
    """
    layers = list(model.children())
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not layers or any(not isinstance(layer, nn.Linear | nn.ReLU) for layer in layers):
        raise SystemExit(f"floor.py knows Linear and ReLU alone, got {type(model).__name__} with others: use mlp")
    return [linear[0].in_features, *(layer.out_features for layer in linear)]


class Floor:
    """All gateways in groups of one size, and the mean over them."""

    def __init__(self, job: workload.Workload, size: int) -> None:
        self.job = job
        self.group = Group(job, size)
        x, y = (torch.from_numpy(array[:, : job.batch_size]) for array in job.load_data())
        one_hot = nn.functional.one_hot(y, int(self.group.param_views[-1].shape[-1])).float()
        self.batches = [(x[start : start + size], one_hot[start : start + size]) for start in self._starts()]
        self._total = [torch.zeros_like(view[0]) for view in self.group.param_views]

    def _starts(self) -> range:
        # Sizes that do not divide the gateways are not tried, so no group is ever short.
        return range(0, self.job.gateways, self.group.size)

    def round(self, current: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run a round of FedAvg from the given parameters and return their successors."""
        for total in self._total:
            total.zero_()
        for x, one_hot in self.batches:
            self.group.receive(current)
            for _ in range(self.job.local_steps):
                self.group.step(x, one_hot)
            for total, view in zip(self._total, self.group.param_views, strict=True):
                total.add_(view.sum(0))
        return [total / self.job.gateways for total in self._total]


def best_group_size(job: workload.Workload, initial: list[torch.Tensor]) -> int:
    """Time one group's round at each size (median of three) and return the size with the least time a gateway."""
    cost: dict[int, float] = {}
    for size in (size for size in GROUP_SIZES if job.gateways % size == 0):
        trial = Floor(job, size)
        x, one_hot = trial.batches[0]
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            trial.group.receive(initial)
            for _ in range(job.local_steps):
                trial.group.step(x, one_hot)
            seconds.append((time.perf_counter() - start) / size)
        cost[size] = statistics.median(seconds[1:])
    return min(cost, key=cost.__getitem__)


def main(workload_path: str, result_path: str) -> None:
    """Run the workload's arithmetic and write the result; its weights are noise-trained and not comparable."""
    job = workload.read(workload_path)
    torch.set_num_threads(job.threads)
    measurement = Measurement("floor", job, packages=("cryptography",))
    weights = job.load_weights()
    current = [value if value.ndim > 1 else value[None] for value in weights.values()]
    with torch.inference_mode():
        size = best_group_size(job, current)
        floor = Floor(job, size)
        for _ in range(job.rounds):
            current = floor.round(current)
            measurement.round_ended()
    final = {name: value.view_as(weights[name]) for name, value in zip(weights, current, strict=True)}
    measurement.write(result_path, final, group_size=size)


if __name__ == "__main__":
    main(*sys.argv[1:])
