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
    """A module of an arm that keeps its questions where any revision does, with a clock of its own that lies."""
    asked: list[dict[str, Any]] = []

    def stand(cases: dict[str, list[Any]], seed: int, exact: bool) -> dict[str, Any]:
        asked.append(cases)
        return {key: {"status": "ok"} for key in cases}

    def lies(*arguments: Any) -> float:
        return 1e-9

    turns = {"loaded": dict, "stand": stand, "calibrate": lies, "block": lies}
    return SimpleNamespace(TURNS=turns, _use=lambda key: SimpleNamespace(step=step), asked=asked)


def test_blocks_are_timed_by_the_gate_and_not_by_the_arm() -> None:
    blocks = arm(lambda: time.sleep(0.002))
    clock.take_over(blocks)
    assert blocks.TURNS["stand"](cases={"a": ["unfold", {}]}, seed=1, exact=False) == {"a": {"status": "ok"}}
    assert blocks.asked == [{"a": ["unfold", {}]}]
    count, fastest = blocks.TURNS["calibrate"](keys=["a"], block_s=0.01)["a"]
    assert 1 <= count <= 5
    assert fastest >= 0.002
    assert blocks.TURNS["block"](key="a", count=3, spin_s=0.0) >= 0.002
    assert blocks.TURNS["block"](key="a", count=3, spin_s=0.004) >= 0.006


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = arm(lambda: None)
    clock.take_over(blocks)
    blocks.TURNS["stand"](cases={"a": ["unfold", {}]}, seed=1, exact=False)
    monkeypatch.setattr(clock, "_now", lambda: 1.0)
    with pytest.raises(RuntimeError, match="did not move"):
        blocks.TURNS["calibrate"](keys=["a"], block_s=0.01)


INSTALLED = """
import sys

class Installed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sasa_bench.timing"):
            raise ImportError("a module of the installed sasa-bench, not of the arm")

sys.meta_path.append(Installed())
"""


@pytest.mark.parametrize("place", ["turns.py", "timing/blocks.py"])
def test_the_clock_is_found_in_the_arm_alone(place: str, tmp_path: Path) -> None:
    """An editable installation offers its modules also to a package of that name that lacks them."""
    questions = tmp_path / "sasa_bench" / place
    questions.parent.mkdir(parents=True)
    for folder in {questions.parent, tmp_path / "sasa_bench"}:
        (folder / "__init__.py").touch()
    questions.write_text("TURNS = {'stand': None, 'calibrate': None, 'block': None}\n")
    module = f"sasa_bench.{place.removesuffix('.py').replace('/', '.')}"
    (tmp_path / "sasa_bench" / "worker.py").write_text(
        f"from {module} import TURNS\nprint(TURNS['block'].__module__)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(INSTALLED if place == "turns.py" else "")
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(clock)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "__main__\n"), done.stderr
