"""What an actor does: build a trainer once, then train its gateways each round. Plain Python, used by both pools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedray.algorithms.aggregation import GroupResult, weighted_sum
from fedray.data.inputs import InputArrays, arrays, leaf_names, leaves
from fedray.data.shards import RecordRules, Shard, ShardCache, Shards
from fedray.errors import GatewayError, InputError
from fedray.models.layout import Layout
from fedray.pool.hardware import hardware_of
from fedray.privacy.clipping import clip_rows
from fedray.privacy.core_dumps import without_core_dumps
from fedray.privacy.levels import level_of
from fedray.privacy.streams import RoundKeys, mac
from fedray.training.engines import Engine, new_trainer
from fedray.training.program import Program
from fedray.training.trainer import LocalTraining

_LARGEST_STACK_BYTES = 32 * 2**20  # of updates held at a time
_LARGEST_ANSWER_BYTES = 100_000  # of updates; past it an actor answers with their sum, which is quicker to send
_CPU = torch.device("cpu")
_Rows = npt.NDArray[np.float32] | list[npt.NDArray[np.float32] | GatewayError]


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything an actor needs, sent to it once.

    Args:
        model: With its full initial state.
        training: How gateways train.
        shards: Where records come from.
        rules: What they must look like.
        engine: Which trainer.
        program: Of the model and loss, where the engine is "alone".
        memory_limit: Bytes that one actor's training may take; None for its share of half the machine's memory.
        max_update_norm: Refuse longer updates.
        drop_failures: Leave out gateways that fail instead of raising.
        steady_cohort: Whether everybody takes part in every round, so that noise can be drawn ahead.
        each_row: Whether the orchestrator needs each gateway's upload, not their sum.
    """

    model: torch.nn.Module
    training: LocalTraining
    shards: Shards
    rules: RecordRules
    engine: Engine
    program: Program | None = None
    memory_limit: int | None = None
    max_update_norm: float | None = None
    drop_failures: bool = False
    steady_cohort: bool = False
    each_row: bool = False


def resolve_device(device: str) -> torch.device:
    """Return the torch device of --device in this process; GPUs are asked for explicitly.

    Raises:
        InputError: --device cuda without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda but this machine has no GPU that torch can use; use --device cpu or auto.")
    return torch.device("cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu")


def memory_share(device: torch.device, sharing: int) -> int:
    """Return the default memory limit of one of `sharing` actors of a machine or GPU: its share of one half."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // (2 * sharing)


@dataclass(frozen=True)
class _RoundShards:
    """Shards as a round loads them: a failure is the gateway's, and names the round.

    A shard that was fine before the first round may be none any more when it is loaded again.
    """

    cache: ShardCache
    round_index: int

    def __getitem__(self, gateway: int) -> Shard:
        try:
            return self.cache[gateway]
        except (InputError, GatewayError) as error:
            details = error.details if isinstance(error, GatewayError) else ""
            raise GatewayError(f"gateway {gateway} failed in round {self.round_index}: {error}", details) from error


