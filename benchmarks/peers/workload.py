"""The work that every system of the throughput benchmark does: data, initial weights, sizes, and their files.

A workload is a folder with `workload.json`, `data.npz` (x `[G, N, ...]`, y `[G, N]`) and `weights.npz` (the initial
weights by state_dict name). All systems read the same folder, so they start from the same weights and the same
records. Make one with

    python benchmarks/peers/workload.py FOLDER --model mlp --gateways 16

It must not know any of the systems. It needs numpy and torch alone, which every peer's environment has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from architectures import ARCHITECTURES
from torch import nn

Privacy = Literal["none", "batch", "sample", "gateway"]
Sampling = Literal["poisson", "sequential", "full"]
Optimizer = Literal["adam", "fused_adam"]
Clients = Literal["persistent", "documented"]
Array = npt.NDArray[np.generic]
# A slice where the records lie side by side: a view then, which spares the copy that indices cost.
Selection = npt.NDArray[np.int64] | slice


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One federated job, in fedray's words.

    `privacy` is the noise level: `none`, `batch` (every batch's gradient clipped and noised), `sample` (every record's)
    or `gateway` (every update clipped, noise on their sum). `sampling` says which records a local step takes:

    - `poisson`: each record with probability batch_size / N (what the private runs are timed with);
    - `sequential`: the next batch_size records, from the first on in every round (the one order that all systems
      can be told to take, so timed non-private runs end with the same weights);
    - `full`: the whole shard (q = 1).

    Losses are summed over the records and divided by the public batch size (N under `full`). `processes` is how many
    workers a system that has workers may start; each one computes on `threads` threads. `optimizer` is Adam as users
    write it, or its fused kernel: the same steps, and up to a third faster where layers are as small as here. `clients`
    says how Opacus clients come to be: one that lives as long as its process, or one made anew for each gateway and round
    with a PrivacyEngine and a DataLoader, as Opacus' and Flower's documentation do it.
    """

    model: str
    gateways: int
    rounds: int
    local_steps: int
    batch_size: int
    lr: float
    noise_multiplier: float
    clip_norm: float
    seed: int
    threads: int
    processes: int
    privacy: Privacy
    sampling: Sampling
    optimizer: Optimizer = "adam"
    clients: Clients = "persistent"
    data: str = "data.npz"
    weights: str = "weights.npz"
    folder: str = "."

    def __post_init__(self) -> None:
        """Refuse what no script could run, before any of them starts something slow."""
        if self.model not in ARCHITECTURES:
            raise ValueError(f"model {self.model!r} is unknown: choose from {', '.join(ARCHITECTURES)}")
        if self.privacy not in get_args(Privacy):
            raise ValueError(f"privacy {self.privacy!r} is unknown: choose from {', '.join(get_args(Privacy))}")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling {self.sampling!r} is unknown: choose from {', '.join(get_args(Sampling))}")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"optimizer {self.optimizer!r} is unknown: choose from {', '.join(get_args(Optimizer))}")

        if self.clients not in get_args(Clients):
            raise ValueError(f"clients {self.clients!r} is unknown: choose from {', '.join(get_args(Clients))}")

    @property
    def samples_per_round(self) -> int:
        """Nominal records a round: public numbers only, the same for every system."""
        return self.gateways * self.local_steps * self.batch_size

    def load_data(self) -> tuple[Array, Array]:
        """Read x `[G, N, ...]` and y `[G, N]`."""
        with np.load(Path(self.folder) / self.data) as arrays:
            return arrays["x"], arrays["y"]

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Read the initial weights by state_dict name."""
        with np.load(Path(self.folder) / self.weights) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def build_model(self) -> nn.Module:
        """Build the model with the initial weights."""
        model = ARCHITECTURES[self.model]()
        model.load_state_dict(self.load_weights())
        return model

    def build_optimizer(self, parameters: Iterable[nn.Parameter], lr: float | None = None) -> torch.optim.Adam:
        """Build the local optimizer (pfl hands over the learning rate itself)."""
        return torch.optim.Adam(parameters, lr=self.lr if lr is None else lr, fused=self.optimizer == "fused_adam")

    def divisor(self, num_records: int) -> int:
        """Return what a step's summed loss is divided by."""
        return num_records if self.sampling == "full" else self.batch_size

    def batches(self, round_number: int, gateway: int, num_records: int) -> Iterator[Selection]:
        """Yield the records of each local step of one gateway's round; a batch may be empty."""
        if self.sampling == "poisson":
            stream = np.random.default_rng((self.seed, round_number, gateway))
            rate = self.batch_size / num_records
            for _ in range(self.local_steps):
                yield np.flatnonzero(stream.random(num_records, dtype=np.float32) < rate)
        elif self.sampling == "full":
            for _ in range(self.local_steps):
                yield slice(0, num_records)
        else:
            per_pass = num_records // self.batch_size
            for step in range(self.local_steps):
                start = step % per_pass * self.batch_size
                yield slice(start, start + self.batch_size)


