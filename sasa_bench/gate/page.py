"""The page of a gate run: the verdict, what to look at, the evidence of each case, and profiles of base and head."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sasa_bench.gate.decision import Result, files, state
from sasa_bench.gate.evidence import head_over_both
from sasa_bench.gate.names import shared_axes, short_names
from sasa_bench.gate.profiles import Profile
from sasa_bench.gate.statistics import BIAS_FACTOR
from sasa_bench.gate.verdicts import EQUIVALENT, FAILING, INCONCLUSIVE, NOT_RUN, CaseVerdict
from sasa_bench.report import page
from sasa_bench.report.charts import gate as charts
from sasa_bench.report.charts import profile as profile_charts
from sasa_bench.report.page import Section
from sasa_bench.results.format import seconds

MOST_BARS, MOST_OPERATORS = 12, 12
"""Operators of a profile that are drawn, and listed."""
MOST_ALIKE = 3
"""Untimed cases of one verdict and reason that get a line each."""


def html(result: Result, meaning: str, rows: Sequence[dict[str, str]], nodes: Sequence[str]) -> str:
    """One page that opens offline. `rows`: a line for each case, as in the other outputs; `nodes`: who measured."""
    names = short_names([case.key for case in result.cases])
    arms = {name: arm | {"files": files(arm), "state": state(arm)} for name, arm in result.arms.items()}
    made = [
        _overview(result, names),
        _pairs(result, names),
        _profiles(result, names),
        page.section("gate-cases", "Every case", "Every case", table=_table(rows), shared=shared_axes(list(names))),
        page.section("gate-arms", "What each arm was", "Arms", arms=arms, nodes=nodes),
        page.section("gate-method", "How the gate decides", "Method", rules=result.rules, bias_factor=BIAS_FACTOR),
    ]
    return page.render(
        "gate.html",
        result=result,
        meaning=meaning,
        spent=spent(result.spent_s),
        arms=arms,
        tiles=_tiles(result),
        looks=_looks(result, names),
        sections=[section for section in made if section],
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def spent(whole_s: float) -> str:
    """How long a run took, in words."""
    return f"{whole_s:.0f} s" if whole_s < 100 else f"{whole_s / 60:.1f} minutes"


def _tiles(result: Result) -> list[dict[str, str]]:
    counts = Counter(case.verdict for case in result.cases)
    failing = sum(counts[verdict] for verdict in FAILING)
    slower = [case.ratio for case in result.cases if case.verdict in FAILING and case.ratio is not None]
    noisy = [case.detectable for case in result.cases if case.detectable is not None and case.verdict == EQUIVALENT]
    return [
        _tile(
            "slower or worse",
            str(failing),
            f"the slowest by {max(slower) - 1:.1%}" if slower else f"of {len(result.cases)} cases",
        ),
        _tile("faster", str(counts["IMPROVED"]), "beyond their margin"),
        _tile("undecided", str(counts[INCONCLUSIVE] + counts[NOT_RUN]), "INCONCLUSIVE or NOT RUN"),
        _tile("equivalent", str(counts[EQUIVALENT]), f"{max(noisy):.1%} would have shown" if noisy else ""),
        _tile("cases", str(len(result.cases)), f"in {spent(result.spent_s)}"),
    ]


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _looks(result: Result, names: dict[str, str]) -> list[dict[str, str]]:
    """A line for each case that is not equivalent; untimed ones that share verdict and reason are one line."""
    shared: dict[tuple[str, str], list[CaseVerdict]] = {}
    for case in result.cases:
        if case.verdict != EQUIVALENT and case.ratio is None:
            shared.setdefault((case.verdict, case.reason), []).append(case)
    found = []
    for case in result.cases:
        alike = shared.get((case.verdict, case.reason), []) if case.ratio is None else []
        if case.verdict == EQUIVALENT or (len(alike) > MOST_ALIKE and case is not alike[0]):
            continue
        look = _look(case, names[case.key])
        if len(alike) > MOST_ALIKE:
            look["more"] = f"and {len(alike) - 1} more, listed below"
        found.append(look)
    return found


def _look(case: CaseVerdict, name: str) -> dict[str, str]:
    kind = {"IMPROVED": "good", INCONCLUSIVE: "plain", "NEW": "plain", "SKIPPED": "plain"}.get(case.verdict, "bad")
    change = "" if case.ratio is None else f"{case.ratio - 1:+.1%}"
    bounds = "" if case.low is None or case.high is None else f"{case.low - 1:+.1%} to {case.high - 1:+.1%}"
    base = seconds(case.seconds) if case.seconds else ""
    return {
        "kind": kind,
        "verdict": case.verdict,
        "name": name,
        "more": "",
        "change": change,
        "bounds": bounds,
        "base": base,
        "reason": case.reason,
    }


def _overview(result: Result, names: dict[str, str]) -> Section | None:
    timed = sorted((case for case in result.cases if case.ratio is not None), key=lambda case: -(case.ratio or 0.0))
    if not timed:
        return None
    rows = pd.DataFrame(
        [
            {
                "case": names[case.key],
                "verdict": case.verdict if case.verdict in charts.COLOURS else INCONCLUSIVE,
                "ratio": case.ratio,
                "low": case.low or case.ratio,
                "high": case.high or case.ratio,
                "bounds": f"{case.low:.3f} to {case.high:.3f}" if case.low and case.high else "",
            }
            for case in timed
        ]
    )
    return page.section("gate-overview", "Head over base, case by case", "Cases", chart=charts.overview(rows))


def _pairs(result: Result, names: dict[str, str]) -> Section | None:
    """The evidence of each case that was confirmed: its pairs, the bounds, its blocks over time."""
    confirmed = {key for phase, pair in result.pairs if phase == "confirm" for key in pair.head}
    figures = [_figure(result, case, names[case.key]) for case in result.cases if case.key in confirmed]
    if not figures:
        return None
    return page.section("gate-pairs", "Pairs of the suspects", "Pairs", figures=figures)


def _figure(result: Result, case: CaseVerdict, name: str) -> dict[str, Any]:
    marks: list[dict[str, Any]] = []
    medians: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    of_phase = {charts.SCREEN: "screen", charts.FRESH: "confirm"}
    for kind, phase in of_phase.items():
        pairs = [pair for at, pair in result.pairs if at == phase and case.key in pair.head]
        decided = head_over_both(pairs, [case.key])[case.key]
        for number, (pair, log) in enumerate(zip(pairs, decided, strict=True), 1):
            place = {"kind": kind, "pair": float(number)}
            marks.append(place | {"ratio": math.exp(log)})
            if phase == "confirm":
                marks.append({"kind": charts.COPY, "pair": float(number), "ratio": math.exp(pair.floor[case.key])})
            minute = pair.at_s / 60 if pair.at_s else float(len(medians))
            medians.append(place | {"minute": minute, "ratio": math.exp(pair.head[case.key])})
            own = pair.blocks.get(case.key, [])
            step = 0.05 / max(1, len(own))  # of a minute: what a pair takes, about
            blocks += [
                place | {"minute": minute + step * turn, "ratio": math.exp(value)} for turn, value in enumerate(own)
            ]
    frames = [pd.DataFrame(rows) for rows in (marks, blocks or medians, medians)]
    return {
        "name": name,
        "verdict": case.verdict,
        "reason": case.reason,
        "paired": charts.paired(frames[0], case.low, case.high, case.margin),
        "time": charts.over_time(frames[1], frames[2]),
    }


def _profiles(result: Result, names: dict[str, str]) -> Section | None:
    if not result.profiles:
        return None
    shown = [_profile(one, names.get(one.key, one.key)) for one in result.profiles]
    return page.section("gate-profiles", "Where the time goes: base against head", "Profiles", profiles=shown)


def _profile(one: Profile, name: str) -> dict[str, Any]:
    changed = pd.DataFrame(
        [
            {"what": f"{m.name} {m.shapes}".strip(), "ms": m.growth_s * 1e3, "turn": float(i)}
            for i, m in enumerate(one.matches[:MOST_BARS])
        ]
    )
    stages = pd.DataFrame(one.stages)
    operators = [
        {
            "name": m.name,
            "shapes": m.shapes,
            "base": f"{m.before_s * 1e3:.3g}" if m.before else "–",
            "head": f"{m.after_s * 1e3:.3g}" if m.after else "–",
            "growth": f"{m.growth_s * 1e3:+.3g}",
        }
        for m in one.matches[:MOST_OPERATORS]
    ]
    times = one.times_s or {}
    return {
        "name": name,
        "reason": one.reason,
        "said": list(one.said),
        "times": {arm: seconds(spent) for arm, spent in times.items()},
        "stages": profile_charts.stage_bars(stages) if len(stages) else None,
        "growth": profile_charts.growth(changed) if len(changed) else None,
        "operators": operators,
        "more": max(0, len(one.matches) - MOST_OPERATORS),
        "traces": {arm: str(path) for arm, path in (one.traces or {}).items()},
    }


def _table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    shown = pd.DataFrame(rows)
    return page.sortable(shown, "cases-table", [name for name in ("verdict", "node") if name in shown], length=100)
