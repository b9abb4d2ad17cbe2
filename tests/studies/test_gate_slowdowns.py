"""The slow-downs that the gate is shown still apply to the code, and still compute what is right."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gate_slowdowns
import pytest
from gate_slowdowns import SLOW_DOWNS, Outcome, SlowDown

import sasa_bench
from sasa_bench.case import Case
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.pairs import Point, exact_rows

TINY = Case(channels=16, kernel_size=3, resolution=6, batch=1, threads=1, heads=2)


@pytest.mark.parametrize("slow_down", SLOW_DOWNS, ids=lambda s: s.impl)
def test_edited_code_computes_the_same(tmp_path: Path, slow_down: SlowDown) -> None:
    shutil.copytree(Path(sasa_bench.__file__).parent, tmp_path / "sasa_bench")
    slow_down.apply(tmp_path / "sasa_bench")
    point = Point(slow_down.impl, TINY.with_(mode="training"))
    rows = exact_rows(Arm("head", tmp_path, "edited", sys.executable), [point], 120.0)
    assert rows[point.key]["status"] == "ok", rows[point.key]["reason"]


def test_an_edit_that_no_longer_applies_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="write the slow-down"):
        SlowDown("words", "unfold", "a.py", "y = 1", "y = 2").apply(tmp_path)


def test_the_table_tells_time_from_exact_figures() -> None:
    one = Outcome("an extra copy", "REGRESSION", 12, 3, 9, ["fused x"], 1.08, 240.0, "2026-01-01")
    shown = gate_slowdowns.table([one])
    assert [cell.strip() for cell in shown.splitlines()[2].split("|")[1:-1]] == [
        *("an extra copy", "REGRESSION", "12", "3", "9", "1", "8%", "4.0"),
    ]
