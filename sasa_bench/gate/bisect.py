"""Which commit made a case slower: a search with the gate as a test that errs at a known rate.

Every question compares one commit with the good end on a few fresh pairs. The answer is a likelihood, not a yes or no:
Bayes' rule turns all answers into a probability for each commit, the next question goes to the commit that halves it
(probabilistic bisection, Horstein 1963), and a commit may be asked again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sasa_bench.case import UserError
from sasa_bench.gate.arms import Arm, set_up
from sasa_bench.gate.evidence import head_over_both
from sasa_bench.gate.git import Repository
from sasa_bench.gate.layout import Layout, laid_out
from sasa_bench.gate.pairs import Counts, Pair, Point, exact_rows, measure_pair
from sasa_bench.gate.relink import BUILT
from sasa_bench.gate.run import MOST_LOST, Gate, Say
from sasa_bench.gate.sources import ArmError
from sasa_bench.gate.statistics import location
from sasa_bench.gate.verdicts import REGRESSION, Rules
from sasa_bench.results.file import append_line
from sasa_bench.timing.probe import detect
from sasa_bench.timing.process import WorkerDied, WorkerRefused

PAIRS = 5
"""Fresh pairs a question."""

SURPRISE = 0.02
"""Chance that an answer says nothing of the commit (a neighbour, a change that was reverted), so that no single
answer can settle the search."""

LEAST_SCATTER = 0.003
"""Log ratios of a question scatter by at least this: what lasts a question shows in no pair."""


class BisectError(UserError):
    """A search that cannot start or continue; the message states why."""


@dataclass(frozen=True)
class Slowdown:
    """What is searched for: the log ratio of bad over good, and the standard deviation of one pair of the ends."""

    size: float
    scatter: float

    def log_odds(self, ratios: Sequence[float]) -> float:
        """log P(ratios | the slow-down is in) - log P(ratios | it is not), for head over both bases, one a pair.

        Pairs that scatter more than those of the ends count for less.
        """
        scatter = max(self.scatter, float(stats.median_abs_deviation(ratios, scale="normal")))
        spread = math.hypot(scatter * math.sqrt(math.pi / 3 / len(ratios)), LEAST_SCATTER)
        found = location(ratios)
        slow, fast = (stats.norm.pdf(found, loc=centre, scale=spread) for centre in (self.size, 0.0))
        flat = 1 / max(4 * abs(self.size), 8 * spread)
        return math.log((1 - SURPRISE) * slow + SURPRISE * flat) - math.log((1 - SURPRISE) * fast + SURPRISE * flat)

    def error_rate(self, pairs: int) -> float:
        """Chance that a question of so many pairs points the wrong way."""
        spread = math.hypot(self.scatter * math.sqrt(math.pi / 3 / pairs), LEAST_SCATTER)
        return SURPRISE / 2 + (1 - SURPRISE) * float(stats.norm.sf(self.size / 2 / spread))


@dataclass(frozen=True)
class Answer:
    """The log ratios of a question about a commit, by its place; none of a commit that does not build or run."""

    index: int
    ratios: tuple[float, ...] = ()
    reason: str = ""


@dataclass
class Belief:
    """The probability of each of `count` commits, oldest first, to be the first slow one; the last one is slow."""

    count: int
    log_p: np.ndarray = field(init=False)
    skipped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.log_p = np.full(self.count, -math.log(self.count))

    @property
    def p(self) -> np.ndarray:
        """The probabilities; they sum to 1."""
        values = np.exp(self.log_p - self.log_p.max())
        found: np.ndarray = values / values.sum()
        return found

    def take(self, answer: Answer, slowdown: Slowdown) -> None:
        """Bayes' rule: an answer that looks slow speaks for the commits up to the one that was asked."""
        if not answer.ratios:
            self.skipped.add(answer.index)
            return
        odds = slowdown.log_odds(answer.ratios)
        self.log_p[: answer.index + 1] += odds

    def next(self) -> int | None:
        """The commit whose answer halves the probability best; None where no commit that runs divides it."""
        below = np.cumsum(self.p)
        open_commits = [i for i in range(self.count - 1) if i not in self.skipped and 1e-9 < below[i] < 1 - 1e-9]
        return min(open_commits, key=lambda i: abs(below[i] - 0.5), default=None)

    def candidates(self, confidence: float) -> list[int]:
        """The fewest commits that hold the first slow one with this probability, the likeliest first."""
        order = np.argsort(-self.p, kind="stable")
        enough = int(np.searchsorted(np.cumsum(self.p[order]), confidence)) + 1
        return [int(i) for i in order[: min(enough, self.count)]]


