"""The decision of the gate: from paired log ratios and exact figures to a verdict for each case and for the run.

Nothing here measures. A slow-down is flagged on fresh pairs alone, never on those that raised the suspicion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sasa_bench.gate.names import split
from sasa_bench.gate.statistics import bias, detectable, holm, location, lower_bound, p_above

REGRESSION, IMPROVED, EQUIVALENT = "REGRESSION", "IMPROVED", "EQUIVALENT"
INCONCLUSIVE, NEW, MISSING, WRONG = "INCONCLUSIVE", "NEW", "MISSING", "WRONG"
NOT_RUN = "NOT RUN"
SKIPPED = "SKIPPED"
LATE = "late"
"""Status of a case for whose exact figures there was no time."""
CONTAMINATED, PASS = "CONTAMINATED", "PASS"

FAILING = (WRONG, MISSING, REGRESSION)
"""Verdicts of a case that fail the run, the worst first."""


@dataclass(frozen=True)
class Rules:
    """When a case is suspect and when it is flagged; shares of the time of base.

    screen_pairs, confirm_pairs  fresh pairs of processes for the suspicion and for the decision
    least_pairs  fresh pairs for the decision where the time budget does not hold confirm_pairs
    look_pairs  fresh pairs after which a suspect that no longer looks changed is dropped; see needs_more_pairs
    suspect   a ratio in the screen, see location, that differs by more raises a suspicion
    margin    a slow-down must exceed it beyond doubt; the bias of the case where that is more, see bias
    tolerance the smallest slow-down that a run must be able to show: a case too noisy for it is INCONCLUSIVE
    alpha     chance that a run flags anything where nothing changed, shared by the suspects after Holm
    memory    growth of the peak of allocated bytes that is let pass
    disturbed  share of the processors that others may use during a pair before it is measured again
    allow_not_run  whether a run passes although some cases ran in neither arm
    """

    screen_pairs: int = 5
    confirm_pairs: int = 21
    least_pairs: int = 13
    look_pairs: int = 5
    suspect: float = 0.02
    margin: float = 0.015
    tolerance: float = 0.10
    alpha: float = 0.01
    memory: float = 0.01
    disturbed: float = 0.1
    allow_not_run: bool = False


@dataclass(frozen=True)
class CaseVerdict:
    """key of a case, its verdict and a reason for people.

    ratio, low, high: head over both bases, its location over pairs and the bounds that the decision used; None where
    not timed, or decided without bounds.
    margin: what `low` had to exceed. detectable: the slow-down that such noise would have let through to a suspicion.
    """

    key: str
    verdict: str
    reason: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    detectable: float | None = None
    seconds: float | None = None


def exact_verdict(
    key: str,
    base: Mapping[str, Any] | None,
    head: Mapping[str, Any] | None,
    rules: Rules,
    same_environment: bool = True,
) -> CaseVerdict:
    """The verdict on what never flakes: status, FLOPs, parameters, allocated bytes and error budgets.

    Bytes and budgets depend on torch and on ONNX Runtime, so they are compared only where both arms have the same ones
    (`same_environment`), and budgets output by output: which output comes nearest to its budget may change with every
    detail of a kernel. Another number of operators is a remark, since a faster version may well have more of
    them. EQUIVALENT means that nothing but time is left to decide.
    """
    base_status = base["status"] if base else "absent"
    head_status = head["status"] if head else "absent"
    if LATE in (base_status, head_status):
        return CaseVerdict(key, INCONCLUSIVE, (head or base or {}).get("reason", ""))
    if head_status == "wrong":
        return CaseVerdict(key, WRONG, head["reason"] if head else "")
    if head_status != "ok":
        why = f"{head_status} in head: {head.get('reason', '')}" if head else "absent in head"
        if base_status == "ok":
            return CaseVerdict(key, MISSING, why)
        return CaseVerdict(key, NOT_RUN, f"runs in neither arm; {why}")
    if base_status != "ok":
        why = f"{base_status} in base: {base.get('reason', '')}" if base else "absent in base"
        return CaseVerdict(key, NEW, why)
    assert base is not None
    assert head is not None
    grown = _more_work(base, head) + (_grown(base, head, rules) if same_environment else [])
    if grown:
        return CaseVerdict(key, REGRESSION, f"{'; '.join(grown)}; its time was not measured")
    return CaseVerdict(key, EQUIVALENT, _remark(base, head))


def skip_unsupported(
    verdicts: Mapping[str, CaseVerdict], base: Mapping[str, Mapping[str, Any]], head: Mapping[str, Mapping[str, Any]]
) -> dict[str, CaseVerdict]:
    """The verdicts, with SKIPPED instead of NOT RUN for cases that an implementation cannot compute in either arm.

    Such a case is skipped in both arms for the same reason, and its implementation ran another case in both on that
    device: it is there, and the suite crosses it with what it does not cover. A package or a device that is missing
    skips every case of an implementation there, which stays NOT RUN.
    """

    def place(key: str) -> tuple[str, str]:
        impl, axes = split(key)
        return impl, axes.get("device", "")

    ran = {place(key) for key in verdicts if all(rows.get(key, {}).get("status") == "ok" for rows in (base, head))}

    def skipped(key: str) -> bool:
        before, after = base.get(key, {}), head.get(key, {})
        same = all(before.get(name) == after.get(name) for name in ("status", "reason"))
        return same and after.get("status") == "skipped" and place(key) in ran

    return {
        key: replace(case, verdict=SKIPPED) if case.verdict == NOT_RUN and skipped(key) else case
        for key, case in verdicts.items()
    }


def _more_work(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    """FLOPs and parameters that grew: by the formulas of an arm, whatever its libraries are."""
    both = {name: (base.get(name), head.get(name)) for name in ("flops", "params")}
    return [
        f"{name} {before:,} -> {after:,}"
        for name, (before, after) in both.items()
        if before is not None and after is not None and after > before
    ]


def _grown(base: Mapping[str, Any], head: Mapping[str, Any], rules: Rules) -> list[str]:
    grown = []
    before, after = base.get("allocated_bytes"), head.get("allocated_bytes")
    if before is not None and after is not None and after > before * (1 + rules.memory):
        accepted = f" (--memory-growth {math.ceil(100 * (after / before - 1))} lets it pass)" if before else ""
        grown.append(f"allocated bytes {before:,} -> {after:,}{accepted}")
    budgets = base.get("budgets", {})
    for output, after in head.get("budgets", {}).items():
        before = budgets.get(output)
        if before is not None and after > before * (1 + 1e-6):
            grown.append(f"error budget of {output} {before:.3g} -> {after:.3g}: the check became laxer")
    return grown


def _remark(base: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    before, after = base.get("operator_count"), head.get("operator_count")
    if before is None or after is None or before == after:
        return ""
    return f"operators {before:,} -> {after:,}"


def screen(head: Mapping[str, Sequence[float]], rules: Rules) -> list[str]:
    """The keys to confirm with fresh pairs: suspect, or too noisy for the screen to show `tolerance`."""
    threshold = math.log1p(rules.suspect)
    return [
        key
        for key, ratios in head.items()
        if abs(location(ratios)) > threshold
        or detectable(ratios, rules.screen_pairs, threshold) > math.log1p(rules.tolerance)
    ]


def needs_more_pairs(ratios: Sequence[float], rules: Rules) -> bool:
    """Whether a suspect with these fresh pairs needs further ones to be decided.

    From `look_pairs` on, one is dropped whose location is within the margin, unless its scatter could hide `tolerance`.
    That can miss a slow-down but never raise an alarm: only a suspect with all of its `confirm_pairs` is flagged.
    """
    count = len(ratios)
    if not rules.look_pairs <= count < rules.confirm_pairs:
        return count < rules.confirm_pairs
    margin = math.log1p(rules.margin)
    return abs(location(ratios)) > margin or detectable(ratios, count, margin) > math.log1p(rules.tolerance)


def confirm(
    head: Mapping[str, Sequence[float]],
    floor: Mapping[str, Sequence[float]],
    rules: Rules,
    planned: Mapping[str, int] | None = None,
) -> dict[str, CaseVerdict]:
    """The verdicts on fresh pairs: log ratios of head to both bases and, for the bias, of copy to base.

    A case is flagged when the exact lower bound of its slow-down exceeds its margin, at a level that Holm shares among
    the cases: REGRESSION, or IMPROVED for the same test the other way round. The bound is exact where head over both
    bases scatters evenly about its middle; what noise that leans to one side moves, the margin has to cover. One with
    fewer pairs than were `planned`, `confirm_pairs` unless a key is in it, was dropped, see needs_more_pairs; it counts
    among the cases and is not flagged.
    """
    keys = list(head)
    needed = dict.fromkeys(keys, rules.confirm_pairs) | dict(planned or {})
    margins = {key: max(math.log1p(rules.margin), bias(floor[key])) for key in keys}
    full = {key for key in keys if len(head[key]) >= needed[key]}
    slower, faster = (
        holm([p_above([sign * x for x in head[k]], margins[k]) if k in full else 1.0 for k in keys], rules.alpha)
        for sign in (1, -1)
    )
    level = rules.alpha / max(1, len(keys))
    verdicts = {}
    for key, is_slower, is_faster in zip(keys, slower, faster, strict=True):
        ratios = head[key]
        if key not in full:
            verdicts[key] = CaseVerdict(
                key,
                EQUIVALENT,
                f"no difference beyond its margin left after {len(ratios)} fresh pairs",
                ratio=math.exp(location(ratios)),
                margin=rules.margin,
                detectable=math.expm1(detectable(ratios, len(ratios), math.log1p(rules.margin))),
            )
            continue
        low, high = lower_bound(ratios, level), -lower_bound([-x for x in ratios], level)
        seen = margins[key] + (location(ratios) - low)
        if is_slower:
            verdict, reason = REGRESSION, "slower beyond its margin on fresh pairs"
        elif is_faster:
            verdict, reason = IMPROVED, "faster beyond its margin on fresh pairs"
        elif high <= math.log1p(rules.tolerance) or seen <= math.log1p(rules.tolerance):
            verdict, reason = EQUIVALENT, "no difference beyond its margin on fresh pairs"
        else:
            verdict = INCONCLUSIVE
            reason = f"too noisy: a slow-down of {rules.tolerance:.0%} would not be certain to show"
        verdicts[key] = CaseVerdict(
            key,
            verdict,
            reason,
            ratio=math.exp(location(ratios)),
            low=math.exp(low),
            high=math.exp(high),
            margin=math.expm1(margins[key]),
            detectable=math.expm1(seen),
        )
    return verdicts


def contaminated(floor: Mapping[str, Sequence[float]], rules: Rules, nodes: Mapping[str, str] | None = None) -> str:
    """A sentence where identical code seems to differ: the machine was not fit to judge. Empty where it was.

    `nodes` names the machine of a key, where there are several.
    """
    keys = list(floor)
    margin = math.log1p(rules.margin)
    for sign, word in ((1, "slower"), (-1, "faster")):
        flags = holm([p_above([sign * x for x in floor[key]], margin) for key in keys], rules.alpha)
        for key, flag in zip(keys, flags, strict=True):
            if flag:
                ratio = math.exp(location(floor[key]))
                where = f" on {nodes[key]}" if nodes else ""
                return f"a copy of base measured {word} than base itself, {ratio:.3f} of its time, in {key}{where}"
    return ""


def run_verdict(
    cases: Sequence[CaseVerdict], contaminated: str = "", allow_not_run: bool = False, unchanged: bool = False
) -> str:
    """The verdict of the run. What is exact fails it whatever the noise; times count where the noise floor holds.

    A run that timed nothing proves nothing unless the arms are the same code (`unchanged`), and neither does one in
    which a case ran in neither arm, unless allowed.
    """
    verdicts = {case.verdict for case in cases}
    exact = [case for case in cases if case.verdict in FAILING and case.ratio is None]
    if exact:
        return REGRESSION
    if contaminated:
        return CONTAMINATED
    if verdicts & set(FAILING):
        return REGRESSION
    timed = any(case.ratio is not None for case in cases) or (unchanged and EQUIVALENT in verdicts)
    open_cases = INCONCLUSIVE in verdicts or (NOT_RUN in verdicts and not allow_not_run)
    return PASS if timed and not open_cases else INCONCLUSIVE


def exit_status(verdict: str) -> int:
    """0 pass, 2 regression, 3 inconclusive or contaminated."""
    return {PASS: 0, REGRESSION: 2}.get(verdict, 3)
