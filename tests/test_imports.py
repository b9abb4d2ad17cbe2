"""Modules stand in pipeline order and import only upwards; readers meet the runner only at the results file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sasa_bench

PACKAGE = Path(sasa_bench.__file__).parent
ORDER = (
    "case",
    "networks",
    "flops",
    "suite",
    "intervals",
    "nvml",
    "machine",
    "benchmark_json",
    "record",
    "shard",
    "trace",
    "ops",
    "nvrtc",
    "impls",
    "starter",
    "attention",
    "accuracy",
    "check",
    "measurement",
    "gpu",
    "trial",
    "turns",
    "stages",
    "profile",
    "worker",
    "runner",
    "slurm",
    "exports",
    "table",
    "library",
    "pytest_plugin",
    "paper",
    "plot",
    "chart",
    "findings",
    "formulations",
    "page",
    "report",
    "compare",
    "index",
    "history",
    "profile_page",
    "doctor",
    "arms",
    "pairs",
    "decide",
    "gate",
    "gate_slurm",
    "gate_report",
    "neighbours",
    "aa",
    "cli",
)
READERS = (
    "exports",
    "table",
    "paper",
    "plot",
    "chart",
    "findings",
    "formulations",
    "page",
    "report",
    "compare",
    "index",
    "history",
    "profile_page",
)
WITHOUT_TORCH = (
    "case",
    "flops",
    "suite",
    "intervals",
    "nvml",
    "machine",
    "benchmark_json",
    "record",
    "shard",
    "trace",
    "slurm",
    "pytest_plugin",
    *READERS,
)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sasa_bench"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules - {"__init__", PACKAGE.name} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_above_it(module: str) -> None:
    folder = PACKAGE / module
    paths = folder.glob("*.py") if folder.is_dir() else [PACKAGE / f"{module}.py"]
    for path in paths:
        above = set(ORDER[: ORDER.index(module)]) | {module}
        assert imported_modules(path) <= above, path


def test_implementations_never_import_each_other() -> None:
    for path in (PACKAGE / "impls").glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("sasa_bench.impls."), path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_readers_work_without_torch(module: str) -> None:
    code = f"import sys, sasa_bench.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_names_an_implementation_outside_its_own_file() -> None:
    from sasa_bench.case import CHOICES
    from sasa_bench.flops import FORMULAS
    from sasa_bench.impls import names

    allowed = {
        "conv3x3",
        "onnx",
        "natten",
        *CHOICES["device"],
        *FORMULAS,
    }  # the baseline of the ratio column, libraries of that name, and an op called as its one implementation
    for path in PACKAGE.glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not (strings & set(names())) - allowed, path