def search(
    belief: Belief, ask: Callable[[int], Answer], slowdown: Slowdown, confidence: float, most: int = 200
) -> Iterator[Answer]:
    """Ask until one commit has `confidence`, nothing is left to ask, or after `most` questions.

    Each answer is yielded after `belief` took it.
    """
    for _ in range(most):
        if belief.p.max() >= confidence or (index := belief.next()) is None:
            return
        answer = ask(index)
        belief.take(answer, slowdown)
        yield answer


@dataclass
class Found:
    """What a search found.

    commits     after the good end up to the bad one, oldest first
    p           the probability of each to be the first slow one
    answers     what was asked, in order
    spent_s     of this and of earlier calls
    """

    key: str
    slowdown: Slowdown
    commits: list[str]
    subjects: list[str]
    p: list[float]
    candidates: list[int]
    answers: list[Answer]
    spent_s: float

    def text(self) -> str:
        """The commit with its probability, the others that remain possible, and what it cost."""
        lines = [f"{self.key}: {math.expm1(self.slowdown.size):+.1%} from good to bad"]
        for place in self.candidates[:10]:
            lines.append(f"  {self.p[place]:6.1%}  {self.commits[place][:12]}  {self.subjects[place]}")
        if len(self.candidates) > 10:
            lines.append(f"  and {len(self.candidates) - 10} commits less likely")
        skipped = {answer.index: answer.reason for answer in self.answers if not answer.ratios}
        lines += [f"skipped {self.commits[place][:12]}: {reason}" for place, reason in sorted(skipped.items())]
        pairs = sum(len(answer.ratios) for answer in self.answers)
        error = self.slowdown.error_rate(PAIRS)
        lines.append(
            f"{len(self.answers)} comparisons, {pairs} pairs, {self.spent_s:.0f} s for {len(self.commits)} commits; "
            f"each is wrong in {error:.1%}"
        )
        return "\n".join(lines) + "\n"


