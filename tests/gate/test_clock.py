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

NAMES = [("REQUESTS", "prepare_cases"), ("TURNS", "stand")]
"""What this revision and older ones call the table of requests and the first of them."""


def arm(step: Any, table: str = "REQUESTS", prepare: str = "prepare_cases") -> SimpleNamespace:
    """A module of an arm that keeps its requests where a revision does, with a clock of its own that lies."""
    asked: list[dict[str, Any]] = []

    def prepare_cases(cases: dict[str, list[Any]], seed: int, exact: bool) -> dict[str, Any]:
        asked.append(cases)
        return {key: {"status": "ok"} for key in cases}

    def lies(*arguments: Any) -> float:
        return 1e-9

    requests = {"loaded": dict, prepare: prepare_cases, "calibrate": lies, "block": lies}
    module = {table: requests, "requests": requests, "_use": lambda key: SimpleNamespace(step=step), "asked": asked}
    return SimpleNamespace(**module)


@pytest.mark.parametrize(("table", "prepare"), NAMES)
def test_blocks_are_timed_by_the_gate_and_not_by_the_arm(table: str, prepare: str) -> None:
    blocks = arm(lambda: time.sleep(0.002), table, prepare)
    clock.take_over(blocks)
    assert blocks.requests["prepare_cases"](cases={"a": ["unfold", {}]}, seed=1, exact=False) == {"a": {"status": "ok"}}
    assert blocks.asked == [{"a": ["unfold", {}]}]
    count, fastest = blocks.requests["calibrate"](keys=["a"], block_s=0.01)["a"]
    assert 1 <= count <= 5
    assert fastest >= 0.002
    assert blocks.requests["block"](key="a", count=3, spin_s=0.0) >= 0.002
    assert blocks.requests["block"](key="a", count=3, spin_s=0.004) >= 0.006


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = arm(lambda: None)
    clock.take_over(blocks)
    blocks.requests["prepare_cases"](cases={"a": ["unfold", {}]}, seed=1, exact=False)
    monkeypatch.setattr(clock, "_now", lambda: 1.0)
    with pytest.raises(RuntimeError, match="did not move"):
        blocks.requests["calibrate"](keys=["a"], block_s=0.01)


INSTALLED = """
import sys

class Installed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sasa_bench.timing"):
            raise ImportError("a module of the installed sasa-bench, not of the arm")

sys.meta_path.append(Installed())
"""


@pytest.mark.parametrize(
    ("place", "table", "prepare"), [("turns.py", *NAMES[1]), *[("timing/blocks.py", *names) for names in NAMES]]
)
def test_the_clock_is_found_in_the_arm_alone(place: str, table: str, prepare: str, tmp_path: Path) -> None:
    """An editable installation offers its modules also to a package of that name that lacks them."""
    requests = tmp_path / "sasa_bench" / place
    requests.parent.mkdir(parents=True)
    for folder in {requests.parent, tmp_path / "sasa_bench"}:
        (folder / "__init__.py").touch()
    requests.write_text(f"{table} = {{{prepare!r}: None, 'calibrate': None, 'block': None}}\n")
    module = f"sasa_bench.{place.removesuffix('.py').replace('/', '.')}"
    (tmp_path / "sasa_bench" / "worker.py").write_text(
        f"from {module} import {table}\nprint({table}['block'].__module__)\n"
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
