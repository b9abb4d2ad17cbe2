"""From the evidence of every task to one verdict on each case and on the run; nothing here measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sasa_bench.gate.arms import Arm
from sasa_bench.gate.evidence import Evidence, Share, column, environment_difference, head_over_both, same_code
from sasa_bench.gate.pairs import Pair
from sasa_bench.gate.profiles import Profile
from sasa_bench.gate.sources import ArmError
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

UNCHANGED = "base and head run the same files in the same environment"


@dataclass
class Result:
    """What a gate run found.

    cases     one verdict for each case and implementation, those that matter first
    arms      what each arm was made from and what it really loaded
    pairs     (phase, pair) in the order they were measured; the evidence
    shares    who measured what, where the cases were spread over machines
    profiles  of the flagged cases, base against head
    unchanged whether base and head are the same code, so that nothing was timed
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
    unchanged: bool = False

    @property
    def exit_status(self) -> int:
        """0 pass, 2 regression, 3 inconclusive or contaminated."""
        return exit_status(self.verdict)

    @property
    def nodes(self) -> dict[str, str]:
        """key -> the node that measured it; empty where the cases were not spread."""
        return {key: share.node for share in self.shares for key in share.keys}


def files(arm: Mapping[str, Any]) -> str:
    """The digests that tell an arm from another: of the folders of its kernel files if any, else of its sasa-bench."""
    kernels = [f"around {file} {kernel['digest']}" for file, kernel in arm.get("kernels", {}).items()]
    return ", ".join(kernels) or str(arm["digest"])


def state(arm: Mapping[str, Any]) -> str:
    """Which state of its source an arm was made from, in words; "" where the source says it, or nothing does."""
    if arm.get("uncommitted"):
        return "with changes that are in no commit"
    commit = arm.get("commit", "")[:10]
    return "" if not commit or str(arm["source"]).startswith(commit) else f"at {commit}"


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
    planned: dict[str, int] = {}
    for part in evidence.values():
        exact = part.exact_verdicts(rules)
        decided |= exact
        remarks |= {key: verdict.reason for key, verdict in exact.items() if verdict.verdict == EQUIVALENT}
        if part.unchanged:
            decided |= {key: CaseVerdict(key, EQUIVALENT, UNCHANGED) for key in part.timed(rules)}
            continue
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
        planned |= dict.fromkeys(closed, part.affordable(rules).confirm_pairs)
        head |= head_over_both(fresh, closed)
        floor |= column("floor", fresh, closed)
        seconds |= {key: statistics.median(own) for key, own in column("seconds", fresh, closed).items()}
    shares = [Share(n, p.node, p.machine, tuple(p.keys), p.spent_s) for n, p in evidence.items() if p.node]
    nodes = {key: share.node for share in shares for key in share.keys}
    for key, verdict in confirm(head, floor, rules, planned).items():
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
    unchanged = bool(evidence) and all(part.unchanged for part in evidence.values())
    if not unchanged and evidence and same_code(loaded["base"], loaded["head"]):
        notes.insert(0, f"{UNCHANGED}: any difference in time is noise")
    notes += [f"environment: {change}" for change in environment_difference(loaded["base"], loaded["head"])]
    return Result(
        verdict=run_verdict(ordered, contamination, rules.allow_not_run, unchanged),
        cases=ordered,
        arms={
            a.name: {"source": a.source, "uncommitted": a.uncommitted, "folder": str(a.folder)} | loaded[a.name]
            for a in arms
        },
        contaminated=contamination,
        notes=notes,
        spent_s=spent_s,
        rules=rules,
        pairs=[pair for part in evidence.values() for pair in part.pairs],
        shares=shares,
        unchanged=unchanged,
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
                        f"{first[what]} elsewhere; give all nodes the same folder and environment"
                    )
            found[name] = first
    return found


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
