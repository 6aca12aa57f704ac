"""`fedray verify`: honest run directories pass, changed ones do not, and the sentence names file and reason."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedray.commands.cli import main
from fedray.privacy import accounting
from fedray.privacy.ledger import Ledger
from fedray.rundir import manifest
from tests.commands.conftest import KINDS

Output = pytest.CaptureFixture[str]


def _seal(run: Path) -> None:
    """Do what a forger would: make card and manifest fit the files."""
    card = json.loads((run / "privacy.json").read_text())
    for name in card["digests"]:
        card["digests"][name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    (run / "privacy.json").write_text(json.dumps(card, indent=2) + "\n")
    (run / manifest.NAME).write_bytes(manifest.as_bytes(manifest.manifest_of(run)))


def _edit(run: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of the run and make everything else fit."""
    value = json.loads((run / name).read_text())
    change(value)
    (run / name).write_text(json.dumps(value, indent=2) + "\n")
    _seal(run)


def _edit_line(run: Path, name: str, index: int, change: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    change(lines[index])
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    _seal(run)


def _rechain(run: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the ledger behind its first line, the opening, and forge chain, checkpoints' memory, digests and manifest."""
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    opening, rest = lines[:1], lines[1:]
    change(rest)
    lines = opening + rest
    head, written = Ledger(None).head, []
    for line in lines:
        written.append(json.dumps({**line, "previous": head}))
        head = hashlib.sha256(written[-1].encode()).hexdigest()
    (run / "ledger.jsonl").write_text("".join(line + "\n" for line in written))
    shutil.rmtree(run / "checkpoint")
    _seal(run)


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_verify_passes_every_honest_run(run: Path, capsys: Output) -> None:
    assert main(["verify", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "OFF" not in printed
    assert "privacy.json is true" in printed


@pytest.mark.parametrize("run", ["sample", "gateway"], indirect=True)
def test_verify_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main(["verify", str(run)])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("run", ["batch"], indirect=True)
def test_verify_says_each_guarantee_in_turn(run: Path, capsys: Output) -> None:
    main(["verify", str(run)])
    printed = capsys.readouterr().out
    for words in ("per gateway (replace)", "per gateway (zero-out)", "per record (add-or-remove)"):
        assert sum(words in line and line.startswith("ok ") for line in printed.splitlines()) == 1


@pytest.mark.parametrize("name", manifest.FILES)
@pytest.mark.parametrize("run", ["sample", "gateway"], indirect=True)
def test_verify_catches_single_byte_changes(run: Path, name: str, capsys: Output) -> None:
    draw = random.Random(f"{run.name} {name}")
    original = (run / name).read_bytes()
    for _ in range(10):  # 5 files × 2 levels × 10: a hundred changes
        place, flip = draw.randrange(len(original)), draw.randrange(1, 256)
        (run / name).write_bytes(original[:place] + bytes([original[place] ^ flip]) + original[place + 1 :])
        assert main(["verify", str(run)]) == 3, f"byte {place} xor {flip}"
        assert f"OFF  {name}: " in capsys.readouterr().out


def test_verify_catches_a_changed_manifest(run: Path, capsys: Output) -> None:
    original = (run / manifest.NAME).read_bytes()
    for place in range(3, len(original), 41):
        (run / manifest.NAME).write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        assert main(["verify", str(run)]) == 3, f"byte {place}"
    assert manifest.NAME in capsys.readouterr().out


def test_verify_catches_white_space_in_the_manifest(run: Path, capsys: Output) -> None:
    (run / manifest.NAME).write_bytes((run / manifest.NAME).read_bytes().rstrip() + b" ")
    assert main(["verify", str(run)]) == 3
    assert "OFF  manifest.json: was changed after it was written" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*manifest.FILES, manifest.NAME])
def test_verify_names_a_missing_file(run: Path, name: str, capsys: Output) -> None:
    (run / name).unlink()
    assert main(["verify", str(run)]) == 3
    assert f"OFF  {name}: is missing" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["sample", "batch", "gateway"], indirect=True)
def test_verify_catches_a_smaller_epsilon_with_forged_digests(run: Path, capsys: Output) -> None:
    _edit(
        run,
        "privacy.json",
        lambda card: card["guarantees"][-1].update(epsilon=card["guarantees"][-1]["epsilon"] * 0.999),
    )
    assert main(["verify", str(run)]) == 3
    assert "the ledger says" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["batch", "gateway"], indirect=True)
def test_verify_catches_a_smaller_mu_with_forged_digests(run: Path, capsys: Output) -> None:
    _edit(run, "privacy.json", lambda card: card["guarantees"][0].update(mu=card["guarantees"][0]["mu"] * 0.999))
    assert main(["verify", str(run)]) == 3
    assert "mu is" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["gateway"], indirect=True)