class Worker:
    """Trains gateways; keeps caches, never state that matters.

    Args:
        setup: See `WorkerSetup`.
        device: Where to train.
        sharing: How many actors share the machine or GPU.

    Attributes:
        hardware: All that a gateway's result depends on beside its inputs: where it was trained, and the memory that
            decides into which sub-groups a group is cut.
    """

    def __init__(self, setup: WorkerSetup, device: torch.device, sharing: int = 1) -> None:
        without_core_dumps()
        limit = memory_share(device, sharing) if setup.memory_limit is None else setup.memory_limit
        self.hardware = f"{hardware_of(device)}; {limit} bytes to train in"
        self._setup = setup
        self._shards = ShardCache(setup.shards, setup.rules, limit_bytes=max(limit // 4, 1))
        self._trainer = new_trainer(
            setup.engine, setup.model, setup.training, device, max(limit // 2, 1), setup.program
        )
        self._layout = Layout.of(setup.model)
        self._width = len(setup.training.algorithm.uploads) * self._layout.num_params  # values that a gateway uploads
        self._largest_stack = min(limit // 4, _LARGEST_STACK_BYTES)
        self._thread = ThreadPoolExecutor(max_workers=1)  # starts when it has work
        self._drawing: Future[None] | None = None
        self._stop_drawing = Event()

    def load(self, gateways: Sequence[int], key: bytes) -> dict[int, str]:
        """Load and check shards before the first round; return their MACs under `key`.

        Raises:
            InputError: A shard breaks a rule or does not load.
        """
        found = {}
        for gateway in gateways:
            try:
                shard = self._shards[gateway]
            except GatewayError as error:
                raise InputError(error.message) from error
            found[gateway] = shard_mac(key, arrays(shard.x), shard.y.numpy())
        return found

    def train(self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]) -> GroupResult:
        """Train gateways for one round.

        Raises:
            GatewayError: The user's code failed, or an update is refused, see `_updates`.
        """
        self._settle_draws()
        weighted = self._setup.training.privacy.weights == "records"
        row_bytes = 4 * self._width
        together = max(1, len(gateways) if self._setup.each_row else self._largest_stack // row_bytes)
        large = len(gateways) > 2 and len(gateways) * row_bytes > _LARGEST_ANSWER_BYTES
        as_sum = (len(gateways) > together or large) and not self._setup.each_row
        arrived: list[int] = []
        weights: list[float] = []
        failures: list[str] = []
        total: npt.NDArray[np.float64] | None = None
        updates = np.empty((0, self._width), np.float32)
        for first in range(0, len(gateways), together):
            part, updates, refused = self._updates(keys, params, gateways[first : first + together], for_a_sum=as_sum)
            failures += refused
            own = [float(self._shards[gateway].num_records) if weighted else 1.0 for gateway in part]
            arrived += part
            weights += own
            if as_sum:
                total = weighted_sum(list(updates), own, _CPU, np.zeros(self._width) if total is None else total)
        return GroupResult(
            gateways=tuple(arrived),
            updates=updates if total is None else None,
            weights=tuple(weights) if weighted else None,
            layout_digest=self._layout.digest,
            total=total,
            failures=tuple(failures),
        )

    def draw_ahead(self) -> None:
        """Begin to draw for the round that follows, on a thread, until it comes."""
        if self._setup.steady_cohort:
            self._drawing = self._thread.submit(self._trainer.draw_ahead, self._stop_drawing)

    def _settle_draws(self) -> None:
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            self._stop_drawing.set()
            try:
                drawing.result()
            finally:
                self._stop_drawing.clear()

    def _updates(
        self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int], *, for_a_sum: bool
    ) -> tuple[list[int], npt.NDArray[np.float32], list[str]]:
        """Return who arrived, their updates, and what was wrong with the others.

        Values that are not finite are found here if the updates end in a sum, in which nobody could tell whose they are; and
        where updates are looked at anyway. Else the orchestrator finds them when it adds up, which spares a pass over a large
        model.
        """
        rows: _Rows | None = None
        try:
            rows = self._trainer.train(keys, params, gateways, _RoundShards(self._shards, keys.round_index))
        except GatewayError:
            if len(gateways) == 1 and not self._setup.drop_failures:
                raise
        if rows is None:  # outside the handler, so that the user's traceback does not show the first attempt as well
            # One by one, to find whose fault it is: a gateway's round does not depend on who trains beside it.
            rows = self._one_by_one(keys, params, gateways)
        looked_at = for_a_sum or self._setup.drop_failures or self._setup.max_update_norm is not None
        problems = self._problems(rows, gateways, keys.round_index) if looked_at or isinstance(rows, list) else {}
        if problems and not self._setup.drop_failures:
            raise next(iter(problems.values()))
        good = [row for row in range(len(gateways)) if row not in problems]
        stack = (
            rows if isinstance(rows, np.ndarray) and not problems else _stack([rows[row] for row in good], self._width)
        )
        if level_of(self._setup.training.privacy).central_noise:
            privacy = self._setup.training.privacy
            stack = clip_rows(torch.from_numpy(stack), privacy.clip_norm, privacy.clipping).numpy()
        return [gateways[row] for row in good], stack, [str(problem) for problem in problems.values()]

    def _one_by_one(self, keys: RoundKeys, params: npt.NDArray[np.float32], gateways: Sequence[int]) -> _Rows:
        rows: list[npt.NDArray[np.float32] | GatewayError] = []
        shards = _RoundShards(self._shards, keys.round_index)
        for gateway in gateways:
            try:
                rows.append(self._trainer.train(keys, params, [gateway], shards)[0])
            except GatewayError as error:
                if not self._setup.drop_failures:
                    raise
                rows.append(error)
        return rows

    def _problems(self, rows: _Rows, gateways: Sequence[int], round_index: int) -> dict[int, GatewayError]:
        """Return what is wrong with which row."""
        found: dict[int, GatewayError] = {}
        limit = self._setup.max_update_norm
        clipped = level_of(self._setup.training.privacy).central_noise  # makes a non-finite update zero: it arrives
        if isinstance(rows, np.ndarray):
            norms = torch.linalg.vector_norm(torch.from_numpy(rows), dim=1).tolist()
            # Squares of float32 overflow at norms past 1.8e19, which are finite still.
            norms = [norm if np.isfinite(norm) else _norm(row) for norm, row in zip(norms, rows, strict=True)]
        else:
            norms = [0.0 if isinstance(row, GatewayError) else _norm(row) for row in rows]
        for index, (gateway, row, norm) in enumerate(zip(gateways, rows, norms, strict=True)):
            if isinstance(row, GatewayError):
                found[index] = row
            elif not np.isfinite(norm) and not clipped:
                found[index] = GatewayError(
                    f"gateway {gateway} has an update that is NaN or infinite in round {round_index}; local training "
                    "diverged: lower --lr, or use --on-failure drop."
                )
            elif limit is not None and norm > limit:
                found[index] = GatewayError(
                    f"gateway {gateway} has an update of norm {norm:.4g} in round {round_index}, past --max-update-norm "
                    f"{limit:g}; look at its data, or use --on-failure drop."
                )
        return found


def _norm(row: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(row.astype(np.float64)))


def _stack(rows: Sequence[Any], width: int) -> npt.NDArray[np.float32]:
    return np.stack(rows) if rows else np.empty((0, width), np.float32)


def shard_mac(key: bytes, x: InputArrays, y: npt.NDArray[Any]) -> str:
    """Return the MAC of a shard's records: of each array's name (where x has several), type, shape and values."""
    parts = [np.ascontiguousarray(part) for part in (*leaves(x), y)]
    names = ["", ""] if isinstance(x, np.ndarray) else [*leaf_names(x), "y"]
    heads = [f"{name}{part.dtype}{part.shape}" for name, part in zip(names, parts, strict=True)]
    return mac(key, b"".join(["".join(heads).encode(), *(part.tobytes() for part in parts)]))
