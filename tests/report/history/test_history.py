from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import factory
import numpy as np
import pytest
from browser import Browser
from scipy import stats

from sasa_bench.case import Case
from sasa_bench.cli import main
from sasa_bench.report import history, page
from sasa_bench.report.history import changes, series
from sasa_bench.report.history.series import RATIO, TIME
from sasa_bench.results.machine import Machine

CASES = [Case(kernel_size=k, threads=2) for k in (3, 5, 7)]


def runs(
    folder: Path,
    count: int,
    slow: Callable[[int, str, Case], float] = lambda turn, impl, case: 1.0,
    noise: float = 0.01,
    made_on: Callable[[int], Machine] = lambda turn: factory.machine(commit=f"{turn:012x}"),
    impls: Sequence[str] = ("unfold", "blocked", "conv3x3"),
) -> Path:
    """Results files of `count` runs, a day and a commit each, named so that they do not sort by date."""
    for turn in range(count):
        drift = random.gauss(0, 0.05)
        rows = [
            factory.record(
                impl,
                0.01 * slow(turn, impl, case) * np.exp(drift + random.gauss(0, noise)),
                noise=0.001,
                count=9,
                case=case,
                machine=made_on(turn).id,
                started_at=f"2026-{1 + turn // 28:02d}-{1 + turn % 28:02d}T10:00:00+00:00",
            )
            for impl in impls
            for case in CASES
        ]
        factory.results_file(folder / f"{97 * turn % 101:03d}.jsonl", rows, made_on(turn))
    return folder


def step(at: int, ratio: float) -> Callable[[int, str, Case], float]:
    return lambda turn, impl, case: ratio if impl == "unfold" and case == CASES[1] and turn >= at else 1.0


def test_a_step_of_ten_percent_is_found_at_its_commit_in_its_series_alone(tmp_path: Path) -> None:
    random.seed(18)  # of a thousand other draws one shows a change besides, as the level says
    found = history.load(runs(tmp_path, 30, step(18, 1.10)), level=1e-3)
    assert [(c.series.impl, c.series.case) for c in found.changes] == [("unfold", CASES[1])]
    change = found.changes[0]
    assert abs(change.index - 18) <= 1
    assert change.series.runs[change.index].machine.commit == f"{change.index:012x}"
    assert change.series.quantity == RATIO
    assert change.ratio == pytest.approx(1.10, abs=0.04)
    assert change.p_value <= changes.LEVEL


def changes_of_a_mended_slow_down(noise: np.random.Generator, count: int, level: float) -> list[dict[int, float]]:
    """What is found in each of `count` histories of 45 results whose results 15 to 29 are 10 % slower."""
    slow = np.where((np.arange(45) >= 15) & (np.arange(45) < 30), 1.1, 1.0)
    histories = slow * np.exp(noise.normal(0, 0.01, (count, 45)))
    return [changes.change_points([values], level)[0] for values in histories.tolist()]


@pytest.mark.parametrize("level", [1e-3, changes.LEVEL])
def test_a_slow_down_that_was_mended_is_two_changes(level: float) -> None:
    """One history of a thousand may be misread; a change besides is found as often as `level` says."""
    places = [set(found) for found in changes_of_a_mended_slow_down(np.random.default_rng(), 50, level)]
    misplaced = sum(any(min(abs(index - at) for index in found) > 1 for at in (15, 30)) for found in places)
    besides = sum(len(found) > 2 for found in places)
    assert misplaced <= 4
    assert stats.binomtest(besides, 50, level, alternative="greater").pvalue > 1e-6


def test_two_changes_are_told_where_one_would_be_significant_elsewhere() -> None:
    """The best single split of these values lies at 31."""
    (found,) = changes_of_a_mended_slow_down(np.random.default_rng(13), 1, changes.LEVEL)
    assert set(found) == {15, 30}


@pytest.mark.parametrize("scatter", [lambda: random.gauss(0, 0.02), lambda: float(stats.t.rvs(2)) / 50])
def test_without_a_step_none_is_found_more_often_than_the_stated_rate(scatter: Callable[[], float]) -> None:
    pages, level = 150, 0.05
    alarms = sum(
        any(changes.change_points([[np.exp(scatter()) for _ in range(n)] for n in (15, 22, 30)], level))
        for _ in range(pages)
    )
    assert stats.binomtest(alarms, pages, level, alternative="greater").pvalue > 1e-6, alarms


def test_one_disturbed_run_is_no_change() -> None:
    shrunk = []
    for _ in range(9):
        values = [np.exp(random.gauss(0, 0.01)) for _ in range(30)]
        before = changes.best_split(values)[1]
        values[17] *= 3
        shrunk.append(changes.best_split(values)[1] / min(before, 0.05))
    assert np.median(shrunk) > 0.5