def test_verify_passes_a_card_of_a_version_that_did_not_name_mu(run: Path) -> None:
    _edit(run, "privacy.json", lambda card: [guarantee.pop("mu") for guarantee in card["guarantees"]])
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.update(steps=card["steps"] - 1), "steps is 5"),
        (lambda card: card.update(rounds=2), "rounds is 2"),
        (lambda card: card.update(delta=1e-6), "delta is 1e-06"),
        (lambda card: card.update(noise_multiplier=2.0), "noise_multiplier is 2.0"),
        (lambda card: card["guarantees"].clear(), "must list 1 guarantees"),
        (lambda card: card["guarantees"][0].update(adjacency="zero-out"), "adjacency is 'zero-out'"),
        (lambda card: card["guarantees"][0].update(observer="nobody"), "observer is 'nobody'"),
        (lambda card: card["not_covered"].pop(0), "not_covered leaves out"),
        (lambda card: card["rng"].update(simulation_only=True), "simulation_only must be False"),
        (lambda card: card.pop("rng"), "simulation_only must be False"),
        (lambda card: card.update(guarantees="all"), "must list 1 guarantees"),
    ],
)
def test_verify_catches_a_false_card_with_forged_digests(
    run: Path, change: Callable[[dict[str, Any]], object], words: str, capsys: Output
) -> None:
    _edit(run, "privacy.json", change)
    assert main(["verify", str(run)]) == 3
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card["config"].update(noise_multiplier=2.0), "claims epsilon"),
        (lambda card: card["config"].update(noise_multiplier=0), "holds a setting that no run has"),
        (lambda card: card["config"].update(noise_level="batch"), "was charged at level 'sample'"),
        (lambda card: card["config"].update(local_steps=1), "charges 2 steps"),
        (lambda card: card["config"].update(max_epsilon=0.5), "past --max-epsilon 0.5"),
        (lambda card: card["config"].update(gateways=3), "no ranges of the 3 gateways"),
        (lambda card: card["config"].update(colour="red"), "'colour' is missing, or is no setting"),
        (lambda card: card["config"].pop("delta"), "'delta' is missing"),
        (lambda card: card.update(nominal_records=512), "claims epsilon"),
        (lambda card: card.update(nominal_records=0), "nominal_records is 0"),
        (lambda card: card.update(nominal_records=8), "batch_size is 64 but nominal_records is 8"),
        (lambda card: card.pop("config"), "has no config"),
    ],
)
def test_verify_catches_another_config_with_forged_digests(
    run: Path, change: Callable[[dict[str, Any]], object], words: str, capsys: Output
) -> None:
    _edit(run, "config.json", change)
    assert main(["verify", str(run)]) == 3
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(round=9), "rounds must be consecutive"),
        (lambda record: record["epsilon"].update(record=0.1), "round 2 claims epsilon"),
        (lambda record: record.update(epsilon={}), "round 2 claims epsilon"),
        (lambda record: record.update(samples_per_s=record["samples_per_s"] * 2), "samples_per_s"),
        (lambda record: record.update(accuracy=1.5), "accuracy is 1.5"),
        (lambda record: record.update(loss="low"), "loss is 'low'"),
        (lambda record: record["seconds"].update(train=1e6), "do not fit their total"),
        (lambda record: record["seconds"].update(train="long"), "seconds must be numbers"),
        (lambda record: record.pop("samples_per_s"), "no samples_per_s"),
    ],
)
def test_verify_catches_false_metrics_with_forged_digests(
    run: Path, change: Callable[[dict[str, Any]], object], words: str, capsys: Output
) -> None:
    _edit_line(run, "metrics.jsonl", 1, change)
    assert main(["verify", str(run)]) == 3
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines.pop(), "round 3 is recorded but the ledger never charged it"),
        (lambda lines: lines.pop(0), "round 1 is recorded but the ledger never charged it"),
        (lambda lines: lines[1].update(steps=1), "line 3 charges 1 steps"),
        (lambda lines: lines[1].update(gateways=[[0, 4]]), "line 3 charges [[0, 4]]"),
        (lambda lines: lines[1].update(gateways=7), "line 3 charges 7"),
        (lambda lines: lines[1].update(gateways=[[0, 1, 2]]), "line 3 charges"),
        (lambda lines: lines[1].update(steps=None), "whole numbers"),
        (lambda lines: lines[1].update(level="none"), "was charged at level 'none'"),
        (lambda lines: lines[1].update(event="gift"), "does not know: 'gift'"),
        (lambda lines: lines.append({**lines[-1], "round": 4}), "the ledger says"),
    ],
)
def test_verify_catches_a_false_ledger_with_forged_chain(
    run: Path, change: Callable[[list[dict[str, Any]]], object], words: str, capsys: Output
) -> None:
    _rechain(run, change)
    assert main(["verify", str(run)]) == 3
    assert words in capsys.readouterr().out


