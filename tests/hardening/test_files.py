"""A run directory from somebody else: links in it lead nowhere, what is no file or too large ends in one sentence, at once."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedray.commands.cli import main
from fedray.privacy import durable
from fedray.privacy.durable import append_durably, open_regular, read_regular, truncate_durably, write_durably
from fedray.rundir import manifest
from tests.bad_input.cases import check_one_sentence

KEPT = Path(__file__).parent.parent / "formats" / "0.1.0"
COMMANDS = (["verify"], ["report"], ["--quiet", "--resume"])
_PATIENCE_S = 20.0


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return _copy("finished", tmp_path)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return _copy("unfinished", tmp_path)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("do not touch")
    return file


def _copy(name: str, tmp_path: Path) -> Path:
    shutil.copytree(KEPT / name, tmp_path / "run")
    return tmp_path / "run"


def test_report_does_not_follow_a_link_under_its_temporary_name(finished: Path, precious: Path) -> None:
    (finished / ".report.html").symlink_to(precious)
    assert main(["report", str(finished)]) == 0
    assert precious.read_text() == "do not touch"
    assert "<html" in (finished / "report.html").read_text()
    assert not (finished / "report.html").is_symlink()


def test_report_replaces_a_link_under_its_name(finished: Path, precious: Path) -> None:
    (finished / "report.html").symlink_to(precious)
    assert main(["report", str(finished)]) == 0
    assert precious.read_text() == "do not touch"


def test_resume_does_not_follow_links_under_temporary_names(unfinished: Path, precious: Path) -> None:
    for number in range(1, 41):
        hidden = unfinished / "checkpoint" / f".{number:08d}-0000.safetensors"
        hidden.unlink(missing_ok=True)
        hidden.symlink_to(precious)
    for name in ("config.json", "privacy.json", "manifest.json", "model.safetensors"):
        (unfinished / f".{name}").symlink_to(precious)
    assert main(["--quiet", "--resume", str(unfinished)]) == 0
    assert precious.read_text() == "do not touch"


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl", "checkpoint/setup.key", "checkpoint/ledger.json"])
def test_resume_refuses_links_in_place_of_its_files(
    name: str, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (unfinished / name).rename(elsewhere)
    (unfinished / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert main(["--quiet", "--resume", str(unfinished)]) == 2
    assert elsewhere.read_bytes() == before
    check_one_sentence(capsys.readouterr().err, (Path(name).name,))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**50 if os.statvfs(path.parent).f_bavail > 2**39 else 2**43)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("command", COMMANDS, ids=["verify", "report", "resume"])
@pytest.mark.parametrize("spoil", [_fifo, _zeros, _huge, _folder])
@pytest.mark.parametrize("name", [*manifest.FILES, manifest.NAME])
def test_commands_on_what_is_no_file_end_at_once(
    name: str, spoil: Callable[[Path], None], command: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        spoil(finished / name)
    except OSError:
        pytest.skip("this file system holds no file of that size")
    began = time.monotonic()
    code = main([*command, str(finished)])
    assert time.monotonic() - began < _PATIENCE_S
    said = capsys.readouterr()
    assert code in (0, 1, 2, 3)
    if code == 0 and command[-1] == "--resume":  # written anew, from what is whole
        assert stat.S_ISREG((finished / name).lstat().st_mode)
    else:
        assert code != 0 or command == ["report"], "a spoiled file went unseen"
    if code in (1, 2):
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=["verify", "report", "resume"])
@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "-1", "1" * 5000, "[" * 3000 + "]" * 3000, '"\\ud800"'])
@pytest.mark.parametrize("field", ["rounds", "noise_multiplier", "batch_size", "delta", "seed", "nominal_records"])
def test_commands_on_odd_numbers_in_the_config_end_in_a_sentence(
    field: str, number: str, command: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (finished / "config.json").read_text()
    card = json.loads(text)
    old = json.dumps(card.get(field, card["config"].get(field)))
    (finished / "config.json").write_text(text.replace(f'"{field}": {old}', f'"{field}": {number}'))
    assert (finished / "config.json").read_text() != text
    code = main([*command, str(finished)])
    said = capsys.readouterr()
    # A config that is no JSON is written anew from the checkpoint before a run goes on; --quiet --resume has nothing to do then.
    assert code in (2, 3) or command != ["verify"]
    if code == 2:
        check_one_sentence(said.err, ())


@pytest.mark.parametrize("command", COMMANDS[:2], ids=["verify", "report"])
@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "1" * 5000, "NaN", "null"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", "privacy.json"])
def test_commands_on_odd_numbers_elsewhere_end_in_a_sentence(
    name: str, number: str, command: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (finished / name).read_text()
    key = {"metrics.jsonl": '"total": ', "ledger.jsonl": '"steps": ', "privacy.json": '"epsilon": '}[name]
    head, _, tail = lines.partition(key)
    rest = tail[len(tail.split(",")[0].split("}")[0].split("\n")[0]) :]
    (finished / name).write_text(head + key + number + rest)
    code = main([*command, str(finished)])
    assert code in (2, 3) or command == ["report"]
    if code == 2:
        check_one_sentence(capsys.readouterr().err, ())


def test_verify_of_a_long_ledger_is_quick(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (finished / "ledger.jsonl").read_bytes().splitlines(keepends=True)[0]
    (finished / "ledger.jsonl").write_bytes(line * 300_000)
    began = time.monotonic()
    assert main(["verify", str(finished)]) == 3
    assert time.monotonic() - began < _PATIENCE_S / 4


def test_open_regular_refuses_links_unless_they_are_wanted(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", os.O_RDONLY)
    assert read_regular(tmp_path / "link", follow=True) == b"do not touch"


def test_read_regular_has_a_limit(precious: Path) -> None:
    assert read_regular(precious, 12) == b"do not touch"
    with pytest.raises(OSError, match="it has 12 bytes, more than the 11 that are read"):
        read_regular(precious, 11)


@pytest.mark.parametrize("change", [lambda path: append_durably(path, b"x"), lambda path: truncate_durably(path, 0)])
def test_changes_do_not_follow_links(change: Callable[[Path], None], tmp_path: Path, precious: Path) -> None:
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        change(tmp_path / "link")
    assert precious.read_text() == "do not touch"


def test_write_durably_makes_a_new_file_whatever_was_there(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "link").symlink_to(precious)
    write_durably(tmp_path / "link", b"new", 0o600)
    assert (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o600
    assert precious.read_text() == "do not touch"
    assert durable.LARGEST > durable.LARGEST_TEXT