@pytest.mark.parametrize("cuts", [1, 2])
def test_the_null_distribution_is_that_of_all_orders(cuts: int) -> None:
    orders = list(permutations(range(1, 8)))
    splits = list(combinations(range(1, 7), cuts))
    every = np.array([[stats.kruskal(*np.split(order, s)).statistic for s in splits] for order in orders[::40]])
    assert changes._largest(np.array(orders[::40], float), cuts) == pytest.approx(every.max(axis=1))
    whole, drawn = changes._largest(np.array(orders, float), cuts), changes._null(7, cuts)
    for quantile in (0.5, 0.9, 0.99):
        bound = np.quantile(whole, quantile) - 1e-9
        assert np.mean(drawn >= bound) == pytest.approx(np.mean(whole >= bound), abs=0.012)


def test_fewer_results_than_a_change_needs_can_never_show_one_and_that_is_said(tmp_path: Path) -> None:
    least = changes.least_results()
    half = least // 2
    values = [*range(half, 0, -1), *range(least, half, -1)]
    assert changes.best_split(values) == ([half], pytest.approx(4 / math.comb(least, half), rel=0.25))
    assert 4 / math.comb(least, half) <= changes.LEVEL < 4 / math.comb(least - 2, half - 1)
    found = history.load(runs(tmp_path, least - 1, step(4, 2.0)))
    assert (found.series, found.changes, len(found.short)) == ([], [], 9)
    said = history.render(found, "text")
    assert f"No series has the {least} results" in said
    assert f"the longest has {least - 1}" in said


def test_no_change_is_said(tmp_path: Path) -> None:
    found = history.load(runs(tmp_path, 18), level=1e-4)
    assert history.render(found, "text").startswith("No change in 9 series")
    assert len(history.render(found, "csv").splitlines()) == 1


def test_unlike_machines_are_not_mixed(tmp_path: Path) -> None:
    def made_on(turn: int) -> Machine:
        return factory.machine(cpu="Fast CPU" if turn % 2 else "Slow CPU", commit=f"{turn:012x}")

    def slow(turn: int, impl: str, case: Case) -> float:
        return 3.0 if impl == "unfold" and turn % 2 else 1.0

    found = history.load(runs(tmp_path, 24, slow, made_on=made_on))
    assert len(found.runs) == 2
    assert len(found.series) == 18
    for each in found.series:
        assert {run.machine.hardware_id for run in each.runs} == {each.hardware}
        assert len(each.values) == 12
    assert not [c for c in found.changes if c.ratio > 1.5]


def test_what_else_changed_stands_beside_the_change(tmp_path: Path) -> None:
    def made_on(turn: int) -> Machine:
        return factory.machine(commit=f"{turn:012x}", libraries={"torch": "2.13.0" if turn >= 10 else "2.12.0"})

    found = history.load(runs(tmp_path, 20, lambda turn, i, case: 2.0 if i == "unfold" and turn >= 10 else 1.0,
                              made_on=made_on))  # fmt: skip
    of_unfold = [c for c in found.changes if c.series.impl == "unfold"]
    assert len(of_unfold) == 3
    assert {c.also_changed for c in of_unfold} == {"torch 2.12.0 -> 2.13.0"}


def test_the_baseline_and_series_without_it_are_judged_by_time(tmp_path: Path) -> None:
    found = history.load(runs(tmp_path / "a", 12))
    assert {s.quantity for s in found.series if s.impl == "conv3x3"} == {TIME}
    alone = history.load(runs(tmp_path / "b", 12, impls=["unfold"]))
    assert {s.quantity for s in alone.series} == {TIME}


