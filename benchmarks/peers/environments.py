"""Make the virtual environments that the peers of the throughput benchmark run in.

Each peer pins libraries that clash with fedray's (Flower brings its own Ray, pfl its own dp-accounting), so each one
gets an interpreter of its own under `benchmarks/.environments/`. Run it as

    python benchmarks/peers/environments.py [flower] [pfl]

Calling it again is free: an environment whose recorded requirements match is left alone. It must not know how a
peer is measured.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(__file__).resolve().parent.parent / ".environments"

# torch stands in the same command as the peer: resolved together, pip takes one build that suits both, where a second
# command would replace it.
TORCH = "torch>=2.6,<2.14"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One peer's environment: what pip installs, and what must then import."""

    name: str
    requirements: tuple[str, ...]
    imports: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the environment's content; a change of it rebuilds the environment."""
        content = json.dumps([self.requirements, self.imports])
        return hashlib.sha256(content.encode()).hexdigest()


FLOWER = Environment(
    name="flower",
    requirements=(TORCH, "flwr[simulation]>=1.24,<2", "opacus>=1.5,<2"),
    imports=("torch", "flwr.serverapp", "flwr.clientapp", "opacus", "ray"),
)
PFL = Environment(
    name="pfl",
    requirements=(TORCH, "pfl[pytorch]>=0.6,<0.7"),
    imports=("torch", "pfl.aggregate.simulate", "pfl.privacy.gaussian_mechanism"),
)
ALL = {environment.name: environment for environment in (FLOWER, PFL)}


class EnvironmentFailed(RuntimeError):
    """A peer's environment could not be made; the message says which step failed and where its log is."""


def interpreter() -> str:
    """Find the Python 3.11 that the environments are built on (the version fedray itself is benchmarked with).

    Raises:
        EnvironmentFailed: there is none on the PATH.
    """
    if sys.version_info[:2] == (3, 11):
        return getattr(sys, "_base_executable", sys.executable)
    found = shutil.which("python3.11")
    if found is None:
        raise EnvironmentFailed("the peers need Python 3.11, and no python3.11 is on the PATH: install it first")
    return found


def is_ready(environment: Environment) -> bool:
    """Tell whether the environment exists and was completed for today's requirements."""
    marker = environment.folder / "complete"
    return environment.python.exists() and marker.exists() and marker.read_text() == environment.fingerprint


def make(environment: Environment) -> Path:
    """Make the environment unless it is ready, and return its interpreter.

    Raises:
        EnvironmentFailed: creating, installing or importing failed; the environment is then left unmarked, so that
            the next call starts over.
    """
    if is_ready(environment):
        return environment.python
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    log = ENVIRONMENTS / f"{environment.name}.log"
    log.write_text("")
    print(f"making the environment of {environment.name} (some minutes; log: {log})", file=sys.stderr, flush=True)
    _step(environment, "create", [interpreter(), "-m", "venv", "--clear", str(environment.folder)], log)
    pip = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    _step(environment, "install", [*pip, *environment.requirements], log)
    statement = "; ".join(f"import {module}" for module in environment.imports)
    _step(environment, "import", [str(environment.python), "-c", statement], log)
    # Written last: a half-made environment never counts as ready.
    (environment.folder / "complete").write_text(environment.fingerprint)
    return environment.python


def _step(environment: Environment, step: str, command: list[str], log: Path) -> None:
    with log.open("a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise EnvironmentFailed(
            f"could not {step} the environment of {environment.name} (exit {status}); needs a package index that pip "
            f"reaches and about 2 GB of disk; the end of {log}:\n{tail}"
        )


def main(names: list[str]) -> int:
    """Make the named environments (all when none is named) and print their interpreters."""
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        print(f"unknown environment {', '.join(unknown)}: choose from {', '.join(ALL)}", file=sys.stderr)
        return 2
    try:
        for name in names or ALL:
            print(f"{name}\t{make(ALL[name])}", flush=True)
    except EnvironmentFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
