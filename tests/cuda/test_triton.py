"""The Triton kernels: in the interpreter against float64, as an implementation, and their arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS_TRITON = "triton is not installed: pip install 'sasa-bench[triton]'"


def test_values_gradients_and_planted_bugs_in_the_interpreter():
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    folder = HERE / "interpreted"
    places = (HERE, folder, HERE.parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, places), *([inherited] if inherited else [])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    checks = [*command, "-o", "addopts=", str(folder / "triton_checks.py")]
    made = subprocess.run(checks, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
