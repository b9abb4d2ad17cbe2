"""A gate run on made-up pairs: what is confirmed, what is let go, what is written, which options are refused."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from checkouts import POINTS

from sasa_bench.cli import gating, main
from sasa_bench.gate import outputs as gate_report
from sasa_bench.gate import run as gate
from sasa_bench.gate import verdicts
from sasa_bench.gate.arms import Arm
from sasa_bench.gate.decision import Result
from sasa_bench.gate.evidence import environment_difference
from sasa_bench.gate.layout import Layout
from sasa_bench.gate.names import short_names
from sasa_bench.gate.pairs import Counts, Pair, Point
from sasa_bench.gate.profiles import Profile
from sasa_bench.gate.sources import ArmError
from sasa_bench.gate.verdicts import Rules
from sasa_bench.timing.process import WorkerDied

ROW = {
    "status": "ok",
    "reason": "",
    "flops": 1,
    "params": 1,
    "operator_count": 1,
    "allocated_bytes": 1,
    "err_budget": 1,
}
RULES = Rules()


class Played:
    """Plays the arms: pairs with a given shift of head and copy, exact rows that may differ."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shift: dict[str, float] = {}
        self.screen_shift: dict[str, float] = {}
        self.floor_shift: dict[str, float] = {}
        self.scatter = 0.01
        self.head_rows: dict[str, dict[str, Any]] = {}
        self.deaths = 0
        self.dies_after = 1000
        self.pairs = 0
        self.disturbed: list[float] = []
        monkeypatch.setattr(gate, "exact_rows", self.exact)
        monkeypatch.setattr(gate, "measure_pair", self.pair)
        self.libraries = {"base": {"torch": "2"}, "head": {"torch": "2"}, "copy": {"torch": "2"}}
        self.unknown: dict[str, dict[str, str]] = {}
        self.digests = {name: name for name in self.libraries}
        self.interpreters = dict.fromkeys(self.libraries, "p")
        monkeypatch.setattr(gate, "survey", self.survey)

    def survey(self, arm: Arm, impls: Sequence[str], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
        libraries = self.libraries[arm.name]
        loaded = {"digest": self.digests[arm.name], "torch": libraries["torch"], "libraries": libraries, "python": "p"}
        loaded["interpreter"] = self.interpreters[arm.name]
        return loaded, self.unknown.get(arm.name, {})

    def exact(
        self, arms: Sequence[Arm], points: Sequence[Point], timeout_s: float, layout: Layout, until: float
    ) -> dict[str, dict[str, dict[str, Any]]]:
        rows = {p.key: dict(ROW) for p in points}
        return {arm.name: rows | self.head_rows if arm.name == "head" else dict(rows) for arm in arms}

    def pair(
        self, arms: object, points: Sequence[Point], counts: Counts, timeout_s: float, spin: object, layout: Layout
    ) -> Pair:
        if self.deaths:
            self.deaths -= 1
            raise WorkerDied("error", "the worker was killed by SIGKILL", None, "time")
        if self.pairs == self.dies_after:
            raise WorkerDied("timeout", "no answer", None, "time")
        self.pairs += 1
        shift = self.shift | (self.screen_shift if self.pairs <= RULES.screen_pairs else {})
        head = {p.key: math.log1p(shift.get(p.key, 0)) + random.gauss(0, self.scatter) for p in points}
        floor = {p.key: math.log1p(self.floor_shift.get(p.key, 0)) + random.gauss(0, self.scatter) for p in points}
        disturbed = self.disturbed.pop(0) if self.disturbed else 0.0
        blocks = {key: [value] for key, value in head.items()}
        return Pair(head, floor, dict.fromkeys(head, 0.002), blocks, disturbed)

    def run(self, budget_s: float = 600.0, **changes: Any) -> Result:
        arms = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]
        return gate.Gate(arms, POINTS, RULES, budget_s, 10.0, **changes).run()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def test_identical_arms_pass(played: Played) -> None:
    played.scatter = 0.002
    result = played.run()
    assert (result.verdict, result.exit_status) == ("PASS", 0)
    assert played.pairs == RULES.screen_pairs


def _same_files(played: Played) -> None:
    played.digests = dict.fromkeys(played.digests, "one digest")
    played.scatter = 0.002


def test_the_same_files_in_the_same_environment_pass_without_being_timed(played: Played) -> None:
    _same_files(played)
    result = played.run()
    assert (result.verdict, result.exit_status, played.pairs) == ("PASS", 0, 0)
    assert gate_report.text(result).startswith("PASS: base and head are the same files, so nothing was timed")
    assert all("the same files" in case.reason for case in result.cases)


