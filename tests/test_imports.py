"""Which module may import which: the direction of dependencies of design.md section 5."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import fedray

ROOT = Path(fedray.__file__).parent
LAYERS = (  # an import never points to an earlier line
    ("__main__",),
    ("commands",),
    ("cli",),
    ("frontier", "audit"),
    ("dry_run",),
    ("orchestrator", "loading"),
    ("publisher",),
    ("budget", "session", "summary"),
    ("plan",),
    ("html_report",),
    ("html_audit", "charts"),
    ("html_elements",),
    ("verification",),
    ("history",),
    ("evidence",),
    ("report", "progress", "checkpoint", "tracking"),
    ("pool.ray_pool", "pool.inline_pool", "pool.ray_tasks"),
    ("pool.machines",),
    ("pool.pool", "pool.placement", "pool.connection"),
    ("pool.worker",),
    ("pool.hardware",),
    ("training.engines",),
    ("training.reference", "training.stacked", "training.tracing", "training.program_check", "training.fusing"),
    ("training.alone",),
    ("training.held_state",),
    ("training.record_gradients", "training.rewriting"),
    ("training.stacking", "training.row_optimizers", "training.draws", "training.recurrence", "training.record_draws"),
    ("training.chain", "training.batching", "training.parameter_uses"),
    ("training.layers", "training.trainer", "training.gateway_rules"),
    ("training.batching_rules", "training.record_parts"),
    ("training.program",),
    ("privacy",),
    ("evaluation", "aggregation"),
    ("data.source",),
    ("data.shards", "data.digits", "data.toy", "data.partition"),
    ("models", "gateway"),
    ("user_code", "data.inputs"),
    ("params", "config", "streams", "manifest", "pictures"),
    ("errors", "constants"),
)
PACKAGES = {"audit", "commands", "data", "pool", "privacy", "training"}  # whose own __init__ holds a docstring


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


def _layer(module: str) -> int | None:
    for index, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer):
            return index
    return None


def test_imports_never_point_up() -> None:
    for module, path in _modules().items():
        here = _layer(module)
        if here is None:
            assert module in PACKAGES, f"fedray.{module} has no layer"
            continue
        for imported in _own_imports(path):
            there = _layer(imported)
            assert there is None or there >= here, f"fedray.{module} imports fedray.{imported}, which lies above it"


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
            assert foreign <= {"streams", "errors", "params", "constants"}, f"fedray.{module} imports {foreign}"


def test_imports_training_does_not_know_pools() -> None:
    for module, path in _modules().items():
        if module.startswith("training"):
            assert not any(name.startswith(("pool", "orchestrator", "plan")) for name in _own_imports(path))


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
        "params",
        "streams",
        "data.source",
        "models",
        "pool.worker",
        "pool.placement",
        "report",
        "plan",
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
