"""RunConfig: every setting of a run, in groups; the names of all settings differ, so that each one is a flag."""

from __future__ import annotations

import dataclasses
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.config.data import DataSettings
from fedray.config.federation import FederationSettings
from fedray.config.machine import MachineSettings
from fedray.config.privacy import DEFAULT_NOISE_MULTIPLIER, PrivacySettings
from fedray.config.rules import Declaration, declarations, flag
from fedray.config.run import RunSettings
from fedray.config.training import TrainingSettings
from fedray.errors import InputError
from fedray.privacy.levels import LEVELS
from fedray.privacy.shapes import Clipping, FixedClipping, IndependentNoise, NoiseShape
from fedray.privacy.spec import PrivacySpec


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run, in groups.

    `RunConfig().resolve(gateways=4, noise_level="batch")` sets some by their names alone, which are those of the flags.

    Args:
        federation: Who takes part, and what becomes of their updates.
        data: Where records come from, and who holds which.
        training: What is learned, with which model, how.
        privacy: What is clipped and noised, and how much it may cost.
        run: Randomness, directory, what is shown.
        machine: Where gateways run, and what is done when something fails.

    Raises:
        InputError: A value breaks a rule, or two contradict each other.
    """

    federation: FederationSettings = FederationSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = PrivacySettings()
    run: RunSettings = RunSettings()
    machine: MachineSettings = MachineSettings()

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        privacy, level = self.privacy, LEVELS[self.privacy.noise_level]
        if privacy.target_epsilon is not None and privacy.noise_multiplier is not None:
            raise InputError(
                f"--target-epsilon {privacy.target_epsilon:g} and --noise-multiplier {privacy.noise_multiplier:g} exclude "
                "each other; give one, the other follows."
            )
        for name in ("target_epsilon", "max_epsilon", "noise_multiplier"):
            if not level.is_private and getattr(privacy, name) is not None:
                raise InputError(
                    f"{flag(name)} is {getattr(privacy, name):g} but --noise-level {level.name} has no noise and promises "
                    "nothing; choose sample, batch or gateway."
                )
        if not level.is_private and privacy.clip_norm != PrivacySettings.clip_norm:
            raise InputError(
                f"--clip-norm is {privacy.clip_norm:g} but --noise-level {level.name} clips nothing; leave it out, or choose "
                "sample, batch or gateway."
            )
        if level.central_noise and self.federation.weights == "records":
            raise InputError(
                f"--weights is 'records' with --noise-level {level.name}; weights change the sensitivity of the sum, "
                "so they must be uniform there."
            )
        if self.run.out is not None:
            _check_out(self.run.out)

    def resolve(self, **changes: Any) -> RunConfig:
        """Return a copy with these settings changed (and checked again).

        Args:
            changes: By name of a setting, such as `rounds=3`, or of a group.

        Raises:
            InputError: A value breaks a rule.
            TypeError: A name is neither.
        """
        groups = {name: changes.pop(name) for name in list(changes) if name in GROUPS}
        for name, group in GROUPS.items():
            own = {setting: changes.pop(setting) for setting in list(changes) if setting in declarations(group)}
            if own:
                groups[name] = dataclasses.replace(groups.get(name, getattr(self, name)), **own)
        if changes:
            raise TypeError(f"{', '.join(changes)} is no setting")
        return dataclasses.replace(self, **groups)

    def spec(
        self,
        nominal_records: int,
        clipping: Clipping = FixedClipping(),
        noise_shape: NoiseShape = IndependentNoise(),
    ) -> PrivacySpec:
        """Return the public constants of a run with these settings.

        Args:
            nominal_records: The public size of a shard.
            clipping: Of --clip.
            noise_shape: Of --noise-shape.
        """
        sigma = self.privacy.noise_multiplier
        return PrivacySpec(
            noise_level=self.privacy.noise_level,
            noise_multiplier=DEFAULT_NOISE_MULTIPLIER if sigma is None else sigma,
            clip_norm=self.privacy.clip_norm,
            delta=self.privacy.delta,
            batch_size=self.training.batch_size,
            sample_rate=self.training.batch_size / nominal_records,
            local_steps=self.training.local_steps,
            expected_cohort=self.federation.gateways * self.federation.participation,
            weights=self.federation.weights,
            participation=self.federation.participation,
            arrival_may_depend_on_data=self.federation.on_failure == "drop",
            clipping=clipping,
            noise_shape=noise_shape,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all settings by name as JSON values, without their groups, as config.json holds them."""
        found = {name: getattr(getattr(self, group), name) for name, group in GROUP_OF.items()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}

    if not TYPE_CHECKING:  # so that a type checker still knows which names there are

        def __getattr__(self, name: str) -> Any:
            if name not in GROUP_OF:
                raise AttributeError(f"RunConfig has no setting {name!r}")
            _warn([name])
            return getattr(getattr(self, GROUP_OF[name]), name)


GROUPS: dict[str, type] = {
    "federation": FederationSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "privacy": PrivacySettings,
    "run": RunSettings,
    "machine": MachineSettings,
}
GROUP_OF = {name: group for group, settings in GROUPS.items() for name in declarations(settings)}
SETTINGS: dict[str, Declaration] = {name: declarations(GROUPS[group])[name] for name, group in GROUP_OF.items()}
DEFAULTS = RunConfig().as_dict()


def _accept_flat_names(self: RunConfig, **given: Any) -> None:
    """Take groups, and for this release settings without their group, as RunConfig(gateways=4) was until 0.1."""
    flat = {name: given.pop(name) for name in list(given) if name in GROUP_OF}
    if flat:
        _warn(list(flat))
        given |= {name: getattr(RunConfig(**given).resolve(**flat), name) for name in GROUPS}
    _take_groups(self, **given)


_take_groups = RunConfig.__init__
RunConfig.__init__ = _accept_flat_names  # type: ignore[method-assign]  # for this release


def _warn(names: list[str]) -> None:
    name = names[0]
    warnings.warn(
        f"settings lie in groups now: {name} is config.{GROUP_OF[name]}.{name}, and "
        f"RunConfig().resolve({', '.join(f'{one}=…' for one in names)}) sets it; the old form will go.",
        DeprecationWarning,
        stacklevel=3,
    )


def _check_out(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            kind = "not empty" if out.is_dir() else "a file"
            raise InputError(f"--out {out} exists and is {kind}; it must be a new or empty directory.")
        parent = next(parent for parent in out.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:  # a name that is too long, a directory that may not be read
        raise InputError(f"--out {out} cannot be used ({error}); it must be a new or empty directory.") from error
    if not parent.is_dir():
        raise InputError(f"--out {out} lies under {parent}, which is a file; choose a path under a directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} lies under {parent}, which may not be written; choose another place.")