def test_the_same_files_fail_where_they_are_wrong(played: Played) -> None:
    _same_files(played)
    played.head_rows[POINTS[2].key] = ROW | {"status": "wrong", "reason": "y is off"}
    assert played.run().verdict == "REGRESSION"


def test_the_same_files_are_timed_to_measure_the_gate_and_with_another_interpreter(played: Played) -> None:
    _same_files(played)
    assert (played.run(time_unchanged=True).verdict, played.pairs) == ("PASS", RULES.screen_pairs)
    played.interpreters["head"] = "another"
    assert (played.run().verdict, played.pairs) == ("PASS", 2 * RULES.screen_pairs)


def test_a_slow_down_is_confirmed_on_fresh_pairs_and_fails(played: Played) -> None:
    played.shift[POINTS[1].key] = 0.08
    result = played.run()
    assert (result.verdict, result.exit_status) == ("REGRESSION", 2)
    assert result.cases[0].key == POINTS[1].key
    assert played.pairs == RULES.screen_pairs + RULES.confirm_pairs


def test_a_suspect_that_no_longer_looks_slow_is_let_go(played: Played) -> None:
    played.scatter = 0.002
    played.screen_shift[POINTS[1].key] = 0.08
    result = played.run()
    assert (result.verdict, result.exit_status) == ("PASS", 0)
    assert played.pairs == RULES.screen_pairs + RULES.look_pairs
    let_go = next(case for case in result.cases if case.key == POINTS[1].key)
    assert f"after {RULES.look_pairs} fresh pairs" in let_go.reason
    assert let_go.ratio == pytest.approx(1, abs=0.01)


def test_a_confirmation_cut_short_leaves_open_only_what_still_looked_slow(played: Played) -> None:
    played.scatter = 0.002
    played.shift[POINTS[0].key] = 0.08
    played.screen_shift[POINTS[1].key] = 0.08
    played.dies_after = RULES.screen_pairs + RULES.look_pairs + 2
    result = played.run()
    assert (result.verdict, result.exit_status) == ("INCONCLUSIVE", 3)
    verdicts = {case.key: case.verdict for case in result.cases}
    assert (verdicts[POINTS[0].key], verdicts[POINTS[1].key]) == ("INCONCLUSIVE", "EQUIVALENT")


def test_a_speed_up_passes_and_is_shown(played: Played) -> None:
    played.shift[POINTS[0].key] = -0.2
    result = played.run()
    assert result.exit_status == 0
    assert result.cases[0].verdict == "IMPROVED"


def test_a_floor_that_moves_contaminates(played: Played) -> None:
    played.shift[POINTS[0].key] = 0.3
    played.floor_shift[POINTS[0].key] = 0.1
    assert (played.run().verdict, played.run().exit_status) == ("CONTAMINATED", 3)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (ROW | {"status": "wrong", "reason": "y is off"}, "WRONG"),
        (ROW | {"status": "error", "reason": "boom"}, "MISSING"),
        (ROW | {"flops": 2}, "REGRESSION"),
        (ROW | {"allocated_bytes": 2}, "REGRESSION"),
    ],
)
def test_an_exact_figure_that_became_worse_fails(played: Played, row: dict[str, Any], verdict: str) -> None:
    played.head_rows[POINTS[2].key] = row
    result = played.run()
    assert result.exit_status == 2
    assert (result.cases[0].key, result.cases[0].verdict) == (POINTS[2].key, verdict)


def test_a_budget_that_ends_is_inconclusive_never_a_guess(played: Played) -> None:
    result = played.run(budget_s=0.0)
    assert (result.verdict, result.exit_status) == ("INCONCLUSIVE", 3)
    assert all("--budget" in case.reason for case in result.cases)


def test_a_suspect_that_the_budget_leaves_undecided_shows_the_ratio_so_far(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    played.shift[POINTS[1].key] = 0.13
    clock = iter([0.0] * (3 * RULES.screen_pairs + 12) + [1e6] * 1000)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    result = played.run(budget_s=600.0)
    case = next(case for case in result.cases if case.key == POINTS[1].key)
    assert (result.exit_status, case.verdict) == (3, "INCONCLUSIVE")
    assert case.ratio == pytest.approx(1.13, rel=0.03)
    assert "so far, over" in case.reason


@pytest.mark.parametrize(
    ("pair_s", "pairs", "verdict"),
    [(10.0, RULES.confirm_pairs, "REGRESSION"), (23.0, 19, "REGRESSION"), (40.0, 10, "INCONCLUSIVE")],
)
def test_fewer_fresh_pairs_decide_where_the_budget_holds_no_more(
    played: Played, monkeypatch: pytest.MonkeyPatch, pair_s: float, pairs: int, verdict: str
) -> None:
    played.scatter = 0.002
    played.shift[POINTS[1].key] = 0.08
    begun = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: begun + played.pairs * pair_s)
    result = played.run(budget_s=600.0)
    assert (result.verdict, played.pairs) == (verdict, RULES.screen_pairs + pairs)
    assert any("instead of 21" in note for note in result.notes) == (pairs < RULES.confirm_pairs)


