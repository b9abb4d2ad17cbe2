"""The rooms of the package and the arrows between them, as pyproject.toml states them."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sasa_bench

PACKAGE = Path(sasa_bench.__file__).parent
ROOT = Path(__file__).parents[1]

READERS = (
    "case",
    "suite",
    "results.record",
    "results.machine",
    "results.pytest_benchmark",
    "results.statistics",
    "networks",
    *("ops." + file.stem for file in (PACKAGE / "ops").glob("*.py") if file.stem not in ("__init__", "tensors")),
    "cli",
    "sweep.cluster",
    "sweep.shard",
    "sweep.slurm",
    "timing.nvml",
    "timing.probe",
    "pytest_plugin",
    "paper.tables",
    "report.compare",
    "report.history",
    "report.index",
    "report.report",
    "report.services",
    "report.table",
    "profiling.page",
    "profiling.trace",
)

VIOLATIONS = {
    "Rooms stand in pipeline order": ("case.py", "from sasa_bench.suite import Suite"),
    "Readers need no torch": ("report/table.py", "import torch"),
    "The results file needs no pandas": ("results/record.py", "import pandas"),
    "Implementations never import each other": ("impls/unfold.py", "from sasa_bench.impls import naive"),
    "No import goes in a circle": ("gate/git.py", "from sasa_bench.gate import arms"),
}
"""Contract -> a file and a line in it that breaks the contract."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and of the contracts."""
    shutil.copytree(PACKAGE, tmp_path / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept(copy: Path) -> None:
    found = lint_imports(copy)
    assert found.returncode == 0, found.stdout
    assert "0 broken" in found.stdout


def test_a_planted_violation_breaks_its_contract(copy: Path) -> None:
    for file, line in VIOLATIONS.values():
        path = copy / "sasa_bench" / file
        path.write_text(path.read_text() + f"\n{line}\n")
    found = lint_imports(copy)
    assert found.returncode == 1
    broken = [line for line in found.stdout.splitlines() if " BROKEN" in line]
    assert len(broken) == len(VIOLATIONS), found.stdout
    details = found.stdout[found.stdout.index("Broken contracts") :]
    for contract, (file, _) in VIOLATIONS.items():
        assert any(line.startswith(contract) for line in broken), contract
        about = details[details.index(contract) :].split("\n\n\n")[0]
        assert f".{Path(file).stem}" in about, about


WITHOUT_TORCH = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sasa_bench"]:
        del sys.modules[name]
    try:
        importlib.import_module(f"sasa_bench.{module}")
    except ImportError as error:
        print(f"{module}: {error}")
"""
"""Imports each module into an interpreter without the others, and without torch."""


def test_readers_work_without_torch() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *READERS], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    caught = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "timing.sampling"], capture_output=True, text=True)
    assert caught.stdout == "timing.sampling: torch is imported\n"


LAYER_AND_CHECKS = """
import sys
import sasa_bench.nn
from sasa_bench.timing.blocks import _exact
from sasa_bench.timing.check import poisoned_memory

with poisoned_memory():
    assert _exact(lambda: None)
sys.exit({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules) or None)
"""


def test_layers_and_checks_do_not_import_the_compiler_of_torch() -> None:
    """It takes two seconds, which every worker and everyone who imports a layer would wait."""
    found = subprocess.run([sys.executable, "-c", LAYER_AND_CHECKS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_no_module_names_an_implementation_outside_its_own_file() -> None:
    from sasa_bench import ops
    from sasa_bench.case import CHOICES
    from sasa_bench.impls import names

    allowed = {
        "conv3x3",
        "onnx",
        "natten",
        *CHOICES["device"],
        *ops.BUILTIN,
    }  # the baseline of the ratio column, libraries of that name, and an op called as its one implementation
    forbidden = set(names()) - allowed
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "impls" in path.parents:
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & forbidden, path
