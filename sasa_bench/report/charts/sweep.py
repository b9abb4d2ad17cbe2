"""The chart of a suite along a chosen axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sasa_bench.report.charts.parts import (
    FIT,
    RUN,
    Spec,
    by_impl,
    chart_of,
    log_y,
    select,
    series,
    spec_of,
    title,
    tooltip,
)
from sasa_bench.report.panels import NUMERIC, along, free_axes, places, spans_octaves, ticks
from sasa_bench.report.styles import BASELINE_COLOUR, Style
from sasa_bench.results.columns import COLUMNS, TIME, charted

QUANTITIES = charted()
"""Column -> how it is shown, of all that can stand on the upright axis."""


def sweep(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """The chart of one suite: quantity, axis and held values chosen by selectors; None where nothing is plotted.

    `rows` is the table of the suite; where it has a column `run`, runs differ by dash and implementations by colour.
    """
    ok = rows[rows["status"] == "ok"]
    quantities = [name for name in QUANTITIES if name in ok and (ok[name] > 0).any()]
    if not quantities:
        return None
    runs = list(dict.fromkeys(ok[RUN])) if RUN in ok else []
    axes = {a: c for a, c in free_axes(ok).items() if not (runs and ok.groupby(RUN)[a].nunique().max() == 1)}
    axes = axes or {"kernel_size": ()}
    names = [name for name in styles if name in set(ok["impl"])]
    data = _plotted(ok, axes, quantities, runs)
    base = chart_of(data)
    x, y, shown = _x(axes), log_y("y:Q", _tick(quantities)), tooltip(_fields(axes, quantities, bool(runs)))
    marks = [
        *([_line_at_one(base)] if "time_vs_conv3x3" in quantities else []),
        *_limits(base, x, quantities, bool(runs)),
        base.mark_rule(strokeWidth=2, opacity=0.45).encode(
            x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=by_impl(names, styles, "colour")
        ),
        *series(base, x, y, names, styles, shown, runs),
    ]
    spread = [(name, QUANTITIES[name].bounds) for name in quantities if QUANTITIES[name].bounds]
    low, high = ("".join(f"quantity == '{n}' ? datum.{s[i]} : " for n, s in spread if s) + "datum.y" for i in (0, 1))
    whole = (
        alt.Chart()
        .mark_point()
        .transform_calculate(y="+datum[quantity]", low=low, high=high, x="places[along]['' + datum[along]]")
        .transform_filter(" && ".join(["datum.y > 0", *_held(axes)]))
        .transform_filter({"param": "shown"})
        .properties(
            width="container",
            height=380,
            autosize=FIT,
            title=title(alt.ExprRef("titles[quantity] + ', by ' + names[along]")),
        )
        .add_params(*_choices(ok, axes, quantities))
    )
    return spec_of(marks, whole)


def _plotted(
    ok: pd.DataFrame, axes: Mapping[str, Sequence[str]], quantities: Sequence[str], runs: Sequence[str]
) -> pd.DataFrame:
    spread = [column for name in quantities for column in QUANTITIES[name].bounds or ()]
    data = ok[["impl", *([RUN] if runs else []), *_columns(axes), *quantities, *spread]].copy()
    for name in quantities:
        for column in (name, *(QUANTITIES[name].bounds or ())):
            data[column] = data[column].astype("float64") / QUANTITIES[name].kind.plot
        if bounds := QUANTITIES[name].bounds:  # the axis is logarithmic: 0 and infinity have no place on it
            low, high = bounds
            data.loc[~((data[low] > 0) & np.isfinite(data[high])), [low, high]] = float("nan")
    return data


def _columns(axes: Mapping[str, Sequence[str]]) -> list[str]:
    return [column for axis, coupled in axes.items() for column in (axis, *coupled)]


def _choices(ok: pd.DataFrame, axes: Mapping[str, Sequence[str]], quantities: Sequence[str]) -> list[alt.Parameter]:
    """What the selectors offer, and the tables that the expressions of the chart look up."""
    x = along(ok, list(axes))
    values_of = {axis: _values(ok, axis) for axis in axes}
    held = _held_at_first(ok, values_of, x)
    tick_at, tick_label, where, at = {}, {}, {}, []
    for axis, coupled in axes.items():
        values = values_of[axis]
        found = places(axis, values)
        if spans_octaves(axis, list(found.values())):
            found = {value: float(np.log2(number)) for value, number in found.items()}
        found = {value: round(number, 6) for value, number in found.items()}
        labels = dict(zip(ok[axis], ticks(ok, axis, coupled), strict=True))
        where[axis] = {str(value): number for value, number in found.items()}
        tick_at[axis] = list(found.values())
        tick_label[axis] = [labels[value] for value in values]
        if len(axes) > 1:
            words = [str(value) for value in values]
            at.append(select(f"at_{axis}", COLUMNS[axis].label, words, tick_label[axis], str(held[axis])))
    labels_of = {axis: " · ".join(COLUMNS[a].label for a in (axis, *coupled)) for axis, coupled in axes.items()}
    names = list(axes)
    return [
        alt.param("places", value=where),
        alt.param("tick_at", value=tick_at),
        alt.param("tick_label", value=tick_label),
        alt.param("titles", value={name: QUANTITIES[name].title for name in quantities}),
        alt.param("names", value=labels_of),
        select("quantity", "show", quantities, [QUANTITIES[name].label for name in quantities], quantities[0]),
        select("along", "along", names, list(labels_of.values()), x) if len(axes) > 1 else alt.param("along", value=x),
        *at,
    ]


def _held_at_first(ok: pd.DataFrame, values: Mapping[str, Sequence[Any]], x: str) -> dict[str, Any]:
    """The value of each axis while the chart lies along another: in the middle of a numeric one, first of the others.

    Where the suite is no full grid, values together that show the most points along `x`, as near to those as there are.
    """
    usual = {axis: own[len(own) // 2 if axis in NUMERIC else 0] for axis, own in values.items()}
    others = [axis for axis in values if axis != x]
    if not others:
        return usual
    points = ok.groupby(others, sort=False, dropna=False)[x].nunique().reset_index(name="points")
    points["usual"] = sum((points[axis] == usual[axis]).astype(int) for axis in others)
    best = points.sort_values(["points", "usual"], ascending=False, kind="stable").index[0]
    return usual | {axis: points.at[best, axis] for axis in others}


def _values(ok: pd.DataFrame, axis: str) -> list[Any]:
    found = list(dict.fromkeys(ok[axis]))
    order = places(axis, found)
    return sorted(found, key=lambda value: order[value])


def _held(axes: Mapping[str, Sequence[str]]) -> list[str]:
    if len(axes) == 1:
        return []
    return [f"(along == '{axis}' || datum.{axis} == at_{axis})" for axis in axes]


def _x(axes: Mapping[str, Sequence[str]]) -> alt.X:
    return alt.X(
        "x:Q",
        title=None,
        scale=alt.Scale(zero=False, nice=False, padding=18),
        axis=alt.Axis(
            values=alt.ExprRef("tick_at[along]"),
            labelExpr="tick_label[along][indexof(tick_at[along], datum.value)]",
            labelOverlap="parity",
            grid=False,
        ),
    )


def _tick(quantities: Sequence[str]) -> str:
    cases = [f"quantity == '{name}' ? {QUANTITIES[name].kind.tick.of('datum.value')} : " for name in quantities]
    return "".join(cases) + "datum.label"


def _fields(axes: Mapping[str, Sequence[str]], quantities: Sequence[str], runs: bool) -> dict[str, str]:
    """What the tooltip of a mark shows."""
    fields = {"title": "datum.impl"} | ({"run": f"datum.{RUN}"} if runs else {})
    fields |= {COLUMNS[column].label: f"datum.{column}" for column in _columns(axes)}
    for name in quantities:
        column = QUANTITIES[name]
        words = column.kind.tick.of(f"datum.{name}", 3)
        if column.bounds:
            low, high = (column.kind.tick.of(f"datum.{bound}", 3) for bound in column.bounds)
            before, between = ("p20 ", ", p80 ") if column.kind is TIME else ("95 %: ", " to ")
            interval = f"' ({before}' + {low} + '{between}' + {high} + ')'"
            words += f" + (isValid(datum.{column.bounds[0]}) ? {interval} : ' (no interval)')"
        fields[column.label] = f"isValid(datum.{name}) ? {words} : '–'"
    return fields


LIMITS = {
    "roofline": ("roofline_fraction", "datum.time_median_s * datum.roofline_fraction"),
    "fastest 3×3 convolution": ("time_vs_best_conv3x3", "datum.time_median_s / datum.time_vs_best_conv3x3"),
}
"""Words -> the column that tells a limit of the time, and the limit in seconds."""


def _limits(base: alt.Chart, x: alt.X, quantities: Sequence[str], runs: bool) -> Iterator[alt.Chart]:
    """Where the quantity is a time, dashed lines: the least by the roofline, and the fastest convolution.

    The roofline of a point is the lowest of its implementations. None where there are runs, of which each has its own.
    """
    for words, (column, seconds) in LIMITS.items() if not runs else ():
        if column in quantities and "time_median_s" in quantities:
            # For other quantities the marks stay, unseen: without any, their scale would have no ends.
            timed = "quantity == 'time_median_s'"
            limit = base.transform_calculate(
                limit=f"{timed} ? (isValid(datum.{column}) ? {seconds} : null) : datum.y"
            ).transform_aggregate(limit="min(limit)", groupby=["x"])
            y = alt.Y("limit:Q", title=None)
            last = limit.transform_window(rank="rank()", sort=[alt.SortField("x", order="descending")])
            line = limit.mark_line(
                strokeDash=[2, 3], strokeWidth=1.5, opacity=alt.ExprRef(f"{timed} ? 0.8 : 0"), color=BASELINE_COLOUR
            )
            name = last.transform_filter("datum.rank == 1").mark_text(
                align="right", baseline="bottom", dy=-4, fontSize=11, color=BASELINE_COLOUR
            )
            shown = alt.value(alt.ExprRef(f"{timed} ? '{words}' : ''"))
            yield line.encode(x=x, y=y)
            yield name.encode(x=x, y=y, text=shown)


def _line_at_one(base: alt.Chart) -> alt.Chart:
    """Where the quantity is a ratio to the baseline, a line at equality; placed in pixels, so it stretches no scale."""
    return (
        base.transform_filter("quantity == 'time_vs_conv3x3'")
        .transform_aggregate(count="count()")
        .mark_rule(strokeDash=[4, 4], opacity=0.6, clip=True)
        .encode(y=alt.YValue(alt.ExprRef("scale('y', 1)")))
    )