@dataclass
class Bisection:
    """A search for the commit after `good`, up to `bad`, that made one of the points slower.

    out     holds the arms and journal.jsonl, from which a search that was stopped resumes
    impls   as given on the command line: kernel files among them belong to the arms
    layout  how native code of the arms is linked, one of relink.LAYOUTS
    """

    repository: Repository
    good: str
    bad: str
    points: Sequence[Point]
    out: Path
    rules: Rules
    budget_s: float
    timeout_s: float
    confidence: float = 0.95
    impls: Sequence[str] = ()
    say: Say = lambda phase, done, total: None
    layout: str = BUILT

    def run(self) -> Found:
        """First the gate compares the two ends; the case that it flags with the largest ratio is searched.

        Raises GitError for ends that do not follow each other, BisectError where the gate finds nothing slower, or
        where `out` belongs to another search.
        """
        commits = self.repository.between(self.good, self.bad)
        if not commits:
            raise BisectError(f"there is no commit between {self.good} and {self.bad}")
        journal = _Journal(self.out / "journal.jsonl")
        begun = time.monotonic()
        before_s = sum(line.get("spent_s", 0.0) for line in journal.lines)
        ends = {
            "good": self.repository.commit(self.good),
            "bad": self.repository.commit(self.bad),
            "impls": list(self.impls),
            "threads": sorted({point.case.threads for point in self.points}),
            "layout": self.layout,
            "machine": detect().hardware_id,
        }
        header = journal.header(ends)
        if header is None:
            header = ends | self.compare_ends()
            journal.append(header | {"spent_s": time.monotonic() - begun})
        slowdown = Slowdown(header["size"], header["scatter"])
        point = next((p for p in self.points if p.key == header["key"]), None)
        if point is None:
            raise BisectError(
                f"{self.out} belongs to a search over {header['key']!r}: name its suite, or give another --out"
            )
        counts = Counts()

        def ask(index: int) -> Answer:
            started = time.monotonic()
            answer = self.ask(index, commits[index], point, counts)
            spent_s = time.monotonic() - started
            said = {"commit": commits[index], "ratios": answer.ratios, "reason": answer.reason}
            journal.append(said | {"spent_s": spent_s})
            return answer

        belief = Belief(len(commits))
        answers = journal.answers(commits)
        for answer in answers:
            belief.take(answer, slowdown)
        for answer in search(belief, ask, slowdown, self.confidence):
            answers.append(answer)
            self.say("bisect", len(answers), len(answers) + 1)
            if time.monotonic() - begun > self.budget_s:
                break
        return Found(
            key=point.key,
            slowdown=slowdown,
            commits=commits,
            subjects=[self.repository.subject(commit) for commit in commits],
            p=[float(p) for p in belief.p],
            candidates=belief.candidates(self.confidence),
            answers=answers,
            spent_s=before_s + time.monotonic() - begun,
        )

    def compare_ends(self) -> dict[str, Any]:
        """The case to search, its log ratio over the ends, and the scatter of one pair. Raises BisectError."""
        arms = set_up(self.good, self.bad, self.out, impls=self.impls)
        gate = Gate(arms, self.points, self.rules, self.budget_s, self.timeout_s, self.say, layout=self.layout)
        result = gate.run()
        if result.contaminated:
            raise BisectError(f"the ends cannot be compared: {result.contaminated}; run it again on a quieter machine")
        slower = [case for case in result.cases if case.verdict == REGRESSION and case.ratio is not None]
        if not slower:
            exact = [case for case in result.cases if case.verdict != "EQUIVALENT"]
            why = f"; {exact[0].verdict} in {exact[0].key}: {exact[0].reason}" if exact else ""
            raise BisectError(
                f"the gate finds nothing slower in {self.bad} than in {self.good} ({result.verdict}{why})"
            )
        worst = max(slower, key=lambda case: case.ratio or 0.0)
        ratios = head_over_both([pair for phase, pair in result.pairs if phase == "confirm"], [worst.key])[worst.key]
        scatter = float(stats.median_abs_deviation(ratios, scale="normal"))
        return {"key": worst.key, "size": location(ratios), "scatter": max(scatter, statistics.pstdev(ratios) / 3)}

    def ask(self, index: int, commit: str, point: Point, counts: Counts) -> Answer:
        """One commit against the good end, on PAIRS fresh pairs; none of a commit that does not build, start or run."""
        try:
            arms = set_up(self.good, commit, self.out, impls=self.impls)
            with laid_out(self.layout, arms[0].folder.parent) as layout:
                row = exact_rows([arms[1]], [point], self.timeout_s, layout)["head"][point.key]
                if row["status"] != "ok":
                    return Answer(index, (), f"{row['status']}: {row['reason']}")
                pairs = [self.measure(arms, point, counts, layout) for _ in range(PAIRS)]
        except (ArmError, WorkerDied, WorkerRefused) as error:
            return Answer(index, (), str(error))
        return Answer(index, tuple(head_over_both(pairs, [point.key])[point.key]))

    def measure(self, arms: Sequence[Arm], point: Point, counts: Counts, layout: Layout) -> Pair:
        """One pair; a process may die MOST_LOST times, which need not be due to the commit. Raises as measure_pair."""
        lost = 0
        while True:
            try:
                return measure_pair(arms, [point], counts, self.timeout_s, layout=layout)
            except WorkerDied:
                lost += 1
                if lost > MOST_LOST:
                    raise


class _Journal:
    """The lines of a search: what is searched, then an answer a line; a line that was cut off is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        try:
            self.lines = [dict(json.loads(line)) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        except (ValueError, TypeError) as error:
            raise BisectError(f"{path} is not the journal of a search ({error}): give another --out") from None

    def header(self, ends: dict[str, Any]) -> dict[str, Any] | None:
        if not self.lines:
            return None
        first = self.lines[0]
        if any(first.get(name) != value for name, value in ends.items()):
            differ = next(name for name, value in ends.items() if first.get(name) != value)
            values = f"{differ} {first.get(differ)!r}, here {ends[differ]!r}"
            raise BisectError(f"{self.path.parent} belongs to another search ({values}): give another --out")
        return first

    def answers(self, commits: Sequence[str]) -> list[Answer]:
        try:
            return [Answer(commits.index(a["commit"]), tuple(a["ratios"]), a["reason"]) for a in self.lines[1:]]
        except (KeyError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BisectError(f"{self.path} has an answer that cannot be read ({why}): give another --out") from None

    def append(self, line: dict[str, Any]) -> None:
        append_line(self.path, line)
