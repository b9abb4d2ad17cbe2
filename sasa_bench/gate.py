"""The gate: base and head in one job on one machine, screened, confirmed on fresh pairs, within a time budget."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sasa_bench.arms import Arm, verify
from sasa_bench.decide import (
    EQUIVALENT,
    INCONCLUSIVE,
    CaseVerdict,
    Rules,
    confirm,
    contaminated,
    detectable,
    exact_verdict,
    exit_status,
    run_verdict,
    screen,
)
from sasa_bench.pairs import Counts, Pair, Point, exact_rows, measure_pair, start
from sasa_bench.worker import Worker, WorkerDied

MOST_LOST = 3
"""Pairs that may be lost to a dying process before the gate stops guessing."""

Say = Callable[[str, int, int], None]
"""Told the phase, the pairs done in it, and how many there will be."""


@dataclass
class Result:
    """What a gate run found.

    cases     one verdict for each case and implementation, those that matter first
    arms      what each arm was made from and what it really loaded
    pairs     (phase, pair) in the order they were measured; the evidence
    """

    verdict: str
    cases: list[CaseVerdict]
    arms: dict[str, dict[str, Any]]
    contaminated: str
    notes: list[str]
    spent_s: float
    rules: Rules
    pairs: list[tuple[str, Pair]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 pass, 2 regression, 3 inconclusive or contaminated."""
        return exit_status(self.verdict)


def run(
    arms: Sequence[Arm],
    points: Sequence[Point],
    rules: Rules,
    budget_s: float,
    timeout_s: float,
    say: Say = lambda phase, done, total: None,
    journal: Path | None = None,
    condition: str = "",
    spin: Callable[[Counts], Mapping[str, float]] = lambda counts: {},
) -> Result:
    """Gate `head` against `base` on every point; `arms` are base, head and a copy of base.

    `journal` gets a line for each pair. `spin` gives, from the calibrated times, seconds to add to each call of head:
    a slow-down made on purpose. Raises ArmError for an arm that runs something else than it should.
    """
    gate = _Gate(arms, budget_s, timeout_s, say, journal, condition, spin)
    loaded = {arm.name: gate.loaded(arm) for arm in arms}
    notes = []
    if loaded["base"]["digest"] == loaded["head"]["digest"]:
        notes.append("base and head hold the same files: any difference in time is noise or comes from the environment")
    say("exact figures", 0, 2)
    base = exact_rows(arms[0], points, timeout_s)
    say("exact figures", 1, 2)
    head = exact_rows(arms[1], points, timeout_s)
    say("exact figures", 2, 2)
    decided = {p.key: exact_verdict(p.key, base.get(p.key), head.get(p.key), rules) for p in points}
    both = [p for p in points if base[p.key]["status"] == head[p.key]["status"] == "ok"]
    timed = [p for p in both if decided[p.key].verdict == EQUIVALENT]
    cases, contamination = gate.decide(timed, rules)
    for verdict in cases:
        decided[verdict.key] = verdict
    ordered = sorted(decided.values(), key=_importance)
    return Result(
        verdict=run_verdict(ordered, contamination),
        cases=ordered,
        arms={a.name: {"source": a.source, "folder": str(a.folder)} | loaded[a.name] for a in arms},
        contaminated=contamination,
        notes=notes + gate.notes,
        spent_s=time.monotonic() - gate.started,
        rules=rules,
        pairs=gate.pairs,
    )


