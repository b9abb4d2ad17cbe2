"""The search for a commit: by made-up noise, and by a journal of real pairs for its rate."""

from __future__ import annotations

import json
import math
import random
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from sasa_bench.case import Case
from sasa_bench.gate.bisect import PAIRS, Answer, Belief, BisectError, Bisection, Slowdown, search
from sasa_bench.gate.decision import Result
from sasa_bench.gate.git import find
from sasa_bench.gate.pairs import Counts, Pair, Point
from sasa_bench.gate.run import MOST_LOST
from sasa_bench.gate.verdicts import CaseVerdict, Rules
from sasa_bench.timing.process import WorkerDied

JOURNAL = Path(__file__).parents[2] / "reports" / "reference" / "gate" / "aa.jsonl"
COMMITS = 32


def found(first: int, slowdown: Slowdown, draw: object, skipped: frozenset[int] = frozenset()) -> tuple[Belief, int]:
    """The belief after a search for the planted commit `first`, and how many questions it took."""

    def ask(index: int) -> Answer:
        if index in skipped:
            return Answer(index, (), "it does not build")
        shift = slowdown.size if index >= first else 0.0
        return Answer(index, tuple(shift + draw() for _ in range(PAIRS)))  # type: ignore[operator]

    belief = Belief(COMMITS)
    asked = list(search(belief, ask, slowdown, 0.95))
    return belief, len(asked)


