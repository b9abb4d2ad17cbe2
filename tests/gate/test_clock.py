"""The gate's own clock inside the worker of an arm."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sasa_bench.gate import clock


def arm(step: Any) -> SimpleNamespace:
    """A module of an arm with its table of requests and a clock of its own that lies."""
    asked: list[dict[str, Any]] = []

    def prepare_cases(cases: dict[str, list[Any]], seed: int, exact: bool) -> dict[str, Any]:
        asked.append(cases)
        return {key: {"status": "ok"} for key in cases}

    def lies(*arguments: Any) -> float:
        return 1e-9

    requests = {"loaded": dict, "prepare_cases": prepare_cases, "calibrate": lies, "block": lies}
    return SimpleNamespace(REQUESTS=requests, _use=lambda key: SimpleNamespace(step=step), asked=asked)


def test_blocks_are_timed_by_the_gate_and_not_by_the_arm() -> None:
    blocks = arm(lambda: time.sleep(0.002))
    clock.take_over(blocks)
    assert blocks.REQUESTS["prepare_cases"](cases={"a": ["unfold", {}]}, seed=1, exact=False) == {"a": {"status": "ok"}}
    assert blocks.asked == [{"a": ["unfold", {}]}]
    count, fastest = blocks.REQUESTS["calibrate"](keys=["a"], block_s=0.01)["a"]
    assert 1 <= count <= 5
    assert fastest >= 0.002
    assert blocks.REQUESTS["block"](key="a", count=3, spin_s=0.0) >= 0.002
    assert blocks.REQUESTS["block"](key="a", count=3, spin_s=0.004) >= 0.006


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = arm(lambda: None)
    clock.take_over(blocks)
    blocks.REQUESTS["prepare_cases"](cases={"a": ["unfold", {}]}, seed=1, exact=False)
    monkeypatch.setattr(clock, "_now", lambda: 1.0)
    with pytest.raises(RuntimeError, match="did not move"):
        blocks.REQUESTS["calibrate"](keys=["a"], block_s=0.01)


def test_a_file_beside_a_kernel_hides_no_module_of_python(tmp_path: Path) -> None:
    timing, beside = tmp_path / "arm/sasa_bench/timing", tmp_path / "kernels"
    timing.mkdir(parents=True)
    beside.mkdir()
    for folder in (timing, timing.parent):
        (folder / "__init__.py").touch()
    (timing / "blocks.py").write_text("REQUESTS = {'prepare_cases': None, 'calibrate': None, 'block': None}\n")
    (timing.parent / "worker.py").write_text("import helper, profile\nprint(helper.X, profile.__file__)\n")
    (beside / "profile.py").write_text("raise SystemExit('a profile of a kernel, not that of Python')\n")
    (beside / "helper.py").write_text("X = 'found'\n")
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(clock)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "arm"), clock.BESIDE: str(beside)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("found ")
    assert str(beside) not in done.stdout


INSTALLED = """
import sys

class Installed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sasa_bench.timing"):
            raise ImportError("a module of the installed sasa-bench, not of the arm")

sys.meta_path.append(Installed())
"""


@pytest.mark.parametrize("has_it", [True, False])
def test_the_clock_is_found_in_the_arm_alone(has_it: bool, tmp_path: Path) -> None:
    """An editable installation offers its modules also to a package of that name that lacks them."""
    timing = tmp_path / "sasa_bench" / "timing"
    timing.mkdir(parents=True)
    for folder in (timing, timing.parent):
        (folder / "__init__.py").touch()
    if has_it:
        (timing / "blocks.py").write_text("REQUESTS = {'prepare_cases': None, 'calibrate': None, 'block': None}\n")
    (timing.parent / "worker.py").write_text(
        "from sasa_bench.timing.blocks import REQUESTS\nprint(REQUESTS['block'].__module__)\n"
    )
    (tmp_path / "sitecustomize.py").write_text("" if has_it else INSTALLED)
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(clock)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if has_it:
        assert (done.returncode, done.stdout) == (0, "__main__\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert "does not find the paired measurement (timing/blocks.py)" in done.stderr
