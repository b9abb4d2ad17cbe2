"""The slow-downs that the gate is shown still apply to the code, and still compute what is right."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gate_slowdowns
import pytest
from gate_mutants import ROUNDS, SlowDown
from gate_slowdowns import Apart, Found

import sasa_bench
from sasa_bench import impls as registry
from sasa_bench.case import Case
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.pairs import Point, exact_rows

PACKAGE = Path(sasa_bench.__file__).parent
TINY = Case(channels=16, kernel_size=3, resolution=10, batch=1, threads=1, heads=2)
"""Larger than the maps that `blocked` does in one block."""


def test_there_are_a_dozen_mutants_and_each_changes_a_file_that_still_parses(tmp_path: Path) -> None:
    mutants = [mutant for mutants in ROUNDS for mutant in mutants]
    assert len(mutants) >= 12
    assert len({(mutant.words, mutant.impl) for mutant in mutants}) == len(mutants)
    for number, mutant in enumerate(mutants):
        copy = tmp_path / str(number) / mutant.file
        copy.parent.mkdir(parents=True)
        shutil.copy(PACKAGE / mutant.file, copy)
        mutant.apply(tmp_path / str(number))
        assert copy.read_text() != (PACKAGE / mutant.file).read_text()
        compile(copy.read_text(), mutant.file, "exec")
    for mutants in ROUNDS:
        assert len({mutant.impl for mutant in mutants}) == len(mutants)


@pytest.mark.parametrize(
    "mutants", [ROUNDS[0], *(pytest.param(mutants, marks=pytest.mark.exhaustive) for mutants in ROUNDS[1:])]
)
def test_edited_code_computes_the_same(tmp_path: Path, mutants: tuple[SlowDown, ...]) -> None:
    shutil.copytree(PACKAGE, tmp_path / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__"))
    interpreted = [mutant for mutant in mutants if mutant.impl != "fused"]  # its builds take a minute each
    for mutant in interpreted:
        mutant.apply(tmp_path / "sasa_bench")
    cases = [TINY, TINY.with_(mode="training")]
    points = [
        Point(mutant.impl, case)
        for mutant in interpreted
        for case in cases
        if registry.get(mutant.impl).supports(case) is None
    ]
    rows = exact_rows([Arm("head", tmp_path, "edited", sys.executable)], points, 120.0)["head"]
    assert {key: row["reason"] for key, row in rows.items() if row["status"] != "ok"} == {}


def test_an_edit_that_no_longer_applies_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="write the slow-down"):
        SlowDown("words", "unfold", "a.py", "y = 1", "y = 2").apply(tmp_path)


def test_the_score_counts_what_is_slower_apart_from_the_gate_and_names_what_was_missed() -> None:
    about = {"machine": "m", "threads": 1, "beside": "idle", "at": "2026"}
    ratios = {"copy": 1.2, "loop": 1.05, "nothing": 1.01}
    measured = [Apart(words, "unfold", {"case": ratio}, "", **about) for words, ratio in ratios.items()]
    flagged = {"copy": ([], ["case"]), "loop": ([], []), "nothing": (["case"], [])}
    found = [
        Found(words, "unfold", "REGRESSION", 4, *cases, [], 240.0, layout="pair", **about)
        for words, cases in flagged.items()
    ]
    shown = gate_slowdowns.table(measured, found)
    assert "Found: 1 of 2 mutants that are 3% slower or more." in shown
    assert "Not found: `unfold`, loop." in shown
    assert len(shown.splitlines()) == 4 + 2 + 3


def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    about = {"machine": "m", "threads": 1, "beside": "idle", "at": "2026"}

    def apart(mutants: list[SlowDown], *rest: object) -> list[Apart]:
        calls.append(("apart", len(mutants)))
        return [Apart(one.words, one.impl, {"case": 1.1}, "", **about) for one in mutants]

    def gated(mutants: list[SlowDown], *rest: object) -> list[Found]:
        calls.append(("gate", len(mutants)))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [Found(one.words, one.impl, "PASS", 4, [], ["case"], [], 9.0, layout="pair", **about) for one in mutants]

    monkeypatch.setattr(gate_slowdowns, "apart", apart)
    monkeypatch.setattr(gate_slowdowns, "gated", gated)
    monkeypatch.setattr(sys, "argv", ["gate_slowdowns.py", "--out", str(tmp_path / "s")])
    with pytest.raises(KeyboardInterrupt):
        gate_slowdowns.main()
    assert gate_slowdowns.main() == 0
    count = sum(map(len, ROUNDS))
    assert [sum(n for kind, n in calls if kind == which) for which in ("apart", "gate")] == [
        count,
        count + len(ROUNDS[1]),
    ]
    assert f"Found: {count} of {count} mutants" in (tmp_path / "s.md").read_text()
