"""The page of traces from anywhere: operators, stacks, memory, threads, and two traces side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from sasa_bench.profiling import breakdown, compared
from sasa_bench.profiling.bounds import Roof, best_rates, bound, flops_per_s
from sasa_bench.profiling.breakdown import Operator
from sasa_bench.profiling.events import TraceError
from sasa_bench.profiling.trace import ANNOTATION, Trace, read
from sasa_bench.report import page
from sasa_bench.report.charts import profile as charts
from sasa_bench.report.page import Section
from sasa_bench.report.styles import COLOURS, MARKERS, Style
from sasa_bench.results.columns import BYTES, MIB, RATE, TIME, WORK
from sasa_bench.results.format import seconds, short_shapes, si, size

MOST_BARS = 15
"""How many of the largest changes are drawn."""


@dataclass(frozen=True)
class Opened:
    """One trace with the name it has on the page."""

    name: str
    trace: Trace

    @cached_property
    def operators(self) -> list[Operator]:
        """Of the whole trace."""
        return breakdown.operators(self.trace)

    @cached_property
    def roof(self) -> Roof | None:
        """The best rates in the trace."""
        return best_rates(self.operators)

    @cached_property
    def spent_s(self) -> float:
        """Self time of all operators: what they take together, on all threads."""
        return sum(operator.self_s for operator in self.operators)


def open_traces(paths: Sequence[Path]) -> list[Opened]:
    """Read traces. The names are those of the files, with as much of their folders as tells them apart."""
    return [Opened(name, read(path)) for name, path in zip(_names(paths), paths, strict=True)]


def html(traces: Sequence[Opened], against: Opened | None = None) -> str:
    """The page; with `against`, the first of `traces` is set beside it, each divided by its number of steps.

    Raises TraceError where one of these two has marked its steps and the other has not.
    """
    if against:
        steps = {opened.name: len(opened.trace.steps) for opened in (against, traces[0])}
        if min(steps.values()) == 0 < max(steps.values()):
            words = " and ".join(f"{name} {count or 'no'} steps" for name, count in steps.items())
            raise TraceError(f"{words}: a step cannot be compared with a whole trace; record both with profiler.step()")
        traces = [_per_step(against), _per_step(traces[0])]
    made = [make(traces) for make in ([_compared] if against else []) + SECTIONS]
    return page.render(
        "trace.html",
        title=" and ".join(opened.name for opened in traces),
        sentences=_compared_sentences(traces) if against else [_said(opened) for opened in traces],
        cut_off=[opened.name for opened in traces if opened.trace.cut_off],
        sections=[section for section in made if section],
        chart_script=page.chart_script(),
        table_script=page.table_script(),
    )


def _per_step(opened: Opened) -> Opened:
    return replace(opened, trace=replace(opened.trace, calls=max(1, len(opened.trace.steps))))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _said(opened: Opened) -> str:
    """What a trace shows, in a sentence."""
    found, working = opened.operators, breakdown.threads(opened.trace)
    if not found or not opened.spent_s:
        launched = breakdown.kernels(opened.trace)
        return f"{opened.name} holds no operators" + (f" and {len(launched)} kinds of kernels." if launched else ".")
    by_name: dict[str, float] = {}
    for operator in found:
        by_name[operator.name] = by_name.get(operator.name, 0.0) + operator.self_s
    name, spent = max(by_name.items(), key=lambda item: item[1])
    steps = f" in {len(opened.trace.steps)} steps" if len(opened.trace.steps) else ""
    share = 100 * spent / opened.spent_s
    shapes = " of all shapes" if sum(operator.name == name for operator in found) > 1 else ""
    said = f"{opened.name}: operators take {seconds(opened.spent_s)}{steps}, {share:.0f} % of it in `{name}`{shapes}"
    cpu, gpu = ([thread for thread in working if thread.gpu == kind] for kind in (False, True))
    if cpu:
        many = f"the busiest of {len(cpu)} threads" if len(cpu) > 1 else "its one thread"
        said += f"; {many} {_idle(cpu[0], 'operator')}"
    if gpu:
        stream = f"the busiest of {len(gpu)} streams of GPUs" if len(gpu) > 1 else "the one stream of the GPU"
        said += f"; {stream} {_idle(gpu[0], 'kernel')}"
    return said + "."


def _idle(thread: breakdown.Thread, what: str) -> str:
    whole = thread.busy_s + thread.idle_s
    share = 100 * thread.idle_s / whole if whole else 0.0
    return f"runs no {what} for {share:.0f} % of the time" if share >= 0.5 else f"runs {what}s all the time"


def _compared_sentences(traces: Sequence[Opened]) -> list[str]:
    first, second = traces
    return compared.sentences(compared.match(first.operators, second.operators), first.name, second.name)


def _compared(traces: Sequence[Opened]) -> Section:
    """What changed most, operator by operator."""
    first, second = traces
    matches = compared.match(first.operators, second.operators)
    unit, in_s = TIME.cell
    rows = pd.DataFrame(
        [
            {
                "operator": m.name,
                f"{first.name}, {unit}": _digits(m.before_s / in_s) if m.before else float("nan"),
                f"{second.name}, {unit}": _digits(m.after_s / in_s) if m.after else float("nan"),
                f"growth, {unit}": _digits(m.growth_s / in_s),
                "ratio": _digits(m.after_s / m.before_s) if m.before and m.before_s and m.after else float("nan"),
                "runs before": _digits(m.before.count) if m.before else float("nan"),
                "runs after": _digits(m.after.count) if m.after else float("nan"),
                "input shapes": short_shapes(m.shapes),
            }
            for m in matches
        ]
    )
    changed = pd.DataFrame(
        [
            {
                "what": f"{m.name} {m.shapes}".strip(),
                "ms": m.growth_s * 1e3,
                "turn": float(i),
            }
            for i, m in enumerate(matches[:MOST_BARS])
        ]
    )
    steps = [len(opened.trace.steps) for opened in traces]
    return page.section(
        "compared",
        "What changed",
        "Changes",
        chart=charts.growth(changed) if len(changed) else None,
        table=page.sortable(rows, "compared-table", ["operator"], wrapped=["operator"]) if len(rows) else "",
        steps=steps if any(steps) else [],
    )


def _operators(traces: Sequence[Opened]) -> Section:
    """Every operator with its shapes, rates and bound."""
    rows = [_row(opened, operator, len(traces) > 1) for opened in traces for operator in opened.operators]
    table = _known(rows) if rows else pd.DataFrame()
    words = [
        f"{opened.name}: {si(roof.flops_per_s, 'FLOP/s')} and {size(roof.bytes_per_s)}/s"
        for opened in traces
        if (roof := opened.roof)
    ]
    return page.section(
        "trace-operators",
        "Operators",
        "Operators",
        table=_sortable(table, "operators-table", "trace", "operator", "bound by") if rows else "",
        roofs=words,
    )


def _row(opened: Opened, operator: Operator, several: bool) -> dict[str, object]:
    unit, in_s = TIME.cell
    rate = flops_per_s(operator)
    return ({"trace": opened.name} if several else {}) | {
        "operator": operator.name,
        f"self, {unit}": _digits(operator.self_s / in_s),
        "self, %": _digits(100 * operator.self_s / (opened.spent_s or 1.0)),
        f"with inner, {unit}": _digits(operator.total_s / in_s),
        f"GPU, {unit}": _scaled(operator.gpu_s, in_s),
        "runs": _digits(operator.count),
        f"allocated, {BYTES.cell[0]}": _scaled(operator.allocated_bytes, MIB),
        WORK.cell[0]: _scaled(operator.flops, WORK.cell[1]),
        RATE.cell[0]: _scaled(rate, RATE.cell[1]),
        "bound by": bound(operator, opened.roof),
        "input shapes": short_shapes(operator.shapes),
    }


def _annotations(traces: Sequence[Opened]) -> Section | None:
    """Ranges that the program itself marked."""
    unit, in_s = TIME.cell
    rows = [
        ({"trace": opened.name} if len(traces) > 1 else {})
        | {
            "annotation": found.name,
            f"time, {unit}": _digits(found.total_s / in_s),
            f"outside operators, {unit}": _digits(found.self_s / in_s),
            "runs": _digits(found.count),
        }
        for opened in traces
        for found in breakdown.operators(opened.trace, kind=ANNOTATION)
    ]
    if not rows:
        return None
    table = _sortable(pd.DataFrame(rows), "annotations-table", "trace")
    return page.section("annotations", "Annotations", "Annotations", table=table)


def _kernels(traces: Sequence[Opened]) -> Section | None:
    """What ran on the GPU."""
    unit, in_s = TIME.cell
    rows = [
        ({"trace": opened.name} if len(traces) > 1 else {})
        | {"kernel": kernel.name, f"time, {unit}": _digits(kernel.self_s / in_s), "launches": _digits(kernel.count)}
        for opened in traces
        for kernel in breakdown.kernels(opened.trace)
    ]
    if not rows:
        return None
    table = _sortable(pd.DataFrame(rows), "kernels-table", "trace")
    return page.section("kernels", "GPU kernels", "Kernels", table=table)


def _stacks(traces: Sequence[Opened]) -> Section:
    """A flame graph for each trace."""
    boxes = {opened.name: pd.DataFrame([asdict(box) for box in breakdown.flame(opened.trace)]) for opened in traces}
    graphs = [{"name": name, "chart": charts.flame(found)} for name, found in boxes.items()]
    return page.section("stacks", "Stacks", "Stacks", graphs=graphs)


def _memory(traces: Sequence[Opened]) -> Section:
    """Bytes in use over time."""
    rows = pd.DataFrame(
        [
            {"impl": opened.name, "seconds": when, "mib": used / MIB}
            for opened in traces
            for when, used in breakdown.memory(opened.trace)
        ]
    )
    looks = {
        opened.name: Style(COLOURS[i % len(COLOURS)], *MARKERS[i % len(MARKERS)], ()) for i, opened in enumerate(traces)
    }
    peaks = {str(name): size(found.max() * MIB) for name, found in rows.groupby("impl")["mib"]} if len(rows) else {}
    stepped = any(len(opened.trace.steps) for opened in traces)
    return page.section(
        "trace-memory", "Memory", "Memory", chart=charts.memory(rows, looks), peaks=peaks, stepped=stepped
    )


def _threads(traces: Sequence[Opened]) -> Section:
    """Threads, streams and their longest pauses."""
    unit, in_s = TIME.cell
    rows, pauses = [], []
    for opened in traces:
        name = {"trace": opened.name} if len(traces) > 1 else {}
        rows += [
            name
            | {
                "thread": thread.name,
                "outermost operators or kernels": thread.count,
                f"busy, {unit}": _digits(thread.busy_s / in_s),
                f"idle, {unit}": _digits(thread.idle_s / in_s),
                "idle, %": _digits(100 * thread.idle_s / (thread.busy_s + thread.idle_s)),
            }
            for thread in breakdown.threads(opened.trace)
            if thread.busy_s + thread.idle_s
        ]
        pauses += [
            name
            | {
                "thread": gap.thread,
                f"at, {unit}": _digits(gap.start_s / in_s),
                f"pause, {unit}": _digits(gap.length_s / in_s),
                "after": gap.before,
                "before": gap.after,
            }
            for gap in breakdown.gaps(opened.trace)
        ]
    return page.section("threads", "Threads and idle time", "Threads", threads=rows, gaps=pauses)


SECTIONS: list[Callable[[Sequence[Opened]], Section | None]] = [
    _operators,
    _annotations,
    _kernels,
    _stacks,
    _memory,
    _threads,
]


def _known(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """The rows without columns that are empty in all of them."""
    table = pd.DataFrame(rows)
    return table[[name for name in table if (table[name].notna() & (table[name] != "")).any()]]


def _sortable(table: pd.DataFrame, identity: str, *words: str) -> str:
    """The table, filtered by value in those of the columns `words` that it has; names of what ran are wrapped."""
    wrapped = [name for name in ("operator", "annotation", "kernel", "input shapes") if name in table]
    return page.sortable(table, identity, [name for name in words if name in table], wrapped=wrapped)


def _scaled(value: float | None, unit: float) -> float:
    return _digits(value / unit) if value else float("nan")


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
