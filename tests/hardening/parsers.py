"""Every parser of fedray on damaged bytes: it says what is wrong in a FedrayError, or takes them; nothing else, and at once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import strategies as st

from fedray.commands.cli import parse
from fedray.config.files import settings_in
from fedray.errors import FedrayError
from fedray.privacy import ledger
from fedray.rundir import evidence
from fedray.rundir.checkpoint import read_checkpoint
from fedray.rundir.directory import RunDirectory
from fedray.rundir.evidence import UntrueError

KEPT = Path(__file__).parent.parent / "formats" / "0.1.0"
LONGEST_S = 5.0
TOML = b"""gateways = 4
lr = 0.5
[privacy]
noise_level = "sample"
target-epsilon = 4.0
[run]
quiet = true
out = "somewhere"
"""
FLAGS = (
    b"--gateways 4 --lr=0.5 --noise-level sample --quiet --out somewhere --partition dirichlet:0.5 --seed 7 --rounds 3"
)


def _file(name: str) -> bytes:
    return (KEPT / name).read_bytes()


def _checkpoint() -> bytes:
    return max((KEPT / "unfinished" / "checkpoint").glob("0*.safetensors")).read_bytes()


@contextlib.contextmanager
def _finished_with(name: str, data: bytes) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        shutil.copytree(KEPT / "finished", place / "run")
        (place / "run" / name).write_bytes(data)
        yield place / "run"
    finally:
        shutil.rmtree(place)


@contextlib.contextmanager
def _written(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        path = Path(place) / name
        path.write_bytes(data)
        yield path


def _settings(data: bytes) -> None:
    with _written(data, "run.toml") as path:
        parse(["--config", str(path)])
        settings_in(path)


def _flags(data: bytes) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            parse(data.decode(errors="surrogateescape").split(" "))
        except SystemExit as stop:  # --help
            if stop.code:
                raise


def _ledger(data: bytes) -> None:
    with _written(data, "ledger.jsonl") as path:
        ledger.read(path)


def _checkpoint_file(data: bytes) -> None:
    with _written(data, "00000002-0000.safetensors") as path:
        evidence.checkpoint_texts(path)
        read_checkpoint(path, key_may_be_gone=False)


def _private(data: bytes) -> None:
    with _written(data, "private.jsonl") as path:
        RunDirectory(path.parent).append_private({"round": 1, "cohort": [1, 2]})
        assert json.loads(path.read_bytes().splitlines()[-1]) or True


PARSERS: dict[str, tuple[bytes, Callable[[bytes], None]]] = {
    "toml": (TOML, _settings),
    "config.json as --config": (_file("finished/config.json"), _settings),
    "flags": (FLAGS, _flags),
    "ledger": (_file("finished/ledger.jsonl"), _ledger),
    "checkpoint": (_checkpoint(), _checkpoint_file),
    "private": (b'{"round": 1, "cohort": [3]}\n{"round": 2, "cohort": []}\n', _private),
}
for _name, _read in {
    "config.json": evidence.read_settings,
    "metrics.jsonl": lambda path: evidence.read_metrics(path, finished=True),
    "manifest.json": evidence.read_manifest,
    "model.safetensors": evidence.read_model,
}.items():

    def _reads(data: bytes, name: str = _name, read: Callable[[Path], object] = _read) -> None:
        with _finished_with(name, data) as run:
            read(run)

    PARSERS[_name] = (_file(f"finished/{_name}"), _reads)

_PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\n",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"null",
    b"true",
]
_PIECES += [b"\\ud800", b"[" * 2000, b"=", b"#", b"'", b" ", b"1e400", b"0x10", b"--", b"\xe2\x80\xa8", b"1" * 5000]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw a few changes of bytes: cut, replaced, doubled, or with odd pieces put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 64, len(data)])))
        piece = draw(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=6), st.just(data[start:end] * 2)))
        data = data[:start] + piece + data[end:]
    return data


def check(name: str, data: bytes) -> None:
    """Parse, and check how that ends."""
    _, parser = PARSERS[name]
    began = time.perf_counter()
    try:
        parser(data)
    except (FedrayError, UntrueError) as error:
        said = str(error)
    else:
        said = "taken"
    assert said.strip()
    assert "\n" not in said.strip() or name == "flags"
    assert time.perf_counter() - began < LONGEST_S