def test_fewer_planned_pairs_raise_no_more_alarms() -> None:
    keys, rng = ["a", "b", "c"], random.Random(7)
    alarms = 0
    for _ in range(300):
        noise = {key: [rng.gauss(math.log1p(Rules.margin), 0.02) for _ in range(Rules.least_pairs)] for key in keys}
        floor = {key: [0.0] * Rules.least_pairs for key in keys}
        decided = verdicts.confirm(noise, floor, Rules(), dict.fromkeys(keys, Rules.least_pairs))
        assert all(case.high is not None for case in decided.values())  # each is decided, none was dropped
        alarms += any(case.verdict == "REGRESSION" for case in decided.values())
    assert alarms <= 9  # at 1 % a run 3 are expected, and more than 9 in 1 of 1,000 series


def test_an_implementation_that_neither_arm_has_ends_the_run_before_anything_is_measured(played: Played) -> None:
    played.unknown = {"base": {"unfold": "unknown"}, "head": {"unfold": "unknown implementation 'unfold'"}}
    with pytest.raises(ArmError, match="neither arm has 'unfold': unknown implementation"):
        played.run()
    assert played.pairs == 0
    del played.unknown["base"]
    assert played.run().verdict != "INCONCLUSIVE"


def test_more_operators_are_a_remark_and_the_case_is_timed(played: Played) -> None:
    played.scatter = 0.002
    played.shift[POINTS[0].key] = -0.2
    played.head_rows = {point.key: ROW | {"operator_count": 5} for point in POINTS[:2]}
    result = played.run()
    found = {case.key: case for case in result.cases}
    assert (result.exit_status, found[POINTS[0].key].verdict) == (0, "IMPROVED")
    for point in POINTS[:2]:
        assert "operators 1 -> 5" in found[point.key].reason
        assert found[point.key].ratio is not None


def test_a_library_that_differs_between_the_arms_is_named_and_memory_is_not_compared(played: Played) -> None:
    played.scatter = 0.002
    played.libraries["head"] = {"torch": "3"}
    played.head_rows = {POINTS[0].key: ROW | {"allocated_bytes": 2}}
    result = played.run()
    assert "environment: torch 2 -> 3" in result.notes
    assert result.exit_status == 0


def test_another_python_or_plug_in_is_a_difference_of_the_environment() -> None:
    base = {"torch": "2", "libraries": {"numpy": "2.0"}, "python_version": "3.11.7", "plugins": {"mine": "a1"}}
    head = base | {"python_version": "3.12.1", "plugins": {"mine": "b2", "other": "c3"}}
    assert environment_difference(base, head) == [
        "Python 3.11.7 -> 3.12.1", "plug-in mine a1 -> b2", "plug-in other none -> c3"
    ]  # fmt: skip
    assert environment_difference(base, base) == []
    assert environment_difference(base, head, ("torch",)) == []


def test_a_lost_pair_is_measured_again(played: Played) -> None:
    played.deaths, played.scatter = 2, 0.002
    result = played.run()
    assert result.exit_status == 0
    assert played.pairs == RULES.screen_pairs
    assert sum("lost" in note for note in result.notes) == 2


