"""The gate's own error rates: made-up recordings decided again, live runs of two tiny cases, the page of a journal."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from sasa_bench.case import Case
from sasa_bench.gate import aa
from sasa_bench.gate import run as gate
from sasa_bench.gate.aa_page import write_page
from sasa_bench.gate.pairs import Pair, Point
from sasa_bench.gate.verdicts import Rules

KEYS = [f"case {i}" for i in range(5)]


def line(scatter: float, phase: str = "screen", of: str = "a", **more: object) -> dict[str, object]:
    figures = {which: {key: random.gauss(0, scatter) for key in KEYS} for which in ("head", "floor")}
    return {"phase": phase, "of": of, "recorded": True, **figures, "seconds": dict.fromkeys(KEYS, 0.01)} | more


def recorded(scatter: float, of: str = "a", **more: object) -> list[dict[str, object]]:
    rules = Rules()
    screened = [line(scatter, "screen", of, **more) for _ in range(rules.screen_pairs)]
    return screened + [line(scatter, "confirm", of, **more) for _ in range(rules.confirm_pairs)]


def journal(path: Path, *runs: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for run in runs for one in run))
    return path


def test_a_quiet_recorded_run_finds_each_case_that_is_slowed_and_nothing_else(tmp_path: Path) -> None:
    found = aa.recordings(journal(tmp_path / "j.jsonl", recorded(0.005), recorded(0.005, "b")), Rules())
    rates = aa.Rates.of(aa.replay(found, Rules(), ratio=1.10))
    assert (rates.runs, rates.slowed, rates.false, rates.found) == (10, 10, 0, 10)
    assert "slow-downs of 10.0% found: 10 of 10" in rates.lines()[2]
    assert [run.verdict for run in aa.replay(found, Rules())] == ["PASS", "PASS"]


def test_what_lasts_a_run_or_leans_to_head_counts_in_full(tmp_path: Path) -> None:
    leaning = recorded(0.003)
    for one in leaning:
        one["head"][KEYS[0]] += math.log(1.06)  # type: ignore[index]
    found = aa.recordings(journal(tmp_path / "j.jsonl", leaning, recorded(0.003, "b")), Rules())
    alarms = [run.false_alarm for run in aa.replay(found, Rules())]
    assert alarms == [True, False]


def test_pairs_that_do_not_count_and_runs_that_are_too_short_are_not_replayed(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    others = [
        recorded(0.01, "slowed", ratio=1.1),
        recorded(0.01, "live", recorded=False),
        recorded(0.01, "cut off")[:-1],
        [line(9.0, "screen, replaced"), {"run": {}}],
    ]
    with pytest.raises(aa.JournalError, match="--record --budget 30m adds one"):
        aa.recordings(journal(path, *others), Rules())
    (found,) = aa.recordings(journal(path, *others, recorded(0.01, beside="busy", layout="pair")), Rules())
    assert (found.beside, found.layout) == ("busy", "pair")
    assert max(abs(value) for pair in found.screened for value in pair.head.values()) < 1


@pytest.mark.parametrize("text", ["hello\n", '{"head": 3, "floor": 4}\n', "[1]\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(aa.JournalError, match="not a journal"):
        aa.whole_pairs(path)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = journal(tmp_path / "j.jsonl", recorded(0.003))
    lines = len(aa.whole_pairs(path))
    path.write_text(path.read_text() + '{"phase": "screen", "he')
    assert len(aa.whole_pairs(path)) == lines


def test_runs_of_different_rules_are_never_in_one_table(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    runs = [aa.Run("idle", 1.0, (), (), "PASS", 60.0, "2026", "pair", rules) for rules in ("old", "new", "new")]
    path.write_text("".join(json.dumps({"run": asdict(run)}) + "\n" for run in runs))
    page = write_page(path, Rules()).read_text()
    old, new = page[page.index("Rules: old") :].split("Rules: new")
    assert "| 1 " in old
    assert "| 2 " in new


@pytest.mark.slow
def test_a_live_run_is_journalled_with_what_it_slowed_and_shown_on_the_page(tmp_path: Path) -> None:
    tiny = Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1)
    timed = [Point("unfold", tiny), Point("conv3x3", tiny)]
    points = [*timed, *(Point("onnx", tiny.with_(mode="training", kernel_size=k)) for k in (3, 5, 7, 9, 11))]
    path = tmp_path / "j.jsonl"
    rules = Rules(screen_pairs=1, confirm_pairs=1, disturbed=1.0)  # none is replaced, though a neighbour disturbs all
    (run,) = aa.live(points, 1, rules, 600.0, 60.0, tmp_path / "arms", path, ratio=3.0, beside="bursty", layout="pair")
    assert aa.read_runs(path) == [run]
    assert len(run.slowed) == 1
    assert run.slowed[0] in {point.key for point in timed}
    assert run.beside == "bursty"
    assert run.seconds > 0
    page = write_page(path, rules).read_text()
    assert "bursty" in page
    assert "1 pairs to screen" in page
    assert run.layout == "pair"


def test_a_recorded_run_confirms_every_case_and_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [Point(impl, Case(batch=batch)) for impl in ("unfold", "conv3x3") for batch in (1, 2)]

    def pair(arms: object, points: list[Point], *rest: object, **more: object) -> Pair:
        figures = {point.key: random.gauss(0, 0.001) for point in points}
        return Pair(figures, figures, dict.fromkeys(figures, 0.01), {})

    loaded = {"digest": "d", "torch": "2"}
    monkeypatch.setattr(gate, "survey", lambda arm, impls, timeout_s: (loaded, {}))
    row = {"status": "ok", "reason": ""}
    exact = {point.key: row for point in points}
    monkeypatch.setattr(gate, "exact_rows", lambda arms, *rest: {arm.name: dict(exact) for arm in arms})
    monkeypatch.setattr(gate, "measure_pair", pair)
    path = tmp_path / "j.jsonl"
    said: list[str] = []
    assert aa.live(points, 1, Rules(), 60.0, 60.0, tmp_path / "arms", path, record=True, say=said.append) == []
    assert "recorded in" in said[0]
    (found,) = aa.recordings(path, Rules())
    recorded = [len(pair.head) for pair in (*found.screened, *found.fresh)]
    assert recorded == [len(points)] * (Rules.screen_pairs + Rules.confirm_pairs)
    assert "Recorded runs, decided again (1)" in write_page(path, Rules(), replayed=True).read_text()


def test_a_false_alarm_is_a_flag_on_a_case_that_nobody_slowed() -> None:
    run = aa.Run("idle", 1.1, ("a", "b"), ("b", "c"), "REGRESSION")
    assert (run.false_alarm, run.found) == (True, 1)
    assert not aa.Run("idle", 1.1, ("a", "b"), ("b",), "REGRESSION").false_alarm
    assert aa.Rates.of([run, run]).lines()[1].startswith("false alarms: 2 of 2")
