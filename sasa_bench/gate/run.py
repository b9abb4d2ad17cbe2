"""The gate: base and head interleaved on one machine, screened, confirmed on fresh pairs, within a time budget.

Cases may be spread over machines, the arms of a pair never: each task measures, and one decision is made of all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sasa_bench.gate.arms import Arm
from sasa_bench.gate.decision import Result, decide
from sasa_bench.gate.evidence import Evidence, same_code
from sasa_bench.gate.layout import Layout, laid_out
from sasa_bench.gate.pairs import (
    Counts,
    Pair,
    Point,
    Spin,
    exact_rows,
    measure_pair,
    no_slow_down,
    require_known,
    survey,
)
from sasa_bench.gate.relink import BUILT
from sasa_bench.gate.verdicts import Rules
from sasa_bench.results.file import append_line
from sasa_bench.timing.process import WorkerDied, WorkerRefused

MOST_LOST = 3
"""Pairs that may be lost to a dying process before the run stops."""

REPLACED = 0.15
"""Share of the budget that may go into measuring pairs again because others used the processors. A neighbour that is
still there then stays."""

TRIED, SAFE = 2, 0.9
"""Fresh pairs after which their number is planned, and the share of what is left of the budget that they may fill."""

Say = Callable[[str, int, int], None]
"""Told the phase, the pairs done in it, and how many there will be."""


@dataclass
class Gate:
    """A gate of `head` against `base` on every point; `arms` are base, head and a copy of base.

    journal  gets a line for each pair, with what is in `label`
    spin     slows head on purpose
    layout   how native code of the arms is linked, one of relink.LAYOUTS
    time_unchanged  also time arms that run the same files in the same environment, as a measurement of the gate does
    """

    arms: Sequence[Arm]
    points: Sequence[Point]
    rules: Rules
    budget_s: float
    timeout_s: float
    say: Say = lambda phase, done, total: None
    journal: Path | None = None
    label: Mapping[str, Any] = field(default_factory=dict)
    spin: Spin = no_slow_down
    layout: str = BUILT
    time_unchanged: bool = False

    def run(self) -> Result:
        """Measure, then decide. Raises ArmError for an arm that runs something else than it should."""
        found = self.measure()
        return decide(self.arms, {0: found}, self.rules, found.spent_s)

    def measure(self) -> Evidence:
        """Exact figures, the screen, and fresh pairs over its suspects; exact figures alone where base and head are the
        same code. Raises as run."""
        beside = self.arms[0].folder.parent
        with laid_out(self.layout, beside) as layout:
            return _Measurement(self, layout).whole()


@dataclass
class _Measurement:
    gate: Gate
    layout: Layout
    started: float = 0.0
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    lost: int = 0
    replaced: int = 0
    replaced_s: float = 0.0

    def whole(self) -> Evidence:
        self.started = time.monotonic()
        found = self.exact()
        found.pairs, found.notes = self.pairs, self.notes
        found.unchanged = same_code(found.loaded["base"], found.loaded["head"]) and not self.gate.time_unchanged
        if not found.unchanged:
            self.time_pairs(found)
        found.spent_s = time.monotonic() - self.started
        return found

    def time_pairs(self, found: Evidence) -> None:
        """The screen and fresh pairs over its suspects; what disturbed them is noted."""
        rules = self.gate.rules
        screened = self.phase("screen", lambda: self.points(found.timed(rules)), lambda done: rules.screen_pairs)
        if not (screened and self.phase("confirm", lambda: self.points(found.undecided(rules)), self.planner(found))):
            found.stopped = self.why_stopped()
        if self.replaced:
            self.notes.append(f"{self.replaced} pairs were measured again because others used the processors")
        if self.pairs and (others := statistics.median(pair.disturbed for _, pair in self.pairs)) > rules.disturbed:
            self.notes.append(
                f"others used {others:.0%} of the processors in the median pair: arms that wait for a core hide a part "
                "of what became slower; run it on a quiet machine, or with fewer threads (-c threads=1)"
            )
        if said := self.layout.note():
            self.notes.append(said)

    def exact(self) -> Evidence:
        gate, arms = self.gate, self.gate.arms
        gate.say("exact figures", 0, 2)
        with ThreadPoolExecutor() as pool:  # nothing is timed yet
            impls = [point.impl for point in gate.points]
            surveys = list(pool.map(lambda arm: survey(arm, impls, gate.timeout_s), arms))
            require_known([unknown for _, unknown in surveys[:2]])
            loaded = {arm.name: found for arm, (found, _) in zip(arms, surveys, strict=True)}
        exact = exact_rows(arms[:2], gate.points, gate.timeout_s, self.layout, self.started + gate.budget_s)
        gate.say("exact figures", 2, 2)
        return Evidence([point.key for point in gate.points], loaded, exact)

    def points(self, keys: Collection[str]) -> list[Point]:
        """Those of these keys, in the order they were given."""
        return [point for point in self.gate.points if point.key in keys]

    def planner(self, found: Evidence) -> Callable[[int], int]:
        """What says how many fresh pairs there will be, when so many are done.

        As many as the rules ask for; where the rest of the budget does not hold those, by the time that the first took,
        fewer. How the pairs come out plays no part, so the level of the test is what it says.
        """
        rules, begun = self.gate.rules, time.monotonic()

        def count(done: int) -> int:
            if done == TRIED and not found.planned:
                now = time.monotonic()
                left_s = self.gate.budget_s - (now - self.started)
                pair_s = (now - begun) / done
                if (rules.confirm_pairs - done) * pair_s > SAFE * left_s:
                    found.planned = max(rules.least_pairs, done + int(SAFE * left_s / pair_s))
                    self.notes.append(
                        f"the time budget of {self.gate.budget_s:g} s holds {found.planned} fresh pairs instead of "
                        f"{rules.confirm_pairs}, so smaller slow-downs may not show; --budget allows more"
                    )
            return found.planned or rules.confirm_pairs

        return count

    def phase(self, phase: str, chosen: Callable[[], Sequence[Point]], planned: Callable[[int], int]) -> bool:
        """Pairs of what is chosen before each, as many as planned; False where the budget ended or too many were lost.

        `planned` is asked before each pair, with how many are done.
        """
        gate, done, longest = self.gate, 0, 0.0
        while done < (count := planned(done)) and (points := chosen()):
            gate.say(phase, done, count)
            begun = time.monotonic()
            if self.lost > MOST_LOST:
                return False
            if begun - self.started + longest > gate.budget_s:
                self.notes.append(f"the time budget of {gate.budget_s:g} s ended after {done} {phase} pairs")
                return False
            try:
                pair = measure_pair(gate.arms, points, self.counts, gate.timeout_s, spin=gate.spin, layout=self.layout)
            except (WorkerDied, WorkerRefused) as death:
                self.lost += 1
                self.notes.append(f"a {phase} pair was lost: {death}")
                continue
            took = time.monotonic() - begun
            longest = max(longest, took)
            pair = replace(pair, at_s=begun - self.started)
            # Whether a pair counts is decided without a look at its ratios.
            if pair.disturbed > gate.rules.disturbed and self.replaced_s + took <= REPLACED * gate.budget_s:
                self.replaced += 1
                self.replaced_s += took
                self.write(f"{phase}, replaced", pair)
                continue
            done += 1
            self.pairs.append((phase, pair))
            self.write(phase, pair)
            gate.say(phase, done, count)
        return True

    def why_stopped(self) -> str:
        if self.lost > MOST_LOST:
            return f"{self.lost} pairs were lost because a process died or a case failed in it"
        return f"the time budget of {self.gate.budget_s:g} s ended first; --budget allows more"

    def write(self, phase: str, pair: Pair) -> None:
        journal = self.gate.journal
        if journal is None:
            return
        line = {"phase": phase, "at": datetime.now(UTC).isoformat(timespec="seconds")} | dict(self.gate.label)
        figures = {"head": pair.head, "floor": pair.floor, "seconds": pair.seconds, "disturbed": pair.disturbed}
        append_line(journal, line | figures)
