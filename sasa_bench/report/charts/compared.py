"""Charts of two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd

from sasa_bench.case import AXES
from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.charts.parts import FIT, Spec, by_impl, chart_of, log_axis, title, toggles, tooltip, zoom
from sasa_bench.report.styles import Style
from sasa_bench.results.columns import COLUMNS, RATIO


def changes(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """The `ratio` of two runs for each row with its `low` and `high`, by implementation; None for no rows."""
    if rows.empty:
        return None
    data = _with_case(rows, ["ratio", "low", "high"])
    names = [name for name in styles if name in set(data["impl"])]
    base = chart_of(data)
    y = alt.Y("impl:N", title=None, sort=names, axis=alt.Axis(labelFontSize=13, labelLimit=130, grid=True, ticks=False))
    scale = alt.Scale(type="log", nice=False, padding=20)
    x = alt.X("ratio:Q", title=None, scale=scale, axis=alt.Axis(format="~r", grid=False))
    colour, shape = by_impl(names, styles, "colour"), by_impl(names, styles, "shape")
    fields = {"title": "datum.impl", "case": "datum.case", "ratio": "datum.ratio"}
    interval = "isValid(datum.low) && isValid(datum.high) ? datum.low + ' to ' + datum.high : 'no interval'"
    shown = tooltip(fields | {"95 %": interval})
    chart = (
        alt.layer(
            base.transform_aggregate(count="count()")
            .mark_rule(strokeDash=[4, 4], opacity=0.6, clip=True)
            .encode(x=alt.XValue(alt.ExprRef("scale('x', 1)"))),
            base.transform_filter("datum.low > 0 && datum.high > 0")
            .mark_rule(strokeWidth=2, opacity=0.3)
            .encode(x=alt.X("low:Q", title=None), x2="high:Q", y=y, color=colour),
            base.mark_point(filled=True, size=70, opacity=0.9, tooltip=shown)
            .encode(x=x, y=y, color=colour, shape=shape)
            .add_params(toggles(names), zoom("x")),
        )
        .transform_filter({"param": "shown"})
        .properties(width="container", height=34 * len(names), autosize=FIT, title=title("time over time in A, by row"))
    )
    return dict(chart.to_dict(validate=False))


def against_each_other(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """Time over the baseline's in one run against the same in another. The last two columns hold the ratios."""
    if rows.empty:
        return None
    first, second = rows.columns[-2:]
    data = _with_case(rows, [first, second]).rename(columns={first: "a", second: "b"})
    names = [name for name in styles if name in set(data["impl"])]
    both = [float(data[["a", "b"]].min().min()) / 1.2, float(data[["a", "b"]].max().max()) * 1.2]
    base = chart_of(data)
    scale = alt.Scale(type="log", nice=False, domain=both)
    x = alt.X("a:Q", title=f"in {first}", scale=scale, axis=alt.Axis(format="~r", tickCount=6, grid=False))
    y = alt.Y("b:Q", title=f"in {second}", scale=scale, axis=log_axis(RATIO.tick.of("datum.value")))
    fields = {"title": "datum.impl", "case": "datum.case", first: "datum.a + '×'", second: "datum.b + '×'"}
    shown = tooltip(fields)
    ends = alt.Chart(alt.InlineData([{"a": end, "b": end} for end in both]))
    chart = alt.layer(
        ends.mark_line(strokeDash=[4, 4], opacity=0.6, color="#7a7a85").encode(x=x, y=y),
        base.transform_filter({"param": "shown"})
        .mark_point(filled=True, size=70, opacity=0.9, tooltip=shown)
        .encode(x=x, y=y, color=by_impl(names, styles, "colour"), shape=by_impl(names, styles, "shape"))
        .add_params(toggles(names), zoom()),
    ).properties(width="container", height=380, autosize=FIT, title=title(f"time / {BASELINE} of the same machine"))
    return dict(chart.to_dict(validate=False))


def _with_case(rows: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """impl, these columns, and `case`: in words, what the suite and the axes are."""
    known = {COLUMNS[axis].label for axis in ("suite", *AXES)}
    words = [name for name in rows.columns if name in known]
    case = [", ".join(f"{n} {row[n]}" for n in words) for row in rows[words].to_dict("records")]
    return rows[[COLUMNS["impl"].label, *numbers]].rename(columns={COLUMNS["impl"].label: "impl"}).assign(case=case)
