"""The gate's own error rates: whole runs on identical code, live, or recorded and decided again with a case slowed."""

from __future__ import annotations

import json
import math
import random
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy import stats

from sasa_bench.case import UserError
from sasa_bench.gate.arms import Arm, set_up
from sasa_bench.gate.decision import decide
from sasa_bench.gate.evidence import Evidence
from sasa_bench.gate.layout import laid_out
from sasa_bench.gate.neighbours import IDLE
from sasa_bench.gate.neighbours import beside as neighbour
from sasa_bench.gate.pairs import Counts, Pair, Point
from sasa_bench.gate.relink import BUILT
from sasa_bench.gate.run import Gate, Say
from sasa_bench.gate.sources import PACKAGE
from sasa_bench.gate.verdicts import REGRESSION, Rules
from sasa_bench.results.file import append_line


class JournalError(UserError):
    """A journal that cannot be read or replayed; the message states why."""


@dataclass(frozen=True)
class Run:
    """One gate run on identical code.

    beside   the neighbour that disturbed it, a key of neighbours.NEIGHBOURS or "idle"
    layout   how native code was linked, one of relink.LAYOUTS
    rules    the rules that decided it, in words; runs of different rules are never counted together
    ratio    how much longer the cases in `slowed` were made to take in head; 1 for none
    flagged  cases that the gate called slower
    seconds  of wall time; 0 for a recorded run that was decided again
    """

    beside: str
    ratio: float
    slowed: tuple[str, ...]
    flagged: tuple[str, ...]
    verdict: str
    seconds: float = 0.0
    at: str = ""
    layout: str = BUILT
    rules: str = ""

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
    beside: str = IDLE,
    layout: str = BUILT,
    record: bool = False,
    say: Callable[[str], None] = lambda line: None,
    show: Say = lambda phase, done, total: None,
) -> list[Run]:
    """Run the gate `runs` times with this package in every arm, next to a neighbour; see Run.

    `say` gets a line for each run, `show` how far it is. Where native code cannot be linked again, the layout is BUILT.
    `ratio` slows `inject_cases` random cases in head. The journal gets a line for each pair and for each run. With
    `record` every case gets all fresh pairs of a suspect and nothing is decided, see replay; no Run comes of it.
    """
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    package = Path(__file__).parents[1]
    shutil.copytree(package, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    arms = set_up(str(package.parent), str(source), folder)
    with laid_out(layout, arms[0].folder.parent) as tried:
        if tried.why:
            layout = BUILT
            say(tried.note())
    done: list[Run] = []
    for number in range(runs):
        slowed: list[str] = []

        def spin(counts: Counts, slowed: list[str] = slowed) -> Mapping[str, float]:
            if ratio > 1 and not slowed:  # now it is known what can be timed
                slowed += random.sample(list(counts.seconds), min(inject_cases, len(counts.seconds)))
            return {key: (ratio - 1) * counts.seconds[key] for key in slowed}

        label = {"beside": beside, "ratio": ratio, "layout": layout, "of": secrets.token_hex(4), "recorded": record}
        used = replace(rules, suspect=-0.5, look_pairs=rules.confirm_pairs) if record else rules
        with neighbour(beside):
            gate = Gate(
                arms,
                points,
                used,
                budget_s,
                timeout_s,
                show,
                journal=journal,
                label=label,
                spin=spin,
                layout=layout,
                time_unchanged=True,
            )
            result = gate.run()
        words = f"run {number + 1} of {runs}: {'recorded' if record else result.verdict} in {result.spent_s:.0f} s"
        flagged = [case.key for case in result.cases if case.verdict == REGRESSION]
        say(words + (f", flagged {', '.join(sorted(flagged))}" if flagged and not record else ""))
        for note in result.notes:
            say(f"  {note}")
        if record:
            continue
        at = datetime.now(UTC).isoformat(timespec="seconds")
        run = Run(
            beside,
            ratio,
            tuple(slowed),
            tuple(flagged),
            result.verdict,
            round(result.spent_s, 1),
            at,
            layout,
            in_words(rules),
        )
        append_line(journal, {"run": asdict(run)})
        done.append(run)
    return done


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal but one that a kill cut off. Raises JournalError."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    except OSError as error:
        raise JournalError(
            f"{path} cannot be read as a journal of gate pairs: {error.strerror}; give another --journal"
        ) from None
    except ValueError as error:
        raise JournalError(f"{path} is not a journal of gate pairs ({error}): give another --journal") from None


def read_runs(path: Path) -> list[Run]:
    """The live runs of a journal; raises JournalError for a file that is none."""
    try:
        found = [line["run"] for line in _lines(path) if "run" in line]
        return [Run(**run | {"slowed": tuple(run["slowed"]), "flagged": tuple(run["flagged"])}) for run in found]
    except (KeyError, TypeError) as error:
        raise JournalError(f"{path} holds a run that cannot be read: {error}") from None


def _pair_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of pairs of identical code that count; raises JournalError for what is no journal."""
    for line in _lines(path):
        try:
            if "run" in line or line.get("ratio", 1.0) != 1 or line.get("phase", "").endswith("replaced"):
                continue
            yield (
                {"beside": IDLE, "layout": BUILT, "of": "", "recorded": False, "phase": ""}
                | {"head": dict(line["head"]), "floor": dict(line["floor"])}
                | line
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise JournalError(f"{path} is not a journal of gate pairs ({why}): give another --journal") from None


def whole_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs of a journal that cover every case of identical code."""
    pairs = list(_pair_lines(path))
    suites = Counter(frozenset(pair["head"]) for pair in pairs)
    whole = max(suites, key=lambda keys: (len(keys), suites[keys]), default=frozenset())
    return [pair for pair in pairs if pair["head"].keys() == whole]


@dataclass(frozen=True)
class Recording:
    """A run on identical code in which every case has all fresh pairs of a suspect, as it was measured."""

    beside: str
    layout: str
    screened: tuple[Pair, ...]
    fresh: tuple[Pair, ...]

    def decided(self, rules: Rules, ratio: float = 1.0, slowed: str = "") -> Run:
        """What the gate decides on these pairs in their order, where head took `ratio` times as long in one case.

        The decision is that of a live run. What differs: a suspect has the blocks of a pair over all cases, which are
        fewer than those of a pair over suspects alone.
        """
        keys = list(self.screened[0].head)
        row = {"status": "ok", "reason": ""}
        loaded = {arm.name: {"digest": arm.name, "torch": ""} for arm in _ARMS}
        found = Evidence(keys, loaded, {arm: {key: dict(row) for key in keys} for arm in ("base", "head")})
        extra = {slowed: math.log(ratio)}
        found.pairs = [("screen", _of(pair, keys, extra)) for pair in self.screened[: rules.screen_pairs]]
        for pair in self.fresh[: rules.confirm_pairs]:
            undecided = found.undecided(rules)
            if not undecided:
                break
            found.pairs.append(("confirm", _of(pair, undecided, extra)))
        result = decide(_ARMS, {0: found}, rules, 0.0)
        flagged = tuple(case.key for case in result.cases if case.verdict == REGRESSION)
        return Run(
            self.beside,
            ratio,
            (slowed,) if slowed else (),
            flagged,
            result.verdict,
            layout=self.layout,
            rules=in_words(rules),
        )


_ARMS = [Arm(name, Path(name), name, sys.executable) for name in ("base", "head", "copy")]


def _of(pair: Pair, keys: Sequence[str], extra: Mapping[str, float]) -> Pair:
    return Pair(
        {key: pair.head[key] + extra.get(key, 0.0) for key in keys},
        {key: pair.floor[key] for key in keys},
        {key: pair.seconds[key] for key in keys},
        {},
    )


def recordings(path: Path, rules: Rules) -> list[Recording]:
    """The recorded runs of a journal that are long enough for `rules`; raises JournalError where there is none."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in _pair_lines(path):
        if line["recorded"]:
            runs.setdefault(line["of"], []).append(line)
    found = []
    for lines in runs.values():
        screened, fresh = (
            tuple(Pair(line["head"], line["floor"], line["seconds"], {}) for line in lines if line["phase"] == phase)
            for phase in ("screen", "confirm")
        )
        if len(screened) >= rules.screen_pairs and len(fresh) >= rules.confirm_pairs:
            found.append(Recording(lines[0]["beside"], lines[0]["layout"], screened, fresh))
    if not found:
        raise JournalError(
            f"{path} holds no recorded run of {rules.screen_pairs} screen and {rules.confirm_pairs} fresh pairs: "
            "--runs 1 --record --budget 30m adds one"
        )
    return found


def replay(recorded: Sequence[Recording], rules: Rules, ratio: float = 1.0) -> list[Run]:
    """Each recorded run decided again: as it is, or with `ratio` once for each of its cases, slowed alone.

    Pairs of different runs are never mixed, none is drawn twice, and head stays head, so what lasted a run, or leans
    to the side of head, counts in full. The trials of one run share its noise: they are not independent.
    """
    return [
        run.decided(rules, ratio, slowed)
        for run in recorded
        for slowed in (run.screened[0].head if ratio > 1 else [""])
    ]


def in_words(rules: Rules) -> str:
    """The rules in a sentence."""
    return (
        f"{rules.screen_pairs} pairs to screen, suspect beyond {rules.suspect:.1%}, {rules.confirm_pairs} fresh pairs "
        f"to confirm, {rules.look_pairs} or more where a suspect no longer looks changed, margin {rules.margin:.1%} or "
        f"the bias of the case, level {rules.alpha:.0%} a run"
    )
