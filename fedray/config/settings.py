"""RunConfig: every setting of a run, one field a flag, and the checks that need nothing but the settings themselves."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedray.errors import InputError

DEFAULT_NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    Each field is a command-line flag of the same name; its docstring line is the flag's help.
    """

    gateways: int = 16
    """How many gateways (FL clients) take part."""
    rounds: int = 10
    """Rounds of broadcast, local training, gather and average."""
    noise_level: Literal["none", "batch", "sample", "gateway"] = "sample"
    """What is clipped and noised: nothing, each batch's gradient, each record's gradient, or each gateway's update."""
    local_steps: int = 16
    """Optimizer steps of each gateway in a round."""
    batch_size: int = 64
    """B, the expected and public size of a Poisson batch, in records."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Local optimizer; it starts fresh each round."""
    lr: float = 0.02
    """Learning rate of the local optimizer."""
    noise_multiplier: float | None = None
    """sigma: noise standard deviation over the clip norm (1.0 when neither it nor --target-epsilon is given)."""
    clip_norm: float = 1.0
    """C, the L2 norm that gradients or updates are clipped to."""
    delta: float = 1e-5
    """delta of every (epsilon, delta) guarantee."""
    target_epsilon: float | None = None
    """Find the noise multiplier with which the planned run ends at this epsilon (the level's first guarantee)."""
    max_epsilon: float | None = None
    """Stop before the round that would pass this epsilon (the level's first guarantee)."""
    dataset: str = "toy"
    """toy, digits, or module:function; function(gateways) returns (train, test)."""
    model: str = "mlp"
    """mlp, cnn, or module:function; function() returns a torch module."""
    fix_model: bool = False
    """Replace layers that private training forbids (BatchNorm) by what Opacus puts in their place (GroupNorm)."""
    partition: str = "iid"
    """How one data set is split over gateways: iid or dirichlet:ALPHA (label skew; smaller ALPHA, more skew)."""
    samples_per_gateway: int | None = None
    """Public nominal shard size, in records: 4096 on toy; needed where shards are loaded lazily."""
    weights: Literal["uniform", "records"] = "uniform"
    """Average updates uniformly, or by record counts (reveals the counts; adjacency becomes zero-out)."""
    seed: int | None = None
    """Makes the run reproducible, and its noise predictable: simulation only. Without it the noise is strong."""
    pool: Literal["ray", "inline"] = "ray"
    """Where gateways run: Ray actors, or this process (debugging)."""
    ray_address: str | None = None
    """Address of a Ray cluster (default: RAY_ADDRESS if set, else a local Ray of this machine)."""
    gateways_per_actor: Literal["auto"] | int = "auto"
    """Gateways that one actor hosts; auto gives each gateway its own actor while there is a slot for it."""
    engine: Literal["auto", "stacked", "sequence", "alone", "opacus"] = "auto"
    """Trainer: stacked (all gateways of an actor in one step), opacus (reference, one by one); auto: stacked if proven."""
    memory_limit: int | None = None
    """Memory that one actor's training may take, in MiB (default: its share of half the machine's or GPU's memory)."""
    participation: float = 1.0
    """Chance of each gateway to take part in a round, independently (Poisson)."""
    max_failures: int = 10
    """How many lost actors a run replaces before it gives up; 0: none."""
    round_timeout: float = 3600.0
    """Seconds that a round may take; what has not answered by then counts as failed."""
    placement_timeout: float = 30.0
    """Seconds to wait for GPUs that the cluster has but somebody else holds."""
    on_failure: Literal["fail", "drop"] = "fail"
    """What a failed gateway means: the end of the run, or a round without it (charged all the same)."""
    max_update_norm: float | None = None
    """Refuse updates whose L2 norm is larger (default: any finite update is taken)."""
    no_keep_key: bool = False
    """Keep the round keys in memory only: a stopped run cannot be resumed, its directory gives no noise away."""
    track: Literal["none", "tensorboard"] = "none"
    """Also write the metrics for TensorBoard into the run directory."""
    resume: Path | None = None
    """Go on with this run directory; with --rounds, extend a finished run to that many rounds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where gateways train; auto takes GPUs where there are any."""
    out: Path | None = None
    """Run directory to create (default: runs/<UTC time>-<noise level>)."""
    quiet: bool = False
    """Print the closing sentences only."""
    dry_run: bool = False
    """Print plan, placement, sigma and the final epsilon; train nothing, write nothing."""

    def __post_init__(self) -> None:
        """Check every field on its own and the fields against each other.

        Raises:
            InputError: A value breaks a rule.
        """
        for name in ("out", "resume"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
            elif not isinstance(value, Path | None):
                raise InputError(f"{flag(name)} is {value!r}; it must be a path.")
        for name in ("dataset", "model"):
            if not isinstance(value := getattr(self, name), str):
                raise InputError(
                    f"{flag(name)} is {value!r}; it must be text, as on the command line: objects go to Orchestrator itself."
                )
        for name, rule, holds in _RULES:
            value = getattr(self, name)
            if value is not None and not _is_true(holds, value):
                raise InputError(f"{flag(name)} is {value!r}; it must be {rule}.")
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise InputError(f"{flag(field.name)} is {value!r}; it must be one of {', '.join(choices)}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.gateways_per_actor != "auto" and not _is_count(self.gateways_per_actor):
            raise InputError(
                f"--gateways-per-actor is {self.gateways_per_actor!r}; it must be auto or a whole number of at least 1."
            )
        if self.target_epsilon is not None and self.noise_multiplier is not None:
            raise InputError(
                f"--target-epsilon {self.target_epsilon:g} and --noise-multiplier {self.noise_multiplier:g} exclude each "
                "other; give one, the other follows."
            )
        for name in ("target_epsilon", "max_epsilon", "noise_multiplier"):
            if self.noise_level == "none" and getattr(self, name) is not None:
                raise InputError(
                    f"{flag(name)} is {getattr(self, name):g} but --noise-level none has no noise and promises nothing; "
                    "choose sample, batch or gateway."
                )
        if self.noise_level == "gateway" and self.weights == "records":
            raise InputError(
                "--weights is 'records' with --noise-level gateway; weights change the sensitivity of the sum, "
                "so they must be uniform there."
            )
        if self.out is not None:
            _check_out(self.out)

    def resolve(self, **changes: Any) -> RunConfig:
        """Return a copy with these fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {
            field.name: str(value) if isinstance(value := getattr(self, field.name), Path) else value
            for field in dataclasses.fields(self)
        }


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def misfit(name: str, value: object, from_text: bool = False) -> str | None:
    """Return what a field must be when the value is of another kind; None when it fits.

    Args:
        name: The field.
        value: From a file, or from the command line.
        from_text: Whether the value is text that stands for it.
    """
    declared = str(RunConfig.__dataclass_fields__[name].type)
    if name in _CHOICES:
        return None if value in _CHOICES[name] else "one of " + ", ".join(_CHOICES[name])
    if name == "gateways_per_actor" and value == "auto":
        return None
    rule = next((rule for field, rule, _ in _RULES if field == name), None)
    if declared == "bool":
        return None if isinstance(value, bool) else "true or false"
    if declared.startswith("float"):
        return None if _parses(float, value, from_text) else rule
    if "int" in declared:
        return None if _parses(int, value, from_text) else (rule or "auto or a whole number of at least 1")
    return None if isinstance(value, str) else "a path" if name == "out" else _FORMS.get(name, "text")


def _parses(kind: type[int] | type[float], value: object, from_text: bool) -> bool:
    if from_text:
        try:
            kind(str(value))
        except ValueError:
            return False
        return True
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def _check_out(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            kind = "not empty" if out.is_dir() else "a file"
            raise InputError(f"--out {out} exists and is {kind}; it must be a new or empty directory.")
        parent = next(parent for parent in out.absolute().parents if parent.exists())
    except OSError as error:  # a name that is too long, a directory that may not be read
        raise InputError(f"--out {out} cannot be used ({error}); it must be a new or empty directory.") from error
    if not parent.is_dir():
        raise InputError(f"--out {out} lies under {parent}, which is a file; choose a path under a directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} lies under {parent}, which may not be written; choose another place.")


def _is_true(holds: Callable[[Any], bool], value: Any) -> bool:
    try:
        return holds(value)
    except TypeError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_scale(value: Any) -> bool:
    return _is_number(value) and 1e-15 <= value <= 1e15


_POSITIVE = "a positive, finite number"
_COUNT = "a whole number of at least 1"
_SCALE = "a number between 1e-15 and 1e15"
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("gateways", _COUNT, _is_count),
    ("rounds", _COUNT, _is_count),
    ("local_steps", _COUNT, _is_count),
    ("batch_size", _COUNT, _is_count),
    ("samples_per_gateway", _COUNT, _is_count),
    ("memory_limit", _COUNT, _is_count),
    (
        "participation",
        "a number above 0 and at most 1",
        lambda value: _is_number(value) and 2.0**-32 <= value <= 1,
    ),
    (
        "max_failures",
        "a whole number of at least 0",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    ),
    ("round_timeout", _POSITIVE, _is_positive),
    ("placement_timeout", _POSITIVE, _is_positive),
    ("max_update_norm", _POSITIVE, _is_positive),
    ("lr", _POSITIVE, _is_positive),
    (
        "noise_multiplier",
        "a number between 0.001 and 1e6 (for no noise at all use --noise-level none)",
        lambda value: _is_number(value) and 1e-3 <= value <= 1e6,
    ),
    ("clip_norm", _SCALE, _is_scale),
    ("target_epsilon", _POSITIVE, _is_positive),
    ("max_epsilon", _POSITIVE, _is_positive),
    ("delta", "a number between 1e-15 and 1 (exclusive)", lambda value: _is_number(value) and 1e-15 < value < 1),
    (
        "seed",
        "a whole number between 0 and 2^63 - 1",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63,
    ),
)
_FORMS = {
    "dataset": "toy, digits or module:function",
    "model": "mlp, cnn or module:function",
    "partition": "iid or dirichlet:ALPHA",
    "ray_address": "an address such as host:port",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "noise_level": ("none", "batch", "sample", "gateway"),
    "optimizer": ("adam", "sgd"),
    "weights": ("uniform", "records"),
    "pool": ("ray", "inline"),
    "engine": ("auto", "stacked", "sequence", "alone", "opacus"),
    "on_failure": ("fail", "drop"),
    "track": ("none", "tensorboard"),
    "device": ("auto", "cpu", "cuda"),
}
