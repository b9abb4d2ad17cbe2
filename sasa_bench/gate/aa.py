"""The gate's own error rates: whole runs on identical code, live or resampled from a journal of real pairs."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy import stats
from tabulate import tabulate

from sasa_bench.case import UserError
from sasa_bench.gate import run as gate
from sasa_bench.gate.arms import PACKAGE, set_up
from sasa_bench.gate.neighbours import beside as neighbour
from sasa_bench.gate.pairs import Counts, Point
from sasa_bench.gate.statistics import against_both, location
from sasa_bench.gate.verdicts import (
    CONTAMINATED,
    EQUIVALENT,
    IMPROVED,
    INCONCLUSIVE,
    PASS,
    REGRESSION,
    Rules,
    confirm,
    contaminated,
    screen,
    worth_more,
)

LEAST_PAIRS = 20
"""Pairs over all cases that a journal must hold before runs are drawn from it."""


class JournalError(UserError):
    """A journal that cannot be read or resampled; the message says why."""


@dataclass(frozen=True)
class Run:
    """One gate run on identical code.

    beside   the neighbour that disturbed it, a key of neighbours.NEIGHBOURS or "idle"
    ratio    how much longer the cases in `slowed` were made to take in head; 1 for none
    flagged  cases that the gate called slower
    seconds  of wall time; 0 for a run that was resampled
    """

    beside: str
    ratio: float
    slowed: tuple[str, ...]
    flagged: tuple[str, ...]
    verdict: str
    seconds: float = 0.0
    at: str = ""

    @property
    def false_alarm(self) -> bool:
        """Whether a case was flagged that nobody had slowed."""
        return bool(set(self.flagged) - set(self.slowed))

    @property
    def found(self) -> int:
        """Slowed cases that were flagged."""
        return len(set(self.flagged) & set(self.slowed))


@dataclass(frozen=True)
class Rates:
    """What many gate runs on identical code decided.

    runs; false: runs that flagged a case nobody had slowed; verdicts of the runs.
    slowed, found: cases slowed on purpose by `ratio`, and how many of them were flagged.
    """

    runs: int
    false: int
    verdicts: dict[str, int]
    ratio: float
    slowed: int
    found: int

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Rates:
        """The rates of runs of one ratio."""
        return cls(
            len(runs),
            sum(run.false_alarm for run in runs),
            dict(Counter(run.verdict for run in runs)),
            runs[0].ratio if runs else 1.0,
            sum(len(run.slowed) for run in runs),
            sum(run.found for run in runs),
        )

    def lines(self) -> list[str]:
        """Sentences with exact (Clopper-Pearson) 95 % intervals."""
        said = [f"{self.runs} runs: " + ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.items())]
        said.append(f"false alarms: {self.false} of {self.runs} runs, {interval(self.false, self.runs)}")
        if self.slowed:
            said.append(
                f"slow-downs of {self.ratio - 1:.1%} found: {self.found} of {self.slowed}, "
                f"{interval(self.found, self.slowed)}"
            )
        return said


def interval(hits: int, count: int) -> str:
    """A rate with its Clopper-Pearson 95 % interval."""
    found = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
    return f"{hits / count:.2%} (95 %: {found.low:.2%} to {found.high:.2%})"


def live(
    points: Sequence[Point],
    runs: int,
    rules: Rules,
    budget_s: float,
    timeout_s: float,
    folder: Path,
    journal: Path,
    ratio: float = 1.0,
    inject_cases: int = 1,
    beside: str = "idle",
    say: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """Run the gate `runs` times with this package in every arm, next to a neighbour; see Run.

    `ratio` slows `inject_cases` random cases in head. The journal gets a line for each pair and for each run.
    """
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    package = Path(__file__).parents[1]
    shutil.copytree(package, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    arms = set_up(str(package.parent), str(source), folder)
    done: list[Run] = []
    for number in range(runs):
        slowed: list[str] = []

        def spin(counts: Counts, slowed: list[str] = slowed) -> Mapping[str, float]:
            if ratio > 1 and not slowed:  # now it is known what can be timed
                slowed += random.sample(list(counts.seconds), min(inject_cases, len(counts.seconds)))
            return {key: (ratio - 1) * counts.seconds[key] for key in slowed}

        label = {"beside": beside, "ratio": ratio}
        with neighbour(beside):
            result = gate.run(arms, points, rules, budget_s, timeout_s, journal=journal, label=label, spin=spin)
        flagged = [case.key for case in result.cases if case.verdict == REGRESSION]
        at = datetime.now(UTC).isoformat(timespec="seconds")
        run = Run(beside, ratio, tuple(slowed), tuple(flagged), result.verdict, round(result.spent_s, 1), at)
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": asdict(run)}) + "\n")
        done.append(run)
        words = f"run {number + 1} of {runs}: {result.verdict} in {result.spent_s:.0f} s"
        say(words + (f", flagged {', '.join(sorted(flagged))}" if flagged else ""))
    return done


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise JournalError(f"{path} is not a journal of gate pairs: {error}") from None


def read_runs(path: Path) -> list[Run]:
    """The live runs of a journal; raises JournalError for a file that is none."""
    try:
        found = [line["run"] for line in _lines(path) if "run" in line]
        return [Run(**run | {"slowed": tuple(run["slowed"]), "flagged": tuple(run["flagged"])}) for run in found]
    except (KeyError, TypeError) as error:
        raise JournalError(f"{path} holds a run that cannot be read: {error}") from None


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The pairs of a journal that cover every case of identical code; raises JournalError where there are too few."""
    try:
        pairs = [
            {"head": line["head"], "floor": line["floor"], "beside": line.get("beside", "idle")}
            for line in _lines(path)
            if "run" not in line and line.get("ratio", 1.0) == 1 and not line.get("phase", "").endswith("replaced")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise JournalError(f"{path} is not a journal of gate pairs: {error}") from None
    most = max((len(pair["head"]) for pair in pairs), default=0)
    whole = [pair for pair in pairs if len(pair["head"]) == most]
    if len(whole) < LEAST_PAIRS:
        raise JournalError(
            f"{path} holds {len(whole)} pairs over all cases: resampling needs {LEAST_PAIRS} or more, --runs adds some"
        )
    return whole


def resample(
    pairs: Sequence[Mapping[str, Any]],
    runs: int,
    rules: Rules,
    ratio: float = 1.0,
    inject_cases: int = 1,
    seed: int | None = None,
) -> list[Run]:
    """Gate runs on pairs drawn with replacement from a journal of identical code.

    `ratio` multiplies the head times of `inject_cases` random cases. The pairs of a run come from one kind of
    neighbour. Whole pairs are drawn, so that what disturbed the cases of a pair together does so here too; a
    coin decides which of head and copy plays head, since both are base.
    """
    rng = random.Random(seed)
    keys = list(pairs[0]["head"])
    kinds = [pair.get("beside", "idle") for pair in pairs]
    enough = {kind: count for kind, count in Counter(kinds).items() if count >= LEAST_PAIRS // 2}
    if not enough:
        raise JournalError(f"no neighbour has {LEAST_PAIRS // 2} pairs over all cases: --runs adds some")
    done = []
    for number in range(runs):
        kind = list(enough)[number % len(enough)]
        own = [pair for pair, its in zip(pairs, kinds, strict=True) if its == kind]
        chosen = rng.sample(keys, inject_cases) if ratio > 1 else []
        extra = {key: math.log(ratio) if key in chosen else 0.0 for key in keys}
        head, _ = _draw(own, keys, rules.screen_pairs, extra, rng)
        suspects = screen(head, rules)
        flagged: set[str] = set()
        verdict = PASS
        if suspects:
            head, floor = _draw(own, suspects, rules.confirm_pairs, extra, rng)
            for key in suspects:
                counts = range(1, rules.confirm_pairs + 1)
                used = next(count for count in counts if not worth_more(head[key][:count], rules))
                head[key], floor[key] = head[key][:used], floor[key][:used]
            judged = confirm(head, floor, rules)
            flagged = {key for key, case in judged.items() if case.verdict == REGRESSION}
            if contaminated(floor, rules):
                verdict, flagged = CONTAMINATED, set()
            elif flagged:
                verdict = REGRESSION
            elif any(case.verdict not in (IMPROVED, EQUIVALENT) for case in judged.values()):
                verdict = INCONCLUSIVE
        done.append(Run(kind, ratio, tuple(chosen), tuple(sorted(flagged)), verdict))
    return done


def _draw(
    pairs: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    count: int,
    extra: Mapping[str, float],
    rng: random.Random,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    head: dict[str, list[float]] = {key: [] for key in keys}
    floor: dict[str, list[float]] = {key: [] for key in keys}
    for _ in range(count):
        pair = rng.choice(pairs)
        first, second = ("head", "floor") if rng.random() < 0.5 else ("floor", "head")
        for key in keys:
            head[key].append(pair[first][key] + extra[key])
            floor[key].append(pair[second][key])
    return {key: against_both(head[key], floor[key]) for key in keys}, floor


def scatter(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how quiet the pairs of identical code are beside each neighbour.

    Quantiles of |log(head / base)|, and the case whose head over both bases is furthest from 1 over all pairs, base and
    copy in either part: what noise that leans to one side does to the signed-rank test, which the margin must cover.
    """
    shown = []
    for kind in sorted({pair["beside"] for pair in pairs}):
        own = [pair for pair in pairs if pair["beside"] == kind]
        values = [abs(value) for pair in own for which in ("head", "floor") for value in pair[which].values()]
        cuts = statistics.quantiles(values, n=100)
        off = {}
        for key in own[0]["head"]:
            head, copy = [pair["head"][key] for pair in own], [pair["floor"][key] for pair in own]
            off[key] = location(against_both(head, copy) + against_both(copy, head))
        furthest = max(off, key=lambda key: abs(off[key]))
        quantiles = {f"p{percent}": f"{cuts[percent - 1]:.4f}" for percent in (50, 90, 99)}
        place = {"furthest case": furthest, "its head / both": f"{math.exp(off[furthest]):.3f}"}
        shown.append({"beside": kind, "pairs": len(own)} | quantiles | place)
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def table(runs: Sequence[Run]) -> str:
    """Markdown: a line for each slow-down and neighbour, with exact 95 % intervals."""
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.ratio, run.beside), []).append(run)
    shown = []
    for (ratio, beside), own in sorted(groups.items()):
        rates = Rates.of(own)
        minutes = [run.seconds / 60 for run in own if run.seconds]
        shown.append(
            {
                "head is slower by": f"{ratio - 1:.0%}" if ratio > 1 else "nothing",
                "beside": beside,
                "runs": rates.runs,
                "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in rates.verdicts.items()),
                "false alarms": interval(rates.false, rates.runs),
                "slow-downs found": f"{rates.found} of {rates.slowed}, {interval(rates.found, rates.slowed)}"
                if rates.slowed
                else "",
                "minutes": f"{statistics.median(minutes):.1f}, at most {max(minutes):.1f}" if minutes else "",
            }
        )
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


RATIOS = (1.0, 1.05, 1.10)
"""Slow-downs that the page of a journal draws runs for."""


def write_page(journal: Path, rules: Rules, resamples: int = 0) -> Path:
    """Write the tables of a journal beside it, as Markdown; `resamples` runs are drawn for each of RATIOS."""
    runs = read_runs(journal)
    parts = [f"# Error rates of the gate, from {journal.name}", f"Rules: {_words(rules)}."]
    if runs:
        period = f"{min(run.at for run in runs)} to {max(run.at for run in runs)}"
        parts += [f"## Live runs, {period}", table(runs)]
    if resamples:
        pairs = read_journal(journal)
        drawn = [run for ratio in RATIOS for run in resample(pairs, resamples, rules, ratio)]
        parts += ["## Runs drawn from the pairs of this journal", scatter(pairs), table(drawn)]
    page = journal.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _words(rules: Rules) -> str:
    return (
        f"{rules.screen_pairs} pairs to screen, suspect beyond {rules.suspect:.1%}, {rules.confirm_pairs} fresh pairs "
        f"to confirm, {rules.look_pairs} or more where a suspect no longer looks changed, margin {rules.margin:.1%} or "
        f"the bias of the case, level {rules.alpha:.0%} a run"
    )