def test_runs_stand_in_order_of_their_commits_where_the_repository_knows_them(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    commits = []
    for turn in range(3):
        date = {
            "GIT_AUTHOR_DATE": f"2026-01-0{turn + 1}T00:00:00Z",
            "GIT_COMMITTER_DATE": f"2026-01-0{turn + 1}T00:00:00Z",
        }
        subprocess.run(
            [*git, "commit", "-qm", str(turn), "--allow-empty"], check=True, env=date | {"PATH": "/usr/bin:/bin"}
        )
        commits.append(
            subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
        )
    backwards = commits[::-1]
    runs(tmp_path / "results", 3, made_on=lambda turn: factory.machine(commit=backwards[turn]))
    found = history.load(tmp_path / "results", repository=tmp_path)
    assert [run.machine.commit for run in found.short[0].runs] == commits
    assert "by date of commit" in found.sentences()[1]


def test_runs_of_a_kernel_file_stand_in_order_of_its_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dates = {"0123456789ab": 1, "aaa": 20, "bbb": 10}
    monkeypatch.setattr(series, "_committed", lambda commit, repository: dates[commit])
    for turn, commit in enumerate(["aaa", "bbb+dirty"]):
        rows = [factory.record(case=case, started_at=f"2026-01-0{turn + 1}T00:00:00") for case in CASES]
        rows = [replace(row, extra={"source_commit": commit}) for row in rows]
        factory.results_file(tmp_path / f"{turn}.jsonl", rows)
    found = history.load(tmp_path)
    assert [run.kernel for run in found.short[0].runs] == ["bbb+dirty", "aaa"]
    assert "kernel aaa" in found.short[0].runs[1].words


def test_git_never_runs_where_the_results_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(tmp_path, 3)
    ran_in: list[str] = []
    whole = subprocess.run

    def watched(command: list[str], **more: object) -> object:
        ran_in.append(command[command.index("-C") + 1])
        return whole(command, **more)

    monkeypatch.setattr(series.subprocess, "run", watched)
    monkeypatch.chdir(tmp_path)
    history.load(tmp_path)
    assert ran_in
    assert set(ran_in) == {str(Path(series.__file__).parent)}


def test_files_and_folders_may_be_named_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(tmp_path / "a", 2)
    files = sorted(runs(tmp_path / "b", 3).glob("*.jsonl"))
    with pytest.raises(SystemExit) as stop:
        main(["history", str(tmp_path / "a"), *map(str, files), str(files[0])])
    assert stop.value.code == 0
    found = history.load([tmp_path / "a", *files, files[0]])
    assert sum(len(runs) for runs in found.runs.values()) == 5


def test_a_row_that_two_files_hold_counts_once(tmp_path: Path) -> None:
    runs(tmp_path, 12)
    (tmp_path / "more").mkdir()
    file = next(tmp_path.glob("*.jsonl"))
    (tmp_path / "more" / "copy.jsonl").write_bytes(file.read_bytes())
    assert {len(s.values) for s in history.load(tmp_path).series} == {12}


def test_a_broken_file_is_one_clear_line_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(tmp_path, 12)
    (tmp_path / "journal.jsonl").write_text(json.dumps({"phase": "screen", "head": {}}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["history", str(tmp_path), "-c", "kernel_size=3,5", "--impl", "unfold"])
    said = capsys.readouterr()
    assert stop.value.code == 0
    assert len(said.err.splitlines()) == 1
    assert "journal.jsonl, line 1, is not a line of a results file" in said.err
    assert "in 2 series" in said.out or "of 2 series" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--impl", "nosuch"], "with results: blocked, conv3x3, unfold"),
        (["-c", "kernel_size=99"], "no row that is ok"),
        (["-c", "nosuch=1"], "unknown axis"),
        (["--format", "xml"], "text, markdown, csv"),
        (["--level", "0"], "between 0 and 1"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(tmp_path, 2)
    with pytest.raises(SystemExit) as stop:
        main(["history", str(tmp_path), *arguments])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_an_empty_folder_and_a_missing_library_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(history.HistoryError, match="holds no results file"):
        history.load(tmp_path)
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(history.HistoryError, match=r"sasa-bench\[history\]"):
        changes.best_split([1.0, 2.0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_shows_what_changed_first_and_opens_offline(browser: Browser, tmp_path: Path, theme: str) -> None:
    runs(tmp_path, 24, step(14, 1.5))
    found = history.load(tmp_path, level=1e-3)
    page.write(history.html(found), tmp_path / "history.html")
    browser.open(tmp_path / "history.html", 1280, 4000, theme)
    browser.wait_for("return document.querySelectorAll('.chart svg').length >= 2")
    browser.wait_for("return document.querySelectorAll('#changes tbody tr').length > 0")
    first = "#chart-changed-1 .mark-symbol.role-mark path"
    assert browser.ask(f"return document.querySelectorAll('{first}').length") == 24
    assert browser.ask("return document.querySelectorAll('#chart-all-1 .mark-line path').length") == 2
    text = browser.ask("return document.body.innerText")
    assert text.index("What changed") < text.index("unfold, kernel_size: kernel_size=5") < text.rindex("All series")
    paper = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.ask("return document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert browser.complaints() == []
    assert browser.requests() == []


def test_a_change_in_one_of_very_many_series_is_found() -> None:
    """More series than a null distribution that is drawn could tell it from."""
    steady = [[math.exp(random.gauss(0, 0.01)) for _ in range(60)] for _ in range(9)]
    moved = [(1.3 if turn >= 30 else 1.0) * math.exp(random.gauss(0, 0.01)) for turn in range(60)]
    p = changes.best_split(moved)[1]
    assert p < changes.LEVEL / 3000
    adjusted = stats.false_discovery_control([p, *[0.5] * 2999])
    assert adjusted[0] <= changes.LEVEL
    assert min(changes.best_split(values)[1] for values in steady) > 1e-5


@pytest.mark.parametrize("cuts", [1, 2])
def test_the_bound_for_far_tails_is_never_below_the_share_of_all_orders(cuts: int) -> None:
    orders = np.array(list(permutations(range(1, 9))), float)
    largest = changes._largest(orders, cuts)
    for statistic in np.unique(np.round(largest, 9))[-8:]:
        share = float((largest >= statistic - 1e-9).mean())
        assert math.comb(7, cuts) * stats.chi2.sf(statistic, cuts) >= share