def test_a_planted_commit_is_found_in_nine_of_ten_searches_by_the_noise_of_real_pairs() -> None:
    lines = [json.loads(line) for line in JOURNAL.read_text().splitlines()]
    same = [line for line in lines if line.get("beside") == "idle" and line.get("ratio", 1.0) == 1.0]
    noise = [line["head"][key] - line["floor"][key] / 2 for line in same for key in line["head"]]
    assert len(noise) > 1000
    middle = sorted(abs(value) for value in noise)
    slowdown = Slowdown(math.log(1.05), 1.4826 * middle[len(middle) // 2])
    hits = 0
    for _ in range(200):
        first = random.randrange(COMMITS)
        belief, questions = found(first, slowdown, lambda: random.choice(noise))
        assert questions < 60
        hits += int(belief.p.argmax()) == first
    assert hits >= 180


def test_the_probability_that_is_printed_is_the_rate_at_which_it_is_right() -> None:
    slowdown = Slowdown(0.05, 0.04)
    hits = 0
    stated = 0.0
    for _ in range(300):
        first = random.randrange(COMMITS)
        belief, _ = found(first, slowdown, lambda: random.gauss(0, 0.04))
        hits += int(belief.p.argmax()) == first
        stated += float(belief.p.max())
    assert hits >= 300 * 0.9
    assert abs(hits - stated) < 25


def test_commits_that_do_not_build_are_skipped_and_stay_possible() -> None:
    slowdown = Slowdown(0.10, 0.01)
    belief, _ = found(10, slowdown, lambda: random.gauss(0, 0.01), skipped=frozenset({8, 9, 10}))
    assert belief.skipped
    assert belief.skipped <= {8, 9, 10}
    assert set(belief.candidates(0.95)) == {8, 9, 10, 11}
    assert sum(belief.p[[8, 9, 10, 11]]) > 0.95


def test_one_misleading_answer_does_not_settle_the_search() -> None:
    slowdown = Slowdown(0.05, 0.002)
    lies = iter([slowdown.size])  # the first commit asked about looks slow, and is not

    def ask(index: int) -> Answer:
        shift = next(lies, slowdown.size if index >= 20 else 0.0)
        return Answer(index, (shift,) * PAIRS)

    belief = Belief(COMMITS)
    list(search(belief, ask, slowdown, 0.99))
    assert int(belief.p.argmax()) == 20


def test_pairs_that_scatter_more_than_those_of_the_ends_count_for_less() -> None:
    slowdown = Slowdown(0.0245, 0.0132)
    # Pairs of a live search whose answer was wrong, and such that scatter as those of the ends did.
    assert -2 < slowdown.log_odds([-0.0156, 0.0083, 0.0139, 0.0267, -0.106]) < 0
    assert slowdown.log_odds([-0.005, 0.0083, 0.001, -0.0067, 0.006]) < -3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_commits_are_searched_too(count: int) -> None:
    belief = Belief(count)
    slowdown = Slowdown(0.1, 0.01)
    asked = list(search(belief, lambda index: Answer(index, (0.0,) * PAIRS), slowdown, 0.9))
    assert int(belief.p.argmax()) == count - 1
    assert (not asked) == (count == 1)


class Played(Bisection):
    """A search whose arms are played: commit 5 is the slow one, commit 4 does not build."""

    asked: ClassVar[list[int]] = []
    dies_after = 1000

    def compare_ends(self) -> dict[str, object]:
        return {"key": self.points[0].key, "size": math.log(1.2), "scatter": 0.01}

    def ask(self, index: int, commit: str, point: Point, counts: Counts) -> Answer:
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append(index)
        if index == 4:
            return Answer(index, (), "error: it does not build")
        return Answer(index, tuple(random.gauss(math.log(1.2) if index >= 5 else 0.0, 0.01) for _ in range(PAIRS)))


def test_a_search_that_was_stopped_goes_on_and_names_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for number in range(-1, 8):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", f"commit {number}"], check=True)
    repository = find(tmp_path)
    assert repository is not None
    points = [Point("unfold", Case())]
    monkeypatch.setattr(Played, "asked", [])
    monkeypatch.setattr(Played, "dies_after", 2)

    def search(good: str = "HEAD~8") -> Played:
        return Played(repository, good, "HEAD", points, tmp_path / "out", Rules(), 600.0, 60.0)

    with pytest.raises(KeyboardInterrupt):
        search().run()
    before = list(Played.asked)
    monkeypatch.setattr(Played, "dies_after", 1000)
    result = search().run()
    assert Played.asked[:2] == before
    assert [answer.index for answer in result.answers] == Played.asked
    assert result.commits == repository.between("HEAD~8", "HEAD")
    assert {result.subjects[place] for place in result.candidates} <= {"commit 4", "commit 5"}
    assert "skipped" in result.text()
    assert f"{len(Played.asked)} comparisons" in result.text()
    with pytest.raises(BisectError, match=r"belongs to another search \(good"):
        search("HEAD~7").run()
    points = [Point("unfold", Case(threads=7))]
    with pytest.raises(BisectError, match=r"belongs to another search \(threads \[0\], here \[7\]\)"):
        search().run()
    points = [Point("unfold", Case())]
    journal = tmp_path / "out" / "journal.jsonl"
    header = journal.read_text().splitlines()[0]
    for text in ("[]\n", "[1]\n", "no journal\n", header + '\n{"commit": "x"}\n'):
        journal.write_text(text)
        with pytest.raises(BisectError, match="give another --out"):
            search().run()


def commits(folder: Path, *sources: str) -> list[str]:
    """The commits of a repository with a kernel file, one for each text of it."""
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for number, source in enumerate(sources):
        (folder / "kern.py").write_text(source)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", str(number)], check=True)
    repository = find(folder)
    assert repository is not None
    return [repository.commit(f"HEAD~{back}") or "" for back in reversed(range(len(sources)))]


KERNEL = (
    "from dataclasses import replace\nfrom sasa_bench.impls import get\nIMPL = replace(get('naive'), name='kern')\n"
)


def test_a_commit_that_cannot_be_imported_set_up_or_measured_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = commits(tmp_path, KERNEL, "import os\nos.kill(os.getpid(), 9)\n", "IMPL = 1\n", KERNEL + "# again\n")
    monkeypatch.chdir(tmp_path)
    repository = find(tmp_path)
    assert repository is not None
    point = Point("kern.py", Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1))
    search = Bisection(repository, found[0], found[-1], [point], tmp_path / "out", Rules(), 600.0, 60.0,
                       impls=["kern.py"])  # fmt: skip
    for index in (1, 2):
        answer = search.ask(index, found[index], point, Counts())
        assert answer.ratios == ()
        assert answer.reason
    monkeypatch.setattr("sasa_bench.gate.bisect.PAIRS", 1)
    assert len(search.ask(3, found[3], point, Counts()).ratios) == 1


@pytest.mark.parametrize(("deaths", "measured"), [(MOST_LOST, True), (MOST_LOST + 1, False)])
def test_a_process_that_dies_now_and_then_costs_a_pair_and_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, measured: bool
) -> None:
    found = commits(tmp_path, KERNEL, KERNEL + "# again\n")
    monkeypatch.chdir(tmp_path)
    repository = find(tmp_path)
    assert repository is not None
    point = Point("kern.py", Case())
    died: list[int] = []

    def measure_pair(*arguments: object, **options: object) -> Pair:
        if len(died) < deaths:
            died.append(1)
            raise WorkerDied("error", "killed by SIGKILL", None, "time")
        return Pair({point.key: 0.1}, {point.key: 0.0}, {point.key: 1.0}, {})

    monkeypatch.setattr("sasa_bench.gate.bisect.measure_pair", measure_pair)
    monkeypatch.setattr("sasa_bench.gate.bisect.exact_rows", lambda *a, **o: {"head": {point.key: {"status": "ok"}}})
    search = Bisection(repository, found[0], found[1], [point], tmp_path / "out", Rules(), 600.0, 60.0,
                       impls=["kern.py"])  # fmt: skip
    answer = search.ask(0, found[1], point, Counts())
    assert (len(answer.ratios) == PAIRS) == measured
    assert bool(answer.reason) != measured


def test_ends_that_a_contaminated_run_compared_are_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = commits(tmp_path, KERNEL, KERNEL + "# again\n")
    monkeypatch.chdir(tmp_path)
    repository = find(tmp_path)
    assert repository is not None
    case = CaseVerdict("kern.py", "REGRESSION", ratio=1.2)
    result = Result("CONTAMINATED", [case], {}, "a copy of base measured slower", [], 1.0, Rules())
    monkeypatch.setattr("sasa_bench.gate.bisect.Gate.run", lambda gate: result)
    search = Bisection(repository, found[0], found[1], [Point("kern.py", Case())], tmp_path / "out", Rules(), 600.0,
                       60.0, impls=["kern.py"])  # fmt: skip
    with pytest.raises(BisectError, match="a copy of base measured slower; run it again"):
        search.compare_ends()


def test_the_error_rate_falls_with_the_pairs_and_never_below_the_chance_of_a_surprise() -> None:
    slowdown = Slowdown(0.05, 0.05)
    rates = [slowdown.error_rate(pairs) for pairs in (1, 5, 20, 1000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] >= 0.01
