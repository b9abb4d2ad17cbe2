"""The gate: base and head interleaved on one machine, screened, confirmed on fresh pairs, within a time budget.

Cases may be spread over machines, the arms of a pair never: each task measures, and one decision is made of all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sasa_bench.gate.arms import Arm, ArmError
from sasa_bench.gate.evidence import Evidence, Share, column, environment_difference, head_over_both, same_code
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
from sasa_bench.gate.profiles import Profile
from sasa_bench.gate.relink import BUILT
from sasa_bench.gate.statistics import detectable, location, lower_bound
from sasa_bench.gate.verdicts import (
    EQUIVALENT,
    INCONCLUSIVE,
    CaseVerdict,
    Rules,
    confirm,
    contaminated,
    exit_status,
    run_verdict,
    skip_unsupported,
)
from sasa_bench.results.file import append_line
from sasa_bench.timing.process import WorkerDied

MOST_LOST = 3
"""Pairs that may be lost to a dying process before the gate stops guessing."""

MOST_REPLACED = 10
"""Pairs of a run that are measured again because others used the processors; after so many the neighbour stays."""

Say = Callable[[str, int, int], None]
"""Told the phase, the pairs done in it, and how many there will be."""


@dataclass
class Result:
    """What a gate run found.

    cases     one verdict for each case and implementation, those that matter first
    arms      what each arm was made from and what it really loaded
    pairs     (phase, pair) in the order they were measured; the evidence
    shares    who measured what, where the cases were spread over machines
    profiles  of the flagged cases, base against head
    """

    verdict: str
    cases: list[CaseVerdict]
    arms: dict[str, dict[str, Any]]
    contaminated: str
    notes: list[str]
    spent_s: float
    rules: Rules
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 pass, 2 regression, 3 inconclusive or contaminated."""
        return exit_status(self.verdict)

    @property
    def nodes(self) -> dict[str, str]:
        """key -> the node that measured it; empty where the cases were not spread."""
        return {key: share.node for share in self.shares for key in share.keys}


