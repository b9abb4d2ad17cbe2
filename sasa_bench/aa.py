"""The gate's own error rates: whole runs on identical code, live or resampled from a journal of real pairs."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from sasa_bench import gate
from sasa_bench.arms import PACKAGE, set_up
from sasa_bench.case import UserError
from sasa_bench.decide import IMPROVED, REGRESSION, Rules, confirm, contaminated, screen
from sasa_bench.pairs import Counts, Point


class JournalError(UserError):
    """A journal that cannot be resampled; the message says why."""


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
    condition: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Rates:
    """Run the gate `runs` times with this package in every arm; `ratio` slows `inject_cases` random cases in head."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    package = Path(__file__).parent
    shutil.copytree(package, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    arms = set_up(str(package.parent), str(source), folder)
    verdicts: Counter[str] = Counter()
    false = slowed = found = 0
    for number in range(runs):
        keys = random.sample([p.key for p in points], inject_cases) if ratio > 1 else []

        def spin(counts: Counts, keys: list[str] = keys) -> Mapping[str, float]:
            return {key: (ratio - 1) * counts.seconds[key] for key in keys if key in counts.seconds}

        result = gate.run(arms, points, rules, budget_s, timeout_s, journal=journal, condition=condition, spin=spin)
        flagged = {case.key for case in result.cases if case.verdict == REGRESSION}
        verdicts[result.verdict] += 1
        false += bool(flagged - set(keys))
        slowed += len(keys)
        found += len(flagged & set(keys))
        words = f"run {number + 1} of {runs}: {result.verdict} in {result.spent_s:.0f} s"
        say(words + (f", flagged {', '.join(sorted(flagged))}" if flagged else ""))
    return Rates(runs, false, dict(verdicts), ratio, slowed, found)


def read_journal(path: Path) -> list[dict[str, dict[str, float]]]:
    """The pairs of a journal that cover every case; raises JournalError where there are too few."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [{"head": line["head"], "floor": line["floor"]} for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path} is not a journal of gate pairs: {error}") from None
    most = max((len(pair["head"]) for pair in pairs), default=0)
    whole = [pair for pair in pairs if len(pair["head"]) == most]
    if len(whole) < 20:
        raise JournalError(
            f"{path} holds {len(whole)} pairs over all cases: resampling needs 20 or more, --runs adds some"
        )
    return whole


def resample(
    pairs: Sequence[Mapping[str, Mapping[str, float]]],
    runs: int,
    rules: Rules,
    ratio: float = 1.0,
    inject_cases: int = 1,
    seed: int | None = None,
) -> Rates:
    """Gate runs on pairs drawn with replacement from a journal of identical code.

    `ratio` multiplies the head times of `inject_cases` random cases. Whole pairs are drawn, so that what disturbed the
    cases of a pair together does so here too; a coin decides which of head and copy plays head, since both are base.
    """
    rng = random.Random(seed)
    keys = list(pairs[0]["head"])
    verdicts: Counter[str] = Counter()
    false = slowed = found = 0
    for _ in range(runs):
        chosen = rng.sample(keys, inject_cases) if ratio > 1 else []
        extra = {key: math.log(ratio) if key in chosen else 0.0 for key in keys}
        head, _ = _draw(pairs, keys, rules.screen_pairs, extra, rng)
        suspects = screen(head, rules)
        flagged: set[str] = set()
        verdict = "PASS"
        if suspects:
            head, floor = _draw(pairs, suspects, rules.confirm_pairs, extra, rng)
            judged = confirm(head, floor, rules)
            flagged = {key for key, case in judged.items() if case.verdict == REGRESSION}
            if contaminated(floor, rules):
                verdict, flagged = "CONTAMINATED", set()
            elif flagged:
                verdict = REGRESSION
            elif any(case.verdict not in (IMPROVED, "EQUIVALENT") for case in judged.values()):
                verdict = "INCONCLUSIVE"
        verdicts[verdict] += 1
        false += bool(flagged - set(chosen))
        slowed += len(chosen)
        found += len(flagged & set(chosen))
    return Rates(runs, false, dict(verdicts), ratio, slowed, found)


def _draw(
    pairs: Sequence[Mapping[str, Mapping[str, float]]],
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
    return head, floor


def scatter(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """How quiet the pairs of a journal are: quantiles of |log ratio| on identical code."""
    values = sorted(abs(value) for pair in pairs for which in ("head", "floor") for value in pair[which].values())
    cuts = statistics.quantiles(values, n=100)
    return f"|log ratio| of one pair: p50 {cuts[49]:.4f}, p90 {cuts[89]:.4f}, p99 {cuts[98]:.4f} ({len(pairs)} pairs)"
