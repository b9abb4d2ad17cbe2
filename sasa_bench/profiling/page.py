"""The page of a profile: stages, operators, stacks and memory of one implementation, or of several side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from sasa_bench.case import Case
from sasa_bench.profiling import breakdown, trace
from sasa_bench.report import page
from sasa_bench.report.charts import profile as charts
from sasa_bench.report.styles import style
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.file import replace_text
from sasa_bench.results.format import seconds, short_shapes, size
from sasa_bench.results.record import ImplInfo

ONE_OPERATOR = "one operator"
Summary = Mapping[str, Any]
"""What profile.capture returns."""


def save(folder: Path, case: Case, summaries: Sequence[Summary]) -> Path:
    """Write profile.json and index.html to `folder`, where the traces are; returns the page's path."""
    data = {"case": case.to_dict(), "impls": [dict(summary) for summary in summaries]}
    replace_text(folder / "profile.json", json.dumps(data, indent=1) + "\n")
    out = folder / "index.html"
    page.write(html(folder, case, summaries), out)
    return out


def html(folder: Path, case: Case, summaries: Sequence[Summary]) -> str:
    """The page from the traces that the summaries name, relative to `folder`. Raises TraceError."""
    infos = {s["name"]: ImplInfo.from_dict(s) for s in summaries}
    styles = style(infos, list(infos))
    traces = {s["name"]: trace.read(folder / s["trace"], s["calls"]) for s in summaries}
    stages = pd.DataFrame(stage_shares(folder, summaries))
    operators = pd.concat([_operators(s, traces[s["name"]]) for s in summaries], ignore_index=True)
    kernels = pd.DataFrame(
        [
            {"implementation": name, "kernel": k.name, "launches a call": k.count, "time, ms": _digits(k.self_s * 1e3)}
            for name, found in traces.items()
            for k in breakdown.kernels(found)
        ]
    )
    memory = pd.DataFrame(
        [
            {"impl": name, "seconds": when, "mib": used / (1 << 20)}
            for name, found in traces.items()
            for when, used in breakdown.memory(found)
        ]
    )
    return page.render(
        "profile.html",
        case=", ".join(f"{COLUMNS[axis].label} {value}" for axis, value in case.to_dict().items() if value != "none"),
        impls=[
            {
                "name": s["name"],
                "summary": s["summary"],
                "time": seconds(s["time_s"]),
                "trace": s["trace"],
                "flame": charts.flame(pd.DataFrame([asdict(box) for box in breakdown.flame(traces[s["name"]])])),
                "peak": _peak(memory, s["name"]),
            }
            for s in summaries
        ],
        calls=summaries[0]["calls"],
        stages=charts.stage_bars(stages) if len(stages) else None,
        stage_rows=_side_by_side(stages, list(infos)),
        phased=[
            {"name": s["name"], "overhead": p["timed_s"] / p["plain_s"] - 1, "plain": seconds(p["plain_s"])}
            for s in summaries
            if (p := s.get("phases"))
        ],
        unstaged=[s["name"] for s in summaries if s["name"] not in set(stages.get("impl", ()))],
        memory=charts.memory(memory, styles),
        operators=page.sortable(operators, "operators-table", ["implementation", "operator"]),
        kernels=page.sortable(kernels, "kernels-table", ["implementation"]) if len(kernels) else "",
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def stage_shares(folder: Path, summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """impl, stage, ms a call and share of each stage, from the traces that the summaries name; raises TraceError."""
    rows = []
    for about in summaries:
        if about["stages"]:
            found = breakdown.stages(trace.read(folder / about["stages"], about["calls"]))
            if about.get("phases"):
                found = with_phases(found, about["phases"])
            whole = sum(found.values())
            rows += [
                {"impl": about["name"], "stage": stage, "ms": spent * 1e3, "share": spent / whole}
                for stage, spent in found.items()
                if whole and stage in charts.STAGE_COLOURS and spent >= 0.001 * whole
            ]
    return rows


def with_phases(stages: dict[str, float], phases: Mapping[str, Any]) -> dict[str, float]:
    """Stages in seconds with the phases that the kernel itself counts in place of its one operator.

    What those leave of a call is `other`: waiting for the slowest thread, and torch's part of the call.
    """
    found = Counter({stage: spent for stage, spent in stages.items() if stage != ONE_OPERATOR})
    found.update(phases["seconds"])
    found["other"] += max(0.0, phases["timed_s"] - found.total())
    return dict(found)


def _side_by_side(stages: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    if stages.empty:
        return []
    found = {(row["stage"], row["impl"]): row for row in stages.to_dict("records")}
    present = set(stages["stage"])
    return [
        {"stage": stage, "of": [found.get((stage, name)) for name in names]}
        for stage in charts.STAGE_COLOURS
        if stage in present
    ]


def _operators(about: Summary, found: trace.Trace) -> pd.DataFrame:
    operators = breakdown.operators(found, about["flops"])
    whole = sum(operator.self_s for operator in operators) or 1.0
    return pd.DataFrame(
        [
            {
                "implementation": about["name"],
                "operator": operator.name,
                "input shapes": short_shapes(operator.shapes),
                "self, ms": _digits(operator.self_s * 1e3),
                "self, %": _digits(100 * operator.self_s / whole),
                "with inner, ms": _digits(operator.total_s * 1e3),
                "a call": _digits(operator.count),
                "allocated, MiB": _digits(operator.allocated_bytes / (1 << 20)),
                "MFLOP": _digits(operator.flops / 1e6) if operator.flops else float("nan"),
            }
            for operator in operators
        ]
    )


def _peak(memory: pd.DataFrame, name: str) -> str:
    used = [mib for impl, mib in zip(memory["impl"], memory["mib"], strict=True) if impl == name] if len(memory) else []
    return size(max(used) * (1 << 20)) if used else ""


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
