"""Describes what decides how a process rounds its results: processor, kernels, settings. Knows nothing of gateways."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import torch

# What a user sets to choose kernels; each of them rounds in its own way.
_KERNEL_CHOICES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def hardware_of(device: torch.device) -> str:
    """Return one line about all that decides how this process rounds: equal lines mean equal bits from equal inputs.

    Args:
        device: Where it computes. A GPU's line names the CPU as well, which draws and averages.
    """
    parts = [_processor(), f"kernels {torch.backends.cpu.get_cpu_capability()}", _switches()]
    parts += [f"{name}={os.environ[name]}" for name in _KERNEL_CHOICES if name in os.environ]
    return "; ".join([*_gpu(device), *parts])


def _gpu(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    found = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch lacks the annotation
    # Torch's own generator deals out its numbers by the count of multiprocessors, and so do its kernels the work.
    return [
        f"{found.name}, capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{found.total_memory} bytes, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    ]


def _switches() -> str:
    """Return torch's own settings of precision and determinism."""
    return (
        f"precision {torch.get_float32_matmul_precision()}, "
        f"deterministic {torch.are_deterministic_algorithms_enabled()}, "
        f"cuDNN benchmark {torch.backends.cudnn.benchmark}, TF32 {torch.backends.cudnn.allow_tf32}, "
        f"mkldnn {torch.backends.mkldnn.enabled}"
    )


@cache
def _processor() -> str:
    """Return the processor's name and a digest of what it can do (libraries choose their kernels by that)."""
    wanted = (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "stepping",
        "flags",
        "CPU implementer",
        "CPU part",
        "Features",
    )
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")  # the cores of a machine are alike
    except OSError:  # not Linux
        first = ""
    pairs = (line.partition(":")[::2] for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, value in pairs if name.strip() in wanted}
    name = fields.get("model name") or platform.processor() or platform.machine()
    abilities = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:16]
    return f"{platform.machine()} {name}, abilities {abilities}"
