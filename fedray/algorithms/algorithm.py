"""The seam of algorithms: what a gateway does with its gradients, what it uploads, and what the orchestrator makes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.server_optimizer import ServerOptimizer, State

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@runtime_checkable
class Algorithm(Protocol):
    """An algorithm of federated learning.

    Its privacy is that of the noise level, whatever it does: at `sample` and `batch` its local part sees gradients that are
    clipped and noised already, and no records, so that all it computes is post-processing; at `gateway` its uploads are
    joined to one vector, which is clipped to C and noised as a whole.

    Attributes:
        uploads: Names of what a gateway uploads, each a vector `[P]`; the first is the update.
    """

    uploads: Sequence[str]

    def local_gradient(self, gradient: torch.Tensor, params: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """Return the gradients `[G, P]` that the local optimizer gets at a step.

        Args:
            gradient: `[G, P]`, one row a gateway, clipped and noised as the level says; may be overwritten.
            params: `[G, P]`, as they are before the step; not to be changed.
            sent: `[P]`, what the orchestrator sent.
        """
        ...

    def after_local(self, params: torch.Tensor, sent: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what gateways upload after their local steps, by the names in `uploads`, each `[G, P]`.

        Args:
            params: `[G, P]`, after local training; may be overwritten.
            sent: `[P]`.
        """
        ...

    def server(
        self, params: Float32Array, means: Mapping[str, Float64Array], optimizer: ServerOptimizer, state: State
    ) -> tuple[Float32Array, State]:
        """Return the next parameters `[P]` and the server's state.

        Args:
            params: `[P]`, those of this round.
            means: What was uploaded, aggregated over gateways, each `[P]`; may be overwritten.
            optimizer: Of --server-optimizer.
            state: What the last round returned; empty in the first. It is kept in checkpoints.
        """
        ...


class LocalRule:
    """An algorithm's local part in one round of some gateways, each on its own.

    fedray's own algorithms treat rows apart. Others see one gateway at a time, each in a copy that is fresh in every round:
    what a gateway's round computes depends on no other gateway and on no round before.

    Args:
        algorithm: Copied unless it is fedray's own.
        gateways: How many.
        sent: `[P]`, what the orchestrator sent.
    """

    def __init__(self, algorithm: Algorithm, gateways: int, sent: torch.Tensor) -> None:
        own = type(algorithm).__module__.startswith("fedray.")
        self._algorithms = [algorithm] if own else [copy.deepcopy(algorithm) for _ in range(gateways)]
        self._sent = [sent] if own else [sent.clone() for _ in range(gateways)]  # one may be changed by whoever gets it
        self.changes_gradients = not getattr(algorithm.local_gradient, "changes_nothing", False)

    def gradient(self, gradient: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Return the gradients for the local optimizer `[G, P]`, see `Algorithm.local_gradient`."""
        calls = self._rows(gradient, params)
        return _stacked([one.local_gradient(*rows, sent) for one, sent, *rows in calls], gradient.shape)

    def uploads(self, params: torch.Tensor) -> torch.Tensor:
        """Return what gateways upload, side by side: `[G, W]`, W = P · uploads."""
        found = []
        for one, sent, rows in self._rows(params):
            uploads = one.after_local(rows, sent)
            parts = [_stacked([uploads[name]], rows.shape) for name in one.uploads]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _rows(self, *stacks: torch.Tensor) -> list[tuple[Any, ...]]:
        """Return each algorithm with what was sent and the rows that it sees."""
        both = list(zip(self._algorithms, self._sent, strict=True))
        if len(both) == 1:
            return [(*both[0], *stacks)]
        return [(*pair, *(stack[i : i + 1] for stack in stacks)) for i, pair in enumerate(both)]


def _stacked(parts: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    found = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if found.shape != shape or found.dtype != torch.float32:
        raise TypeError(f"the algorithm returned {tuple(found.shape)} {found.dtype}, not {tuple(shape)} torch.float32")
    return found


def apart(algorithm: Algorithm, means: Float64Array) -> dict[str, Float64Array]:
    """Return the parts of aggregated uploads `[W]` by their names."""
    return dict(zip(algorithm.uploads, np.split(means, len(algorithm.uploads)), strict=True))