@dataclass
class Gate:
    """A gate of `head` against `base` on every point; `arms` are base, head and a copy of base.

    journal  gets a line for each pair, with what is in `label`
    spin     slows head on purpose
    layout   how native code of the arms is linked, one of relink.LAYOUTS
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

    def run(self) -> Result:
        """Measure, then decide. Raises ArmError for an arm that runs something else than it should."""
        found = self.measure()
        return decide(self.arms, {0: found}, self.rules, found.spent_s)

    def measure(self) -> Evidence:
        """Exact figures, the screen, and fresh pairs over its suspects; raises as run."""
        beside = self.arms[0].folder.parent
        with laid_out(self.layout, beside) as layout:
            return _Measurement(self, layout).whole()


def decide(
    arms: Sequence[Arm],
    evidence: Mapping[int, Evidence],
    rules: Rules,
    spent_s: float,
    lost: Mapping[str, str] | None = None,
) -> Result:
    """One verdict on the evidence of every task, by number: Holm shares the level among the suspects of them all.

    `lost` gives the reason for each key of which there is no evidence. Raises ArmError where an arm was not the same
    code in all tasks.
    """
    decided = {key: CaseVerdict(key, INCONCLUSIVE, reason) for key, reason in (lost or {}).items()}
    head: dict[str, list[float]] = {}
    floor: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    remarks: dict[str, str] = {}
    for part in evidence.values():
        exact = part.exact_verdicts(rules)
        decided |= exact
        remarks |= {key: verdict.reason for key, verdict in exact.items() if verdict.verdict == EQUIVALENT}
        screened, fresh = part.phase("screen"), part.phase("confirm")
        timed, suspects = part.timed(rules), part.suspects(rules)
        if len(screened) < rules.screen_pairs:
            decided |= {key: _provisional(key, screened, part.stopped, rules) for key in timed}
            continue
        for key, ratios in head_over_both(screened, timed).items():
            decided[key] = _unsuspected(key, ratios, screened, rules, decided[key].reason)
        undecided = part.undecided(rules)
        decided |= {
            key: _provisional(key, fresh or screened, f"suspect, and {part.stopped}", rules) for key in undecided
        }
        closed = [key for key in suspects if key not in undecided]
        head |= head_over_both(fresh, closed)
        floor |= column("floor", fresh, closed)
        seconds |= {key: statistics.median(own) for key, own in column("seconds", fresh, closed).items()}
    shares = [Share(n, p.node, p.machine, tuple(p.keys), p.spent_s) for n, p in evidence.items() if p.node]
    nodes = {key: share.node for share in shares for key in share.keys}
    for key, verdict in confirm(head, floor, rules).items():
        remark = remarks.get(key, "")
        reason = f"{verdict.reason}; {remark}" if remark else verdict.reason
        decided[key] = replace(verdict, seconds=seconds[key], reason=reason)
    rows = {
        arm: {k: row for part in evidence.values() for k, row in part.exact[arm].items()} for arm in ("base", "head")
    }
    decided = skip_unsupported(decided, rows["base"], rows["head"])
    contamination = contaminated(floor, rules, nodes)
    ordered = sorted(decided.values(), key=_importance)
    loaded = _loaded(arms, evidence)
    notes = [f"{part.node}: {note}" if part.node else note for part in evidence.values() for note in part.notes]
    if evidence and same_code(loaded["base"], loaded["head"]):
        notes.insert(0, "base and head run the same files in the same environment: any difference in time is noise")
    notes += [f"environment: {change}" for change in environment_difference(loaded["base"], loaded["head"])]
    return Result(
        verdict=run_verdict(ordered, contamination, rules.allow_not_run),
        cases=ordered,
        arms={a.name: {"source": a.source, "folder": str(a.folder)} | loaded[a.name] for a in arms},
        contaminated=contamination,
        notes=notes,
        spent_s=spent_s,
        rules=rules,
        pairs=[pair for part in evidence.values() for pair in part.pairs],
        shares=shares,
    )


def _loaded(arms: Sequence[Arm], evidence: Mapping[int, Evidence]) -> dict[str, dict[str, Any]]:
    unknown = {"digest": "unknown", "torch": "unknown"}
    found = {arm.name: unknown | {"python": arm.python} for arm in arms}
    for number, part in enumerate(evidence.values()):
        for name, loaded in part.loaded.items():
            first = found[name] if number else loaded
            for what in ("digest", "torch"):
                if loaded[what] != first[what]:
                    raise ArmError(
                        f"the {name} arm was not the same in all tasks: {what} {loaded[what]} on {part.node}, "
                        f"{first[what]} elsewhere; do all nodes see the same folder and environment?"
                    )
            found[name] = first
    return found


@dataclass
class _Measurement:
    gate: Gate
    layout: Layout
    started: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    lost: int = 0
    replaced: int = 0

    def whole(self) -> Evidence:
        gate, rules = self.gate, self.gate.rules
        found = self.exact()
        found.pairs, found.notes = self.pairs, self.notes
        phases = (("screen", found.timed, rules.screen_pairs), ("confirm", found.undecided, rules.confirm_pairs))
        for phase, open_keys, count in phases:

            def chosen(open_keys: Callable[[Rules], list[str]] = open_keys) -> list[Point]:
                keys = set(open_keys(rules))
                return [point for point in gate.points if point.key in keys]

            if not self.phase(phase, chosen, count):
                found.stopped = self.why_stopped()
                break
        if self.replaced:
            self.notes.append(f"{self.replaced} pairs were measured again because others used the processors")
        if said := self.layout.note():
            self.notes.append(said)
        found.spent_s = time.monotonic() - self.started
        return found

    def exact(self) -> Evidence:
        gate, arms = self.gate, self.gate.arms
        gate.say("exact figures", 0, 2)
        with ThreadPoolExecutor() as pool:  # nothing is timed yet
            impls = [point.impl for point in gate.points]
            surveys = list(pool.map(lambda arm: survey(arm, impls, gate.timeout_s), arms))
            require_known([unknown for _, unknown in surveys[:2]])
            loaded = {arm.name: found for arm, (found, _) in zip(arms, surveys, strict=True)}
            rows = pool.map(lambda arm: exact_rows(arm, gate.points, gate.timeout_s, self.layout), arms[:2])
            exact = dict(zip(("base", "head"), rows, strict=True))
        gate.say("exact figures", 2, 2)
        return Evidence([point.key for point in gate.points], loaded, exact)

    def phase(self, phase: str, chosen: Callable[[], Sequence[Point]], count: int) -> bool:
        """Up to `count` pairs of what is chosen before each; False where the budget ended or too many were lost."""
        gate, done, longest = self.gate, 0, 0.0
        while done < count and (points := chosen()):
            gate.say(phase, done, count)
            begun = time.monotonic()
            if self.lost > MOST_LOST:
                return False
            if begun - self.started + longest > gate.budget_s:
                self.notes.append(f"the time budget of {gate.budget_s:g} s ended after {done} {phase} pairs")
                return False
            try:
                pair = measure_pair(gate.arms, points, self.counts, gate.timeout_s, spin=gate.spin, layout=self.layout)
            except WorkerDied as death:
                self.lost += 1
                self.notes.append(f"a {phase} pair was lost: {death}")
                continue
            longest = max(longest, time.monotonic() - begun)
            pair = replace(pair, at_s=begun - self.started)
            # Whether a pair counts is decided without a look at its times.
            if pair.disturbed > gate.rules.disturbed and self.replaced < MOST_REPLACED:
                self.replaced += 1
                self.write(f"{phase}, replaced", pair)
                continue
            done += 1
            self.pairs.append((phase, pair))
            self.write(phase, pair)
            gate.say(phase, done, count)
        return True

    def why_stopped(self) -> str:
        if self.lost > MOST_LOST:
            return f"{self.lost} pairs were lost because a process died"
        return f"the time budget of {self.gate.budget_s:g} s ended first; --budget allows more"

    def write(self, phase: str, pair: Pair) -> None:
        journal = self.gate.journal
        if journal is None:
            return
        line = {"phase": phase, "at": datetime.now(UTC).isoformat(timespec="seconds")} | dict(self.gate.label)
        figures = {"head": pair.head, "floor": pair.floor, "seconds": pair.seconds, "disturbed": pair.disturbed}
        append_line(journal, line | figures)


def _unsuspected(key: str, ratios: Sequence[float], pairs: Sequence[Pair], rules: Rules, remark: str) -> CaseVerdict:
    seen = detectable(ratios, rules.screen_pairs, math.log1p(rules.suspect))
    return CaseVerdict(
        key,
        EQUIVALENT,
        remark,
        ratio=math.exp(location(ratios)),
        detectable=math.expm1(seen),
        seconds=statistics.median(pair.seconds[key] for pair in pairs),
    )


def _provisional(key: str, pairs: Sequence[Pair], reason: str, rules: Rules) -> CaseVerdict:
    """What the pairs said so far of a case that the run did not come to decide: no evidence, but a place to look."""
    ratios = head_over_both(pairs, [key])[key]
    if not ratios:
        return CaseVerdict(key, INCONCLUSIVE, reason)
    low, high = lower_bound(ratios, rules.alpha), -lower_bound([-x for x in ratios], rules.alpha)
    bounds = (math.exp(low), math.exp(high)) if math.isfinite(low) and math.isfinite(high) else (None, None)
    return CaseVerdict(
        key,
        INCONCLUSIVE,
        f"{reason}; so far, over {len(ratios)} pairs",
        ratio=math.exp(location(ratios)),
        low=bounds[0],
        high=bounds[1],
        seconds=statistics.median(pair.seconds[key] for pair in pairs if key in pair.seconds),
    )


_ORDER = ("NOT RUN", "WRONG", "MISSING", "REGRESSION", "INCONCLUSIVE", "IMPROVED", "NEW", "SKIPPED", "EQUIVALENT")


def _importance(case: CaseVerdict) -> tuple[int, float]:
    return _ORDER.index(case.verdict), -(case.ratio or 0.0)