def test_verify_names_a_line_that_breaks_the_chain(run: Path, capsys: Output) -> None:
    _edit_line(run, "ledger.jsonl", 1, lambda line: line.update(inputs="0" * 64))
    assert main(["verify", str(run)]) == 3
    assert "ledger.jsonl: line 3 does not follow from the line before it" in capsys.readouterr().out


def test_verify_catches_a_cut_ledger_by_its_checkpoints(run: Path, capsys: Output) -> None:
    for name in ("ledger.jsonl", "metrics.jsonl"):
        (run / name).write_text("".join((run / name).read_text().splitlines(keepends=True)[:2]))
    _seal(run)
    assert main(["verify", str(run)]) == 3
    assert "ledger.jsonl: is not what checkpoint/" in capsys.readouterr().out


def test_verify_takes_a_repeated_round_as_the_ledger_charges_it(run: Path, capsys: Output) -> None:
    def repeat(lines: list[dict[str, Any]]) -> None:
        lines.insert(2, {**lines[1], "attempt": 1, "inputs": "1" * 64})

    _rechain(run, repeat)
    settings = json.loads((run / "privacy.json").read_text())
    spec = _spec(run)
    after = [accounting.Charges(steps=2 * rounds, rounds=rounds) for rounds in (1, 3, 4)]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record, charges in zip(records, after, strict=True):
        record["epsilon"] = accounting.epsilon_by_unit(spec, charges)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = [guarantee.as_dict() for guarantee in accounting.guarantees(spec, after[-1])]
    (run / "privacy.json").write_text(json.dumps({**settings, "steps": 8, "guarantees": found}))
    _seal(run)
    assert main(["verify", str(run)]) == 0
    assert "8 local steps in 4 rounds" in capsys.readouterr().out


def _spec(run: Path) -> Any:
    from fedray.rundir.evidence import read_settings

    return read_settings(run).spec


def test_verify_charges_the_most_charged_gateway(run: Path, capsys: Output) -> None:
    def spread(lines: list[dict[str, Any]]) -> None:
        for line, gateways in zip(lines, ([[0, 1]], [[1, 1], [3, 3]], [[2, 3]]), strict=True):
            line["gateways"] = gateways

    _rechain(run, spread)
    main(["verify", str(run)])
    assert "the most charged gateway started 4 local steps in 2 rounds" in capsys.readouterr().out


def test_verify_takes_the_digest_that_the_run_printed(outdir: Path, capsys: Output) -> None:
    main(["--gateways", "2", "--rounds", "1", "--samples-per-gateway", "64", "--pool", "inline", "--out", str(outdir)])
    printed = capsys.readouterr().out.rstrip().splitlines()[-1].removeprefix("run digest: ")
    assert main(["verify", str(outdir), "--digest", printed.upper()]) == 0
    _edit(outdir, "privacy.json", lambda card: card.update(note="nothing else is wrong"))
    assert main(["verify", str(outdir)]) == 0  # a forger who recomputes everything is not found without it
    assert main(["verify", str(outdir), "--digest", printed]) == 3
    assert "not the one that was given" in capsys.readouterr().out


def test_verify_says_that_a_run_is_unfinished(run: Path, capsys: Output) -> None:
    _unfinish(run)
    assert main(["verify", str(run)]) == 2
    seen = capsys.readouterr()
    assert "is an unfinished run: what is there is in order" in seen.err
    assert "ok   ledger.jsonl: 3 charges" in seen.out


def test_verify_drops_the_torn_line_of_an_unfinished_run(run: Path, capsys: Output) -> None:
    _unfinish(run)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"round": 4, "att')
    assert main(["verify", str(run)]) == 2
    assert "cut short by a crash: its round never started" in capsys.readouterr().out


def test_verify_finds_damage_in_an_unfinished_run(run: Path, capsys: Output) -> None:
    _unfinish(run)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[1:]))
    assert main(["verify", str(run)]) == 3
    assert "ledger.jsonl: line 1 does not follow" in capsys.readouterr().out


def _unfinish(run: Path) -> None:
    for name in ("model.safetensors", "privacy.json", manifest.NAME):
        (run / name).unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "rundir"),
        (["/nowhere"], "is no run directory"),
        (["/tmp"], "is no run directory"),
        (["x", "--digest", "12"], "64 hexadecimal digits"),
        (["x", "--depth", "1"], "--depth"),
    ],
)
def test_verify_refuses_bad_arguments(arguments: list[str], words: str, capsys: Output) -> None:
    assert main(["verify", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