def read(path: Path | str) -> Workload:
    """Read a workload.json; the files that it names are looked up beside it."""
    path = Path(path).resolve()
    content = json.loads(path.read_text())
    return Workload(**{**content, "folder": str(path.parent)})


def write(folder: Path | str, workload: Workload, num_records: int | None = None) -> Path:
    """Make a workload's folder with its data and weights, and return its workload.json.

    Args:
        folder: created where it is missing; files of the same names are overwritten.
        workload: what to write.
        num_records: records a gateway; by default fewer where gateways are many, so that files stay small.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    x, y = synthesise(workload, default_records(workload.gateways) if num_records is None else num_records)
    np.savez(folder / workload.data, x=x, y=y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        initial = ARCHITECTURES[workload.model]().state_dict()
    np.savez(folder / workload.weights, **{name: tensor.numpy() for name, tensor in initial.items()})
    return write_description(folder / "workload.json", workload)


def write_description(path: Path, workload: Workload) -> Path:
    """Write workload.json alone: another job on the data and weights that already lie beside it."""
    content = {name: value for name, value in asdict(workload).items() if name != "folder"}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def default_records(gateways: int) -> int:
    """Return the records a gateway: 1024 up to 64 gateways, 512 up to 256, 256 up to 1000, 64 beyond."""
    return next((records for most, records in ((64, 1024), (256, 512), (1000, 256)) if gateways <= most), 64)


def synthesise(workload: Workload, num_records: int) -> tuple[Array, Array]:
    """Draw learnable records: a class centre plus noise, or for sequences tokens that favour their class's own."""
    stream = np.random.default_rng(workload.seed)
    shape = (workload.gateways, num_records)
    architecture = ARCHITECTURES[workload.model]
    record, num_classes = architecture.record, architecture.num_classes
    y = stream.integers(0, num_classes, shape)
    if record.vocabulary is not None:
        own = stream.integers(0, record.vocabulary, (num_classes, *record.shape))
        drawn = stream.integers(0, record.vocabulary, (*shape, *record.shape))
        return np.where(stream.random(drawn.shape) < 0.3, own[y], drawn), y
    centres = stream.standard_normal((num_classes, *record.shape), dtype=np.float32)
    x = stream.standard_normal((*shape, *record.shape), dtype=np.float32)
    x += np.float32(0.7) * centres[y]
    return x, y


def main() -> None:
    """Write a workload folder from the command line; the defaults are the benchmark's MLP."""
    parser = argparse.ArgumentParser(description="Write the workload that the systems of the benchmark read.")
    parser.add_argument("folder")
    defaults = {
        "model": "mlp", "gateways": 16, "rounds": 6, "local_steps": 20, "batch_size": 32, "lr": 1e-3,
        "noise_multiplier": 1.0, "clip_norm": 1.0, "seed": 0, "threads": 1, "processes": 2, "privacy": "sample",
        "sampling": "poisson", "optimizer": "adam",
    }  # fmt: skip
    choices = {
        "model": tuple(ARCHITECTURES),
        "privacy": get_args(Privacy),
        "sampling": get_args(Sampling),
        "optimizer": get_args(Optimizer),
    }
    for field in fields(Workload):
        if field.name in defaults:
            value = defaults[field.name]
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(value), default=value, choices=choices.get(field.name))
    parser.add_argument("--records", type=int, default=None, help="records a gateway (default: by gateways)")
    arguments = vars(parser.parse_args())
    folder, records = arguments.pop("folder"), arguments.pop("records")
    print(write(folder, Workload(**arguments), records))


if __name__ == "__main__":
    main()
