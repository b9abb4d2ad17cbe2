"""Without torch results are still read; what a command lacks it names in one sentence, with what installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from factory import results_file, sweep

from sasa_bench.results.environment import absent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results_file(tmp_path / "results" / "r.jsonl", sweep())
    return tmp_path


def without(package: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """sasa-bench in an environment that lacks the package, its worker processes too."""
    blocked = folder / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        f"            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "sasa_bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=280)


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "results/r.jsonl", "--format", "csv", "--out", "made/t.csv"),
        ("report", "results/r.jsonl", "--out", "made/r.html"),
        ("history", "results", "--out", "made/h.html"),
        ("merge", "results/r.jsonl", "--out", "made/m.jsonl"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_results_are_read_without_torch(arguments: tuple[str, ...], folder: Path) -> None:
    ran = without("torch", folder, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert (folder / arguments[-1]).stat().st_size > 0


@pytest.mark.parametrize("arguments", [("run", "smoke"), ("list", "smoke"), ("doctor",), ("accuracy",)])
def test_what_needs_torch_says_so(arguments: tuple[str, ...], folder: Path) -> None:
    ran = without("torch", folder, *arguments)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("sasa-bench: torch is not installed, which this needs: pip install torch")


def test_parquet_needs_its_extra_and_the_report_does_without(folder: Path) -> None:
    ran = without("pyarrow", folder, "table", "results/r.jsonl", "--format", "parquet", "--out", "t.parquet")
    assert (ran.returncode, ran.stderr) == (
        1,
        "sasa-bench: parquet needs pyarrow: pip install 'sasa-bench[parquet]'\n",
    )
    ran = without("pyarrow", folder, "report", "results/r.jsonl", "--out", "r.html")
    assert ran.returncode == 0, ran.stderr
    assert "text/csv;base64" in (folder / "r.html").read_text()
    assert "parquet;base64" not in (folder / "r.html").read_text()


def test_a_missing_package_is_named_with_the_extra_that_has_it() -> None:
    assert absent(ModuleNotFoundError("x", name="sklearn.datasets")) == (
        "sklearn is not installed, which this needs: pip install 'sasa-bench[accuracy]'"
    )
    assert absent(ModuleNotFoundError("x", name="rich")) == "rich is not installed, which this needs: pip install rich"
    assert absent(ModuleNotFoundError("x", name="sasa_bench.typo")) is None
    assert absent(ImportError("cannot import name", name="rich")) is None
