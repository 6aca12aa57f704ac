"""What every release must look like, whatever the level."""

from __future__ import annotations

import numpy as np

from fedray.privacy.spec import PrivacySpec
from tests.privacy.worlds import Observed


def releases_are_as_declared(observed: Observed, spec: PrivacySpec) -> None:
    """Each step releases (clipped + noise)/divisor once, with the public divisor and exactly the noise it names."""
    divisor = spec.batch_size if spec.noise_level == "sample" else 1
    per_gateway: dict[int, list[int]] = {}
    for gateway, step in observed.steps:
        per_gateway.setdefault(gateway, []).append(step)
    for gateway, steps in per_gateway.items():
        assert steps == list(range(spec.local_steps)), f"gateway {gateway} released steps {steps}"
    for seen in observed.steps.values():
        release = seen.release
        assert release.divisor == divisor, f"divided by {release.divisor}, public is {divisor}"
        expected = (release.clipped.astype(np.float64) + release.noise) / divisor
        np.testing.assert_allclose(seen.gradient, expected, rtol=1e-5, atol=1e-5 * spec.noise_std / divisor)
