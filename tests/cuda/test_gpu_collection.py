"""`pytest -m gpu` on a machine that has little more than torch, pytest and cuda-core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("selenium", "hypothesis", "pandas", "altair", "sklearn", "statsmodels", "onnx", "onnxscript", "onnxruntime",
          "yaml", "jinja2", "matplotlib", "itables", "xdist", "pytest_timeout", "pytest_benchmark")  # fmt: skip
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_gpu_tests_are_collected_without_anything_else():
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "-c", BLOCK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    assert "test_cuda_gpu.py" in made.stdout
    assert "test_on_a_real_gpu" in made.stdout
    assert "error" not in made.stdout.lower()