def test_a_pair_that_others_disturbed_is_measured_again_whatever_its_times(played: Played, tmp_path: Path) -> None:
    played.scatter = 0.002
    played.disturbed = [0.5, 0.0, 0.6]
    result = played.run(journal=tmp_path / "journal.jsonl")
    assert (result.exit_status, played.pairs) == (0, RULES.screen_pairs + 2)
    assert any("2 pairs were measured again" in note for note in result.notes)
    assert not any("of the processors" in note for note in result.notes)
    phases = [json.loads(line)["phase"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert phases.count("screen, replaced") == 2
    assert phases.count("screen") == RULES.screen_pairs == len(result.pairs)


def test_a_neighbour_that_stays_does_not_keep_the_gate_from_deciding(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    played.scatter = 0.002
    played.disturbed = [0.5] * 1000
    begun, pair_s, budget_s = time.monotonic(), 20.0, 600.0
    monkeypatch.setattr(time, "monotonic", lambda: begun + played.pairs * pair_s)
    result = played.run(budget_s=budget_s)
    assert result.exit_status == 0
    assert any("others used 50% of the processors" in note and "-c threads=1" in note for note in result.notes)
    assert played.pairs == RULES.screen_pairs + gate.REPLACED * budget_s // pair_s


def test_processes_that_keep_dying_end_inconclusive(played: Played) -> None:
    played.deaths = 1000
    assert played.run().exit_status == 3


def test_no_points_at_all_never_pass(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "POINTS", [])
    assert played.run().exit_status == 3


def test_the_reports_say_what_happened(played: Played, tmp_path: Path) -> None:
    played.shift[POINTS[1].key] = 0.08
    played.head_rows[POINTS[2].key] = ROW | {"status": "wrong", "reason": "y is <off> & bad"}
    result = played.run(journal=tmp_path / "journal.jsonl")
    paths = gate_report.write_all(result, tmp_path)
    assert {p.suffix for p in paths} == {".txt", ".md", ".xml", ".json", ".html"}
    shown = (tmp_path / "gate.txt").read_text()
    assert 0 < shown.index("WRONG") < shown.index(short_names([p.key for p in POINTS])[POINTS[1].key])
    assert "## Performance gate: REGRESSION" in (tmp_path / "gate.md").read_text()
    suite = ElementTree.fromstring((tmp_path / "gate.xml").read_text())
    assert (suite.get("failures"), suite.get("errors"), suite.get("tests")) == ("2", "0", "4")
    values = json.loads((tmp_path / "gate.json").read_text())
    assert (values["verdict"], values["exit_status"], len(values["cases"])) == ("REGRESSION", 2, 4)
    page = (tmp_path / "gate.html").read_text()
    assert "&lt;off&gt; &amp; bad" in page
    assert "chart-paired-1" in page
    assert "What to look at" in page
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(lines) == played.pairs
    assert set(json.loads(lines[0])["head"]) == {p.key for p in POINTS if p.key != POINTS[2].key}


def test_the_command_profiles_what_it_flags_and_the_page_shows_it(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = POINTS[1]
    played.shift[slow.key] = 0.3
    arms = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]
    profiled: list[Point] = []

    def profile(arms: object, points: Sequence[Point], *rest: object) -> list[Profile]:
        profiled.extend(points)
        return [Profile(point.key, "it was played") for point in points]

    monkeypatch.setattr(gating, "_prepared", lambda asked, folder: (arms, POINTS))
    monkeypatch.setattr("sasa_bench.gate.profiles.profile", profile)
    with pytest.raises(SystemExit) as stop:
        main(["gate", "--base", "a", "--head", "b", "--no-relink", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert profiled == [slow]
    assert "No profile: it was played" in (tmp_path / "gate.html").read_text()


def test_reports_of_a_gate_are_left_out_of_git_and_a_folder_of_the_user_stays_as_it_is(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]
    monkeypatch.setattr(gating, "_prepared", lambda asked, folder: (arms, POINTS))
    own = tmp_path / "own"
    own.mkdir()
    (own / "kernel.py").write_text("")
    for folder in (tmp_path / "new", own):
        with pytest.raises(SystemExit):
            main(["gate", "--base", "a", "--head", "b", "--no-relink", "--out", str(folder)])
        assert (folder / "gate.html").exists()
    assert (tmp_path / "new/.gitignore").read_text() == "*\n"
    assert not (own / ".gitignore").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_verdict_stands_where_the_profiles_are_interrupted(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sent: int
) -> None:
    """By Ctrl-C or by SIGTERM, as CI ends a job; the reports are there before the first profile begins."""
    played.shift[POINTS[1].key] = 0.3
    arms = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]

    def profile(*_: object) -> list[Profile]:
        assert json.loads((tmp_path / "gate.json").read_text())["verdict"] == "REGRESSION"
        signal.raise_signal(sent)
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(gating, "_prepared", lambda asked, folder: (arms, POINTS))
    monkeypatch.setattr("sasa_bench.gate.profiles.profile", profile)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        with pytest.raises(SystemExit) as stop:
            main(["gate", "--base", "a", "--head", "b", "--no-relink", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 2
    assert "the verdict is complete, profiles are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["aa"], "nothing to do"),
        (["aa", "--runs", "1", "--inject", "0.5"], "1 or more"),
        (["gate", "--base", "a", "--head", "b", "--budget", "soon"], "duration"),
        (["gate", "--base", "a"], "--head"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    assert words in capsys.readouterr().err
