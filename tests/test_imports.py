"""Which part may import which, how many there are, and what an import may load."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedray

ROOT = Path(fedray.__file__).parent
PARTS = (  # a part knows those below it
    "commands",
    "audit",
    "orchestrator",
    "reports",
    "rundir",
    "pool",
    "training",
    "algorithms",
    "models",
    "data",
    "tasks",
    "config",
    "privacy",
    "errors",
)


@functools.cache
def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
        if path != ROOT / "__init__.py"
    }


@functools.cache
def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own_imports(path: Path) -> set[str]:
    names = {name.removeprefix("fedray.") for name in _imports(path) if name.startswith("fedray.")}
    return {name for name in names if name in _modules()}


def _part(module: str) -> str:
    return module.partition(".")[0]


def test_the_ground_floor_has_at_most_fourteen_names() -> None:
    names = {path.stem for path in ROOT.iterdir() if not path.name.startswith(("_", ".", "py.typed"))}
    assert names == set(PARTS)
    assert len(names) <= 14


def test_imports_of_other_parts_point_down() -> None:
    for module, path in _modules().items():
        if module == "__main__":
            continue
        for imported in _own_imports(path):
            if _part(imported) != _part(module):
                below = PARTS[PARTS.index(_part(module)) + 1 :]
                assert _part(imported) in below, f"fedray.{module} imports fedray.{imported}, whose part lies above"


def test_the_picture_of_the_parts_is_the_codes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT.parent / "docs" / "architecture.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_a_reader_holds() -> None:
    files = [path for part in ("fedray", "tests", "benchmarks", "docs") for path in (ROOT.parent / part).rglob("*.py")]
    long = {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 350}
    assert not long


def test_the_round_loop_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / "orchestrator" / "rounds.py").read_text())
    (loop,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_rounds"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 25


def test_no_part_asks_which_noise_level_it_is() -> None:
    """A level is what `privacy/levels.py` says of it: where it clips, who adds noise, what it claims."""
    asks = re.compile(r"""(noise_level|dataset) (==|!=|in) ["'(\[{]""")
    parts = [path for path in ROOT.rglob("*.py") if path.parent.name != "commands"]  # which read flags
    found = {str(path) for path in parts if asks.search(path.read_text())}
    assert not found


def test_imports_have_no_cycle() -> None:
    graph = {module: _own_imports(path) - {module} for module, path in _modules().items()}
    while graph:
        free = [module for module, needs in graph.items() if not needs & set(graph)]
        assert free, f"a cycle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_imports_only_one_module_imports_ray() -> None:
    importers = {
        module
        for module, path in _modules().items()
        if any(name == "ray" or name.startswith("ray.") for name in _imports(path))
    }
    assert importers == {"pool.connection"}


def test_imports_privacy_knows_neither_gateways_nor_pools_nor_data() -> None:
    for module, path in _modules().items():
        if module.startswith("privacy"):
            foreign = {name for name in _own_imports(path) if not name.startswith("privacy")}
            assert foreign <= {"errors"}, f"fedray.{module} imports {foreign}"


def test_imports_training_does_not_know_pools() -> None:
    for module, path in _modules().items():
        if module.startswith("training"):
            assert not any(name.startswith(("pool", "orchestrator")) for name in _own_imports(path))


LIGHT = (
    *(
        "privacy.composition",
        "privacy.accounting",
        "privacy.ledger",
        "privacy.levels",
        "privacy.mechanism",
        "privacy.noise",
        "privacy.sampling",
    ),
    *(
        "training.trainer",
        "models.layout",
        "privacy.streams",
        "data.source",
        "models.checks",
        "pool.worker",
        "pool.placement",
        "rundir.cards",
        "orchestrator.plan",
    ),
)


def test_import_does_without_ray_opacus_and_dp_accounting() -> None:
    loaded = _loaded_by(*(f"fedray.{module}" for module in LIGHT))
    assert not loaded & {"ray", "opacus", "dp_accounting"}


def test_import_training_does_without_ray() -> None:
    assert "ray" not in _loaded_by("fedray.training.reference")


def test_what_trains_does_without_sympy() -> None:
    """Programs are traced in the driver; an actor would spend a second on the import."""
    assert not {"sympy", "opacus", "ray"} & _loaded_by("fedray.training.engines")


def test_import_fedray_does_without_torch() -> None:
    assert not _loaded_by("fedray") & {"torch", "ray", "numpy"}


def _loaded_by(*modules: str, after: str = "") -> set[str]:
    show = "print(*{name.partition('.')[0] for name in sys.modules})"
    code = f"import sys, {', '.join(modules)}\n{after}\n{show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_all_names_the_public_api() -> None:
    assert set(fedray.__all__) == {"FedrayError", "Gateway", "Orchestrator", "Run", "RunConfig", "load_model"}


@pytest.mark.parametrize("name", fedray.__all__)
def test_all_names_exist(name: str) -> None:
    assert getattr(fedray, name).__name__ == name


def test_fedray_has_no_other_names() -> None:
    assert set(dir(fedray)) == {*fedray.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedray.nonsense