@dataclass
class _Gate:
    arms: Sequence[Arm]
    budget_s: float
    timeout_s: float
    say: Say
    journal: Path | None
    condition: str
    spin: Callable[[Counts], Mapping[str, float]]
    started: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    lost: int = 0

    def loaded(self, arm: Arm) -> dict[str, Any]:
        worker: Worker = start(arm, self.timeout_s)
        try:
            answer: dict[str, Any] = worker.ask("loaded")
        finally:
            worker.close()
        verify(arm, answer)
        return answer

    def decide(self, timed: Sequence[Point], rules: Rules) -> tuple[list[CaseVerdict], str]:
        """Screen all, confirm the suspects; (verdicts, what contaminated the run)."""
        if not timed:
            return [], ""
        screened = self.measure("screen", timed, rules.screen_pairs)
        if len(screened) < rules.screen_pairs:
            return [CaseVerdict(p.key, INCONCLUSIVE, self.why_stopped()) for p in timed], ""
        head, floor = _columns(screened, timed)
        suspects = screen(head, rules)
        verdicts = {p.key: _unsuspected(p.key, head[p.key], screened, rules) for p in timed}
        chosen = [p for p in timed if p.key in suspects]
        if not chosen:
            return list(verdicts.values()), ""
        confirmed = self.measure("confirm", chosen, rules.confirm_pairs)
        if len(confirmed) < rules.confirm_pairs:
            for point in chosen:
                verdicts[point.key] = CaseVerdict(point.key, INCONCLUSIVE, f"suspect, and {self.why_stopped()}")
            return list(verdicts.values()), ""
        head, floor = _columns(confirmed, chosen)
        for key, verdict in confirm(head, floor, rules).items():
            seconds = sorted(pair.seconds[key] for pair in confirmed)[len(confirmed) // 2]
            verdicts[key] = CaseVerdict(**asdict(verdict) | {"seconds": seconds})
        return list(verdicts.values()), contaminated(floor, rules)

    def measure(self, phase: str, points: Sequence[Point], count: int) -> list[Pair]:
        """Up to `count` pairs; fewer where the budget ends or too many pairs are lost."""
        done: list[Pair] = []
        longest = 0.0
        self.say(phase, 0, count)
        while len(done) < count and self.lost <= MOST_LOST:
            begun = time.monotonic()
            if begun - self.started + longest > self.budget_s:
                self.notes.append(f"the time budget of {self.budget_s:g} s ended after {len(done)} {phase} pairs")
                break
            try:
                pair = measure_pair(self.arms, points, self.counts, self.timeout_s, spin=self.spin(self.counts))
            except WorkerDied as death:
                self.lost += 1
                self.notes.append(f"a {phase} pair was lost: {death}")
                continue
            longest = max(longest, time.monotonic() - begun)
            done.append(pair)
            self.pairs.append((phase, pair))
            self.write(phase, pair)
            self.say(phase, len(done), count)
        return done

    def why_stopped(self) -> str:
        if self.lost > MOST_LOST:
            return f"{self.lost} pairs were lost to a dying process"
        return f"the time budget of {self.budget_s:g} s ended first; --budget allows more"

    def write(self, phase: str, pair: Pair) -> None:
        if self.journal is None:
            return
        line = {"phase": phase, "condition": self.condition, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        figures = {"head": pair.head, "floor": pair.floor, "seconds": pair.seconds}
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | figures) + "\n")


def _columns(pairs: Sequence[Pair], points: Sequence[Point]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    head = {p.key: [pair.head[p.key] for pair in pairs] for p in points}
    floor = {p.key: [pair.floor[p.key] for pair in pairs] for p in points}
    return head, floor


def _unsuspected(key: str, ratios: Sequence[float], pairs: Sequence[Pair], rules: Rules) -> CaseVerdict:
    seen = detectable(ratios, rules.screen_pairs, math.log1p(rules.suspect))
    return CaseVerdict(
        key,
        EQUIVALENT,
        ratio=math.exp(statistics.median(ratios)),
        detectable=math.expm1(seen),
        seconds=statistics.median(pair.seconds[key] for pair in pairs),
    )


_ORDER = ("WRONG", "MISSING", "REGRESSION", "INCONCLUSIVE", "IMPROVED", "NEW", "EQUIVALENT")


def _importance(case: CaseVerdict) -> tuple[int, float]:
    return _ORDER.index(case.verdict), -(case.ratio or 0.0)
