"""GPU tests and `make gpu-check` run on a machine that has torch, triton, pytest, cuda-core and what these bring."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import gpu_check
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BROUGHT = "cuda-bindings"
"""By a CUDA build of torch, of which the tests need not have one."""
# Every process imports it first, those that a process starts included.
BLOCK = """
import importlib.util
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {absent!r} else find(name, package)
"""


def name_of(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def brought_by(packages: Sequence[str]) -> set[str]:
    """These packages and all that they require, without extras."""
    found: set[str] = set()
    left = list(packages)
    while left:
        package = name_of(left.pop())
        if package in found:
            continue
        found.add(package)
        try:
            wanted = map(Requirement, metadata.requires(package) or ())
        except metadata.PackageNotFoundError:
            continue
        left += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def run_with(packages: Sequence[str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where modules of all other packages are missing."""
    there = brought_by([*packages, BROUGHT])
    modules = metadata.packages_distributions().items()
    absent = {module for module, of in modules if not there & {name_of(package) for package in of}}
    assert {"pandas", "scipy", "click", "rich", "psutil"} <= absent
    folder.mkdir()
    own = {path.name for path in ROOT.iterdir()}  # some packages install a module `tests`
    (folder / "sitecustomize.py").write_text(BLOCK.format(absent=absent - own))
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests" / "cuda")))
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )


def test_the_gpu_tests_are_collected_with_torch_pytest_and_cuda_core_alone(tmp_path):
    command = ("-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    made = run_with(["torch", "pytest", "cuda-core"], tmp_path / "bare", *command)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    assert "test_cuda_gpu.py" in made.stdout
    assert "test_on_a_real_gpu" in made.stdout
    assert "error" not in made.stdout.lower()


SUITE = """
title = "Two convolutions and an attention"
impls = ["conv3x3", "conv3x3_channels_last", "unfold"]

[axes]
resolution = [7, 8]

[fixed]
channels = 16
heads = 2
"""
NEEDS = ("torch", "triton", "pytest", "cuda-core")


def test_gpu_check_measures_with_triton_besides(tmp_path):
    suite, out = tmp_path / "few.toml", tmp_path / "times.jsonl"
    suite.write_text(SUITE)
    step = (str(ROOT / "tests" / "cuda" / "gpu_check.py"), "--step", "times", str(out), str(suite), "cpu")
    made = run_with(NEEDS, tmp_path / "bare", *step)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    lines = gpu_check.keep_table(tmp_path, out).splitlines()[1:]
    assert len(lines) == 2
    for line in lines:
        ratios = [float(ratio) for ratio in re.findall(r"(?:conv3x3|conv3x3_channels_last) [\d.]+ \(([\d.]+)\)", line)]
        assert min(ratios) == 1, line
        assert re.search(r"unfold [\d.]+ \([\d.]+\)", line)


COMPILE = """
import gpu_check
from sasa_bench.impls import _nvrtc
wanted = gpu_check.kernels_wanted()
print(len(wanted), len(gpu_check.triton_problems()), _nvrtc.prebuild(wanted[:1], "sm_90", 1))
"""


def test_gpu_check_knows_what_to_compile_there(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    made = run_with(NEEDS, tmp_path / "bare", "-c", COMPILE)
    assert made.returncode == 0, made.stderr[-4000:]
    assert int(made.stdout.split()[0]) > 300


def test_an_implementation_without_any_time_fails_the_times(tmp_path):
    suite = tmp_path / "few.toml"
    suite.write_text(SUITE.replace('"unfold"', '"unfold", "triton"'))
    step = (str(ROOT / "tests" / "cuda" / "gpu_check.py"), "--step", "times", str(tmp_path / "t.jsonl"), str(suite))
    made = run_with(NEEDS, tmp_path / "bare", *step, "cpu")
    assert made.returncode == 1
    assert "triton has no time in 2 cases" in made.stderr
