"""Sentences computed from rows; no sentence where the data does not support one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from sasa_bench.case import AXES
from sasa_bench.intervals import interval_of_median
from sasa_bench.plot import Panel, panels
from sasa_bench.record import COLUMNS, Record, Results
from sasa_bench.table import BASELINE, frame

ATTENTION = "local_attention"


@dataclass(frozen=True)
class Ratio:
    """Median time over median time, and the interval that follows from the 95 % intervals of both medians."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2g} times"

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1


def ratio(a: Record, b: Record) -> Ratio:
    """Time of `a` over time of `b`."""
    (a_low, a_high), (b_low, b_high) = interval_of_median(a.samples_s), interval_of_median(b.samples_s)
    middle = pd.Series(a.samples_s).median() / pd.Series(b.samples_s).median()
    return Ratio(float(middle), max(0.0, a_low) / b_high, a_high / b_low if b_low > 0 else float("inf"))


def findings(results: Results) -> list[str]:
    """What the rows say, most important first."""
    rows = {_key(r): r for r in results.rows if r.status == "ok"}
    table = frame(results)
    said = []
    for panel in panels(table):
        said += list(_panel_findings(panel, rows))
    return list(dict.fromkeys(said))


def _key(record: Record) -> tuple[object, ...]:
    values = record.case.to_dict() | {"resolution": str(record.case.resolution)}
    return (record.suite, record.impl, *(values[axis] for axis in AXES))


Rows = Mapping[tuple[object, ...], Record]


def _panel_findings(panel: Panel, rows: Rows) -> Iterator[str]:
    points = [_point(group, rows) for _, group in panel.data.groupby("x_place")]
    points = [point for point in points if BASELINE in point]
    if not points:
        return
    attention = sorted({n for point in points for n, r in point.items() if r.op == ATTENTION})
    where = f" ({panel.facet})" if panel.facet else ""
    middle = points[len(points) // 2]
    for name in attention:
        if name in middle:
            yield _headline(name, middle[name], middle[BASELINE])
    if len(points) > 1 and len(attention) > 1:
        yield from _fastest(panel, points, attention, where)
    for name in attention:
        yield from _crossing(panel, points, name, where)


def _point(group: pd.DataFrame, rows: Rows) -> dict[str, Record]:
    keys = zip(group["suite"], group["impl"], *(group[axis] for axis in AXES), strict=True)
    return {str(key[1]): rows[key] for key in keys}


def _headline(name: str, record: Record, baseline: Record) -> str:
    case, against = record.case, ratio(record, baseline)
    work = f" for {record.flops / baseline.flops:.2g} times its FLOPs" if record.flops and baseline.flops else ""
    return (
        f"At {case.channels} channels and {case.height}×{case.width} ({case.scope}, {case.mode}), {name} attention "
        f"with k = {case.kernel_size} takes {against} a 3×3 convolution "
        f"(95 %: {against.low:.2g} to {against.high:.2g}){work}."
    )


def _fastest(panel: Panel, points: Sequence[dict[str, Record]], attention: list[str], where: str) -> Iterator[str]:
    winners = [_winner({n: p[n] for n in attention if n in p}) for p in points]
    label = COLUMNS[panel.x].label
    spans: list[tuple[str, list[object]]] = []
    for point, winner in zip(points, winners, strict=True):
        value = getattr(point[BASELINE].case, panel.x)
        if winner is None:
            continue
        if spans and spans[-1][0] == winner:
            spans[-1][1].append(value)
        else:
            spans.append((winner, [value]))
    if spans:
        words = [f"{n} at {label} {v[0]}" + (f" to {v[-1]}" if len(v) > 1 else "") for n, v in spans]
        yield f"Fastest attention in {panel.suite}{where}: {', '.join(words)}."


def _winner(point: dict[str, Record]) -> str | None:
    """The implementation that is faster than every other beyond the uncertainty, if there is one."""
    if len(point) < 2:
        return None
    best = min(point, key=lambda name: float(pd.Series(point[name].samples_s).median()))
    if all(ratio(point[best], other).high < 1 for name, other in point.items() if name != best):
        return best
    return None


def _crossing(panel: Panel, points: Sequence[dict[str, Record]], name: str, where: str) -> Iterator[str]:
    ratios = [(getattr(p[BASELINE].case, panel.x), ratio(p[name], p[BASELINE])) for p in points if name in p]
    decided = [(value, r) for value, r in ratios if r.decided]
    label = COLUMNS[panel.x].label
    for (before, a), (after, b) in pairwise(decided):
        if (a.value < 1) != (b.value < 1):
            turn = "slower" if b.value > 1 else "faster"
            yield (
                f"In {panel.suite}{where}, {name} becomes {turn} than conv3x3 between {label} {before} and {after} "
                f"({a.value:.2g} → {b.value:.2g} times its time)."
            )
    if len(ratios) > 1 and len(decided) == len(ratios):
        values = [r.value for _, r in ratios]
        if min(values) > 1:
            yield (
                f"In {panel.suite}{where}, {name} is slower than conv3x3 at every {label}: "
                f"{min(values):.2g} to {max(values):.2g} times."
            )
        elif max(values) < 1:
            yield (
                f"In {panel.suite}{where}, {name} is faster than conv3x3 at every {label}: "
                f"{min(values):.2g} to {max(values):.2g} of its time."
            )
