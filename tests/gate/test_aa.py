"""The gate's own error rates: runs drawn from made-up journals, live runs of two tiny cases, the page of a journal."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sasa_bench.case import Case
from sasa_bench.gate import aa
from sasa_bench.gate.pairs import Point
from sasa_bench.gate.verdicts import Rules


def journal(scatter: float, count: int = 60) -> list[dict[str, dict[str, float]]]:
    keys = [f"case {i}" for i in range(10)]
    return [{w: {key: random.gauss(0, scatter) for key in keys} for w in ("head", "floor")} for _ in range(count)]


def test_resampled_runs_on_quiet_pairs_find_what_is_slow_and_nothing_else() -> None:
    rates = aa.Rates.of(aa.resample(journal(0.01), 100, Rules(), ratio=1.10))
    assert (rates.false, rates.slowed) == (0, 100)
    assert rates.found >= 97
    assert "Clopper" not in rates.lines()[0]
    assert "slow-downs of 10.0% found" in rates.lines()[2]


def test_resampled_runs_on_identical_code_raise_no_alarm() -> None:
    rates = aa.Rates.of(aa.resample(journal(0.03), 100, Rules()))
    assert rates.false <= 2
    assert rates.slowed == 0


def test_a_journal_with_too_few_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in journal(0.01, 5)))
    with pytest.raises(aa.JournalError, match="5 pairs"):
        aa.read_journal(path)
    path.write_text("hello\n")
    with pytest.raises(aa.JournalError, match="not a journal"):
        aa.read_journal(path)


def test_pairs_that_were_slowed_on_purpose_are_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = [pair | {"ratio": 1.1 if i % 2 else 1.0} for i, pair in enumerate(journal(0.01, 60))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(aa.read_journal(path)) == 30


def test_a_run_draws_its_pairs_from_one_kind_of_neighbour() -> None:
    quiet = [pair | {"beside": "idle"} for pair in journal(0.002)]
    noisy = [pair | {"beside": "busy"} for pair in journal(0.5)]
    verdicts = {kind: set() for kind in ("idle", "busy")}
    for run in aa.resample(quiet + noisy, 40, Rules()):
        verdicts[run.beside].add(run.verdict)
    assert verdicts["idle"] == {"PASS"}
    assert "PASS" not in verdicts["busy"]


def test_a_live_run_is_journalled_with_what_it_slowed_and_shown_on_the_page(tmp_path: Path) -> None:
    tiny = Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1)
    timed = [Point("unfold", tiny), Point("conv3x3", tiny)]
    points = [*timed, *(Point("onnx", tiny.with_(mode="training", kernel_size=k)) for k in range(3, 41, 2))]
    path = tmp_path / "j.jsonl"
    rules = Rules(screen_pairs=2, confirm_pairs=2)
    (run,) = aa.live(points, 1, rules, 60.0, 60.0, tmp_path / "arms", path, ratio=30.0, beside="bursty")
    assert aa.read_runs(path) == [run]
    assert len(run.slowed) == 1
    assert run.slowed[0] in {point.key for point in timed}
    assert run.beside == "bursty"
    assert run.seconds > 0
    page = aa.write_page(path, rules).read_text()
    assert "bursty" in page
    assert "2 pairs to screen" in page


def test_a_false_alarm_is_a_flag_on_a_case_that_nobody_slowed() -> None:
    run = aa.Run("idle", 1.1, ("a", "b"), ("b", "c"), "REGRESSION")
    assert (run.false_alarm, run.found) == (True, 1)
    assert not aa.Run("idle", 1.1, ("a", "b"), ("b",), "REGRESSION").false_alarm
    assert aa.Rates.of([run, run]).lines()[1].startswith("false alarms: 2 of 2")
