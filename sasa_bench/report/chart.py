"""Interactive charts as Vega-Lite specifications: a suite along a chosen axis, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from sasa_bench.case import AXES
from sasa_bench.report.figures import DASHES, NUMERIC, Style, along, free_axes, places, spans_octaves, ticks
from sasa_bench.report.table import BASELINE, varying_axes
from sasa_bench.results.columns import COLUMNS, charted
from sasa_bench.results.record import Roof

Spec = dict[str, Any]
QUANTITIES = charted()
"""Column -> how it is shown, of all that can stand on the upright axis."""

RUN = "run"
"""The column that tells results files apart where several are compared."""


FIT = alt.AutoSizeParams(type="fit-x", contains="padding", resize=True)


def sweep(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """The chart of one suite: quantity, axis and held values chosen by selectors; None where nothing is plotted.

    `rows` is the table of the suite; where it has a column `run`, runs differ by dash and implementations by colour.
    """
    ok = rows[rows["status"] == "ok"]
    quantities = [name for name in QUANTITIES if (ok[name] > 0).any()]
    if not quantities:
        return None
    runs = list(dict.fromkeys(ok[RUN])) if RUN in ok else []
    axes = {a: c for a, c in free_axes(ok).items() if not (runs and ok.groupby(RUN)[a].nunique().max() == 1)}
    axes = axes or {"kernel_size": ()}
    names = [name for name in styles if name in set(ok["impl"])]
    data = _plotted(ok, axes, quantities, runs)
    base = alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
    x, colour, shape, dash = (
        _x(axes),
        _by_impl(names, styles, "colour"),
        _by_impl(names, styles, "shape"),
        _dash(names, styles, runs),
    )
    y = alt.Y(
        "y:Q",
        title=None,
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=_log_axis(_tick(quantities)),
    )
    run = [f"{RUN}:N"] if runs else []
    marks = alt.layer(
        *([_line_at_one(base)] if "time_vs_conv3x3" in quantities else []),
        base.mark_rule(strokeWidth=2, opacity=0.45).encode(
            x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=colour
        ),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash, detail=run),
        base.mark_point(
            filled=True, size=75, opacity=1, tooltip=alt.ExprRef(_tooltip(list(axes), axes, quantities, run))
        )
        .encode(x=x, y=y, color=colour, shape=shape, detail=run)
        .add_params(_toggles(names), _zoom()),
    )
    spread = [(name, QUANTITIES[name].bounds) for name in quantities if QUANTITIES[name].bounds]
    low, high = ("".join(f"quantity == '{n}' ? datum.{s[i]} : " for n, s in spread if s) + "datum.y" for i in (0, 1))
    chart = (
        marks.transform_calculate(y="+datum[quantity]", low=low, high=high, x="places[along]['' + datum[along]]")
        .transform_filter(" && ".join(["datum.y > 0", *_held(axes)]))
        .transform_filter({"param": "shown"})
        .properties(
            width="container",
            height=380,
            autosize=FIT,
            title=_title(alt.ExprRef("titles[quantity] + ', by ' + names[along]")),
        )
        .add_params(*_choices(ok, axes, quantities))
    )
    return dict(chart.to_dict())


def _plotted(
    ok: pd.DataFrame, axes: Mapping[str, Sequence[str]], quantities: Sequence[str], runs: Sequence[str]
) -> pd.DataFrame:
    spread = [column for name in quantities for column in QUANTITIES[name].bounds or ()]
    data = ok[["impl", *([RUN] if runs else []), *_columns(axes), *quantities, *spread]].copy()
    for name in quantities:
        for column in (name, *(QUANTITIES[name].bounds or ())):
            data[column] = data[column].astype("float64") / QUANTITIES[name].kind.plot
    return data


def _columns(axes: Mapping[str, Sequence[str]]) -> list[str]:
    return [column for axis, coupled in axes.items() for column in (axis, *coupled)]


def _csv(data: pd.DataFrame) -> alt.CsvDataFormat:
    numbers = {str(name): "number" for name in data if pd.api.types.is_float_dtype(data[name])}
    return alt.CsvDataFormat(type="csv", parse=numbers | {str(n): "string" for n in data if n not in numbers})


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
            at.append(_select(f"at_{axis}", COLUMNS[axis].label, words, tick_label[axis], str(held[axis])))
    labels_of = {axis: " · ".join(COLUMNS[a].label for a in (axis, *coupled)) for axis, coupled in axes.items()}
    names = list(axes)
    return [
        alt.param("places", value=where),
        alt.param("tick_at", value=tick_at),
        alt.param("tick_label", value=tick_label),
        alt.param("titles", value={name: QUANTITIES[name].title for name in quantities}),
        alt.param("names", value=labels_of),
        _select("quantity", "show", quantities, [COLUMNS[name].label for name in quantities], quantities[0]),
        _select("along", "along", names, list(labels_of.values()), x) if len(axes) > 1 else alt.param("along", value=x),
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


def _select(name: str, label: str, values: Sequence[str], labels: Sequence[str], value: str) -> alt.Parameter:
    menu = alt.binding_select(options=list(values), labels=list(labels), name=f"{label} ")
    return alt.param(name, value=value, bind=menu)


def _held(axes: Mapping[str, Sequence[str]]) -> list[str]:
    if len(axes) == 1:
        return []
    return [f"(along == '{axis}' || datum.{axis} == at_{axis})" for axis in axes]


def _toggles(names: Sequence[str]) -> alt.Parameter:
    """A click on a name in the legend hides or shows it."""
    return alt.selection_point(
        name="shown",
        fields=["impl"],
        bind="legend",
        toggle="true",
        clear=False,
        empty=False,
        value=[{"impl": name} for name in names],
    )


def _zoom(*encodings: Literal["x", "y"]) -> alt.Parameter:
    """Shift and wheel zoom, dragging with a mouse moves: a finger or a plain wheel still scrolls the page."""
    return alt.selection_interval(
        name="zoom",
        bind="scales",
        encodings=list(encodings or ("x", "y")),
        zoom="wheel![event.shiftKey]",
        translate="[mousedown, window:mouseup] > window:mousemove!",
    )


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


def _by_impl(names: Sequence[str], styles: Mapping[str, Style], look: str) -> alt.Color | alt.Shape:
    scale = alt.Scale(domain=list(names), range=[getattr(styles[name], look) for name in names])
    kind = alt.Color if look == "colour" else alt.Shape
    return kind("impl:N", title=None, scale=scale, legend=_legend())


def _dash(names: Sequence[str], styles: Mapping[str, Style], runs: Sequence[str]) -> alt.StrokeDash:
    if runs:
        dashes = [list(DASHES[i % len(DASHES)]) or [1, 0] for i in range(len(runs))]
        legend = alt.Legend(orient="top", symbolSize=600, labelLimit=600, direction="vertical")
        return alt.StrokeDash(f"{RUN}:N", title=None, scale=alt.Scale(domain=list(runs), range=dashes), legend=legend)
    dashes = [list(styles[name].dash) or [1, 0] for name in names]
    return alt.StrokeDash("impl:N", title=None, scale=alt.Scale(domain=list(names), range=dashes), legend=_legend())


def _legend() -> alt.Legend:
    return alt.Legend(
        orient="bottom",
        columns=alt.ExprRef("max(2, floor(containerSize()[0] / 150))"),
        symbolSize=90,
        symbolOpacity=1,
        labelFontSize=13,
        labelLimit=140,
        rowPadding=6,
        offset=10,
    )


def _title(text: Any) -> alt.Title:
    return alt.Title(text, anchor="start", fontWeight="normal", fontSize=13, offset=10)


MANTISSA = "round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))"


def _log_axis(label: str) -> alt.Axis:
    """Labels at 1, 2 and 5 of each decade, a strong line at 1."""
    return alt.Axis(
        labelExpr=f"indexof([1, 2, 5], {MANTISSA}) >= 0 ? {label} : ''",
        labelOverlap=True,
        gridOpacity={"condition": {"test": f"{MANTISSA} == 1", "value": 0.9}, "value": 0.25},
        ticks=False,
        labelPadding=6,
        domain=False,
    )


def _tick(quantities: Sequence[str]) -> str:
    cases = [f"quantity == '{name}' ? {QUANTITIES[name].tick('datum.value')} : " for name in quantities]
    return "".join(cases) + "datum.label"


def _tooltip(names: Sequence[str], axes: Mapping[str, Sequence[str]], quantities: Sequence[str], run: list[str]) -> str:
    fields = {"title": "datum.impl"} | ({"run": f"datum.{RUN}"} if run else {})
    fields |= {COLUMNS[column].label: f"datum.{column}" for column in _columns(axes)}
    for name in quantities:
        words = QUANTITIES[name].tick(f"datum.{name}", 3)
        if spread := QUANTITIES[name].bounds:
            words += "".join(
                f" + '{mark}' + {QUANTITIES[name].tick(f'datum.{column}', 3)}"
                for mark, column in zip((" (p20 ", ", p80 "), spread, strict=True)
            )
            words += " + ')'"
        fields[COLUMNS[name].label] = f"isValid(datum.{name}) ? {words} : '–'"
    return "{" + ", ".join(f"'{label}': {words}" for label, words in fields.items()) + "}"


def _line_at_one(base: alt.Chart) -> alt.Chart:
    """Where the quantity is a ratio to the baseline, a line at equality; placed in pixels, so it stretches no scale."""
    return (
        base.transform_filter("quantity == 'time_vs_conv3x3'")
        .transform_aggregate(count="count()")
        .mark_rule(strokeDash=[4, 4], opacity=0.6, clip=True)
        .encode(y=alt.YValue(alt.ExprRef("scale('y', 1)")))
    )


def roofline(rows: pd.DataFrame, roofs: Sequence[Roof], styles: Mapping[str, Style], most: int = 400) -> Spec | None:
    """FLOP/s against FLOPs per byte for a chosen case under the measured peak and bandwidth; None without a roof.

    Offers `most` cases at most, spread evenly over the table.
    """
    ok = rows[(rows["status"] == "ok") & rows["roofline_fraction"].notna()]
    if ok.empty or not roofs:
        return None
    axes = varying_axes(ok)
    cases = _joined(ok, axes, ", ") if axes else pd.Series("the case", index=ok.index)
    known = list(dict.fromkeys(cases))
    known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).astype(int))]
    ok, cases = ok[cases.isin(known)], cases[cases.isin(known)]
    which = _joined(ok, ["device", "dtype", "threads"], "/")
    data = pd.DataFrame(
        {
            "impl": ok["impl"],
            "case": cases,
            "intensity": ok["flops"].astype("float64") / ok["min_bytes"].astype("float64"),
            "flops_per_s": ok["flops_per_s"],
            "fraction": ok["roofline_fraction"],
            "time": ok["time_median_s"],
        }
    ).drop_duplicates(["impl", "case"], keep="last")
    least, largest = data["intensity"].min() / 2, data["intensity"].max() * 2
    lines = pd.DataFrame([point for roof in roofs for point in _roof_line(roof, least, largest)])
    lines = lines.drop_duplicates(["roof", "place"], keep="last")
    names = [name for name in styles if name in set(data["impl"])]
    first = known[len(known) // 2]
    roof_of = dict(zip(cases, which, strict=True))
    x = alt.X(
        "intensity:Q",
        title="useful FLOPs per byte of least traffic",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~r", tickCount=6, grid=False),
    )
    y = alt.Y(
        "flops_per_s:Q",
        title=None,
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=_log_axis("format(datum.value, '~s') + 'FLOP/s'"),
    )
    roof = alt.Chart(alt.InlineData(lines.to_csv(index=False), format=_csv(lines))).transform_filter(
        "datum.roof == roof_of[chosen]"
    )
    colour, shape = _by_impl(names, styles, "colour"), _by_impl(names, styles, "shape")
    tooltip = (
        "{'title': datum.impl, 'FLOP/s': format(datum.flops_per_s, '.3s'), 'of roofline': "
        "format(datum.fraction, '.3~%'), 'time': format(datum.time, '.3s') + 's', "
        "'FLOPs per byte': format(datum.intensity, '.3r')}"
    )
    points = (
        alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
        .transform_filter("datum.case == chosen")
        .transform_filter({"param": "shown"})
    )
    chart = (
        alt.layer(
            roof.mark_line(strokeWidth=2, opacity=0.8).encode(x=x, y=y, detail="roof:N"),
            roof.transform_filter("datum.words")
            .mark_text(align="right", baseline="top", dx=-4, dy=7, fontSize=12)
            .encode(x=x, y=y, text="words:N"),
            points.mark_point(filled=True, size=120, opacity=1, tooltip=alt.ExprRef(tooltip))
            .encode(x=x, y=y, color=colour, shape=shape)
            .add_params(_toggles(names), _zoom()),
            points.mark_text(align="left", dx=10, fontSize=12).encode(x=x, y=y, text="impl:N"),
        )
        .properties(width="container", height=360, autosize=FIT, title=_title("useful FLOP/s under the measured roof"))
        .add_params(
            alt.param("roof_of", value=roof_of),
            _select("chosen", " · ".join(COLUMNS[a].label for a in axes) or "case", known, known, first),
        )
    )
    return dict(chart.to_dict())


def changes(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """The `ratio` of two runs for each row with its `low` and `high`, by implementation; None for no rows."""
    if rows.empty:
        return None
    data = _with_case(rows, ["ratio", "low", "high"])
    names = [name for name in styles if name in set(data["impl"])]
    base = alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
    y = alt.Y("impl:N", title=None, sort=names, axis=alt.Axis(labelFontSize=13, labelLimit=130, grid=True, ticks=False))
    scale = alt.Scale(type="log", nice=False, padding=20)
    x = alt.X("ratio:Q", title=None, scale=scale, axis=alt.Axis(format="~r", grid=False))
    colour, shape = _by_impl(names, styles, "colour"), _by_impl(names, styles, "shape")
    tooltip = "{'title': datum.impl, 'case': datum.case, 'ratio': datum.ratio, '95 %': datum.low + ' to ' + datum.high}"
    chart = (
        alt.layer(
            base.transform_aggregate(count="count()")
            .mark_rule(strokeDash=[4, 4], opacity=0.6, clip=True)
            .encode(x=alt.XValue(alt.ExprRef("scale('x', 1)"))),
            base.transform_filter("datum.low > 0 && datum.high > 0")
            .mark_rule(strokeWidth=2, opacity=0.3)
            .encode(x=alt.X("low:Q", title=None), x2="high:Q", y=y, color=colour),
            base.mark_point(filled=True, size=70, opacity=0.9, tooltip=alt.ExprRef(tooltip))
            .encode(x=x, y=y, color=colour, shape=shape)
            .add_params(_toggles(names), _zoom("x")),
        )
        .transform_filter({"param": "shown"})
        .properties(
            width="container", height=34 * len(names), autosize=FIT, title=_title("time over time in A, by row")
        )
    )
    return dict(chart.to_dict())


def against_each_other(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """Time over the baseline's in one run against the same in another. The last two columns hold the ratios."""
    if rows.empty:
        return None
    first, second = rows.columns[-2:]
    data = _with_case(rows, [first, second]).rename(columns={first: "a", second: "b"})
    names = [name for name in styles if name in set(data["impl"])]
    both = [float(data[["a", "b"]].min().min()) / 1.2, float(data[["a", "b"]].max().max()) * 1.2]
    base = alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
    scale = alt.Scale(type="log", nice=False, domain=both)
    x = alt.X("a:Q", title=f"in {first}", scale=scale, axis=alt.Axis(format="~r", tickCount=6, grid=False))
    y = alt.Y("b:Q", title=f"in {second}", scale=scale, axis=_log_axis("format(datum.value, '~r') + '×'"))
    tooltip = f"{{'title': datum.impl, 'case': datum.case, '{first}': datum.a + '×', '{second}': datum.b + '×'}}"
    ends = alt.Chart(alt.InlineData([{"a": end, "b": end} for end in both]))
    chart = alt.layer(
        ends.mark_line(strokeDash=[4, 4], opacity=0.6, color="#7a7a85").encode(x=x, y=y),
        base.transform_filter({"param": "shown"})
        .mark_point(filled=True, size=70, opacity=0.9, tooltip=alt.ExprRef(tooltip))
        .encode(x=x, y=y, color=_by_impl(names, styles, "colour"), shape=_by_impl(names, styles, "shape"))
        .add_params(_toggles(names), _zoom()),
    ).properties(
        width="container", height=380, autosize=FIT, title=_title(f"time over that of {BASELINE} on the same machine")
    )
    return dict(chart.to_dict())


def levels(points: pd.DataFrame, spans: pd.DataFrame, quantity: str, look: Style) -> Spec:
    """One series over runs with the levels between its changes.

    points: place, commit, started_at, value, low, high. spans: first, last (places), level, words at its start.
    """
    base = alt.Chart(alt.InlineData(points.to_csv(index=False, float_format="%.5g"), format=_csv(points)))
    bars = alt.Chart(alt.InlineData(spans.to_csv(index=False, float_format="%.5g"), format=_csv(spans)))
    x = _turns("place:Q", points)
    scale = alt.Scale(zero=False, nice=False, padding=14)
    words = _HISTORY_TICKS[quantity == "time"]
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(labelExpr=words.replace("value", "datum.value")))
    tooltip = (
        "{'title': datum.commit, 'measured': datum.started_at, 'value': "
        + words.replace("value", "datum.value")
        + ", '95 %': isValid(datum.low) ? "
        + words.replace("value", "datum.low")
        + " + ' to ' + "
        + words.replace("value", "datum.high")
        + " : 'too few samples'}"
    )
    chart = (
        alt.layer(
            bars.transform_filter("datum.words")
            .mark_rule(strokeDash=[4, 4], opacity=0.7, color="#7a7a85")
            .encode(x=alt.X("first:Q", title=None)),
            bars.mark_rule(strokeWidth=7, opacity=0.25, color=look.colour).encode(
                x=alt.X("first:Q", title=None), x2="last:Q", y=alt.Y("level:Q", title=None)
            ),
            base.transform_filter("isValid(datum.low) && isValid(datum.high)")
            .mark_rule(strokeWidth=2, opacity=0.45, color=look.colour)
            .encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q"),
            base.mark_point(
                filled=True, size=70, opacity=1, color=look.colour, shape=look.shape, tooltip=alt.ExprRef(tooltip)
            )
            .encode(x=x, y=y)
            .add_params(_zoom()),
            bars.transform_filter("datum.words")
            .mark_text(align="left", baseline="top", dx=5, fontSize=12)
            .encode(x=alt.X("first:Q", title=None), y=alt.YValue(4), text="words:N"),
        )
        .properties(width="container", height=240, autosize=FIT, title=_title(f"{quantity}, over runs"))
        .add_params(alt.param("commits", value=list(points["commit"])))
    )
    return dict(chart.to_dict())


def over_runs(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec:
    """Every series of a suite over the runs of one machine, for a chosen case and quantity.

    Columns: impl, case, quantity, place (turn of the run), commit, started_at, value, low, high.
    """
    data = rows[["impl", "case", "quantity", "place", "commit", "started_at", "value"]]
    names = [name for name in styles if name in set(data["impl"])]
    cases, quantities = list(dict.fromkeys(data["case"])), sorted(set(data["quantity"]), reverse=True)
    base = alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
    x = _turns("place:Q", data)
    write = f"quantity == 'time' ? {_HISTORY_TICKS[True]} : {_HISTORY_TICKS[False]}"
    y = alt.Y(
        "value:Q",
        title=None,
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=_log_axis("(" + write.replace("value", "datum.value") + ")"),
    )
    tooltip = (
        "{'title': datum.impl, 'commit': datum.commit, 'measured': datum.started_at, 'value': "
        + write.replace("value", "datum.value")
        + "}"
    )
    colour = _by_impl(names, styles, "colour")
    commits = data.drop_duplicates("place").set_index("place")["commit"]
    labels = [commits.get(float(i), "") for i in range(int(data["place"].max()) + 1)]
    chart = (
        alt.layer(
            base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=_dash(names, styles, ())),
            base.mark_point(filled=True, size=60, opacity=1, tooltip=alt.ExprRef(tooltip))
            .encode(x=x, y=y, color=colour, shape=_by_impl(names, styles, "shape"))
            .add_params(_toggles(names), _zoom()),
        )
        .transform_filter("datum.case == chosen && datum.quantity == quantity")
        .transform_filter({"param": "shown"})
        .properties(width="container", height=320, autosize=FIT, title=_title(alt.ExprRef("quantity + ', over runs'")))
        .add_params(
            alt.param("commits", value=labels),
            _select("quantity", "show", quantities, quantities, quantities[0]),
            _select("chosen", "case", cases, cases, cases[0]),
        )
    )
    return dict(chart.to_dict())


_HISTORY_TICKS = ("format(value, '.3~r') + '×'", "format(value, '.3~s') + 's'")


def _turns(field: str, data: pd.DataFrame) -> alt.X:
    """Runs in order along the bottom; the parameter `commits` holds their labels."""
    places = sorted(set(data["place"]))
    return alt.X(
        field,
        title=None,
        scale=alt.Scale(zero=False, nice=False, padding=18),
        axis=alt.Axis(
            values=places,
            labelExpr="substring(commits[datum.value], 0, 7)",
            labelOverlap="parity",
            labelAngle=-40,
            grid=False,
        ),
    )


STAGE_COLOURS = {
    "project": "#0072b2",
    "pad": "#e69f00",
    "position": "#cc79a7",
    "logits": "#009e73",
    "softmax": "#7d5fd3",
    "aggregate": "#d55e00",
    "one operator": "#56b4e9",
    "convolution": "#8f7a00",
    "other": "#7a7a85",
}


def stage_bars(rows: pd.DataFrame) -> Spec:
    """Milliseconds by stage, a bar for each implementation. Columns: impl, stage, ms, share (of the bar)."""
    order = [stage for stage in STAGE_COLOURS if stage in set(rows["stage"])]
    names = list(dict.fromkeys(rows["impl"]))
    data = rows.assign(order=[float(order.index(stage)) for stage in rows["stage"]])
    tooltip = (
        "{'title': datum.stage, 'implementation': datum.impl, 'time': format(datum.ms, '.3~r') + ' ms', "
        "'share': format(datum.share, '.0%')}"
    )
    chart = (
        alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.5g"), format=_csv(data)))
        .mark_bar(height=30, tooltip=alt.ExprRef(tooltip))
        .encode(
            x=alt.X("ms:Q", title="ms a call", stack="zero", axis=alt.Axis(tickCount=6)),
            y=alt.Y("impl:N", title=None, sort=names, axis=alt.Axis(labelFontSize=13, labelLimit=130, ticks=False)),
            color=alt.Color(
                "stage:N",
                title=None,
                scale=alt.Scale(domain=order, range=[STAGE_COLOURS[stage] for stage in order]),
                legend=_legend(),
            ),
            order=alt.Order("order:Q"),
        )
        .properties(width="container", height=46 * len(names), autosize=FIT)
    )
    return dict(chart.to_dict())


def flame(boxes: pd.DataFrame) -> Spec | None:
    """Stacks as boxes, callers above callees. Columns: name, kind, depth, start_s, length_s; None for no rows."""
    if boxes.empty:
        return None
    data = boxes.assign(end_s=boxes["start_s"] + boxes["length_s"], depth=boxes["depth"].astype("float64"))
    whole, deepest = float(data["end_s"].max()), int(data["depth"].max()) + 1
    base = alt.Chart(alt.InlineData(data.to_csv(index=False, float_format="%.6g"), format=_csv(data)))
    scale = alt.Scale(domain=[0, whole], nice=False)
    x = alt.X(
        "start_s:Q", title=None, scale=scale, axis=alt.Axis(labelExpr="format(datum.value, '~s') + 's'", grid=False)
    )
    y = alt.Y("depth:Q", title=None, axis=None, scale=alt.Scale(domain=[0, deepest], reverse=True, nice=False))
    tooltip = (
        "{'title': datum.name, 'time a call': format(datum.length_s, '.3s') + 's', "
        f"'share': format(datum.length_s / {whole!r}, '.1%'), 'kind': datum.kind}}"
    )
    kinds = alt.Scale(domain=["Python", "operator"], range=["#8fb8de", "#f0b27a"])
    visible = "clamp(scale('x', datum.end_s), 0, width) - clamp(scale('x', datum.start_s), 0, width)"
    chart = (
        alt.layer(
            base.mark_rect(stroke="#fff", strokeWidth=0.6, clip=True, tooltip=alt.ExprRef(tooltip))
            .encode(
                x=x,
                x2="end_s:Q",
                y=y,
                y2="below:Q",
                color=alt.Color("kind:N", title=None, scale=kinds, legend=_legend()),
            )
            .add_params(_zoom("x")),
            base.mark_text(
                align="left",
                baseline="middle",
                dx=3,
                dy=9,
                fontSize=11,
                clip=True,
                limit=alt.ExprRef(f"max(0, {visible} - 6)"),
                tooltip=alt.ExprRef(tooltip),
            ).encode(x=x, y=y, text="name:N", opacity=alt.OpacityValue(alt.ExprRef(f"{visible} > 30 ? 1 : 0"))),
        )
        .transform_calculate(below="datum.depth + 1")
        .properties(width="container", height=18 * deepest, autosize=FIT)
    )
    return dict(chart.to_dict())


def memory(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """Bytes in use over one call, a line for each implementation. Columns: impl, seconds, mib; None for no rows."""
    if rows.empty:
        return None
    names = [name for name in styles if name in set(rows["impl"])]
    tooltip = (
        "{'title': datum.impl, 'after': format(datum.seconds, '.3s') + 's', "
        "'in use': format(datum.mib, '.3~r') + ' MiB'}"
    )
    base = alt.Chart(alt.InlineData(rows.to_csv(index=False, float_format="%.6g"), format=_csv(rows)))
    x = alt.X("seconds:Q", title=None, axis=alt.Axis(labelExpr="format(datum.value, '~s') + 's'", grid=False))
    y = alt.Y("mib:Q", title=None, axis=alt.Axis(labelExpr="format(datum.value, '~r') + ' MiB'"))
    colour = _by_impl(names, styles, "colour")
    chart = (
        alt.layer(
            base.mark_line(interpolate="step-after", strokeWidth=2).encode(x=x, y=y, color=colour),
            base.mark_point(filled=True, size=25, tooltip=alt.ExprRef(tooltip))
            .encode(x=x, y=y, color=colour)
            .add_params(_toggles(names), _zoom()),
        )
        .transform_filter({"param": "shown"})
        .properties(width="container", height=260, autosize=FIT)
    )
    return dict(chart.to_dict())


def _with_case(rows: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """impl, these columns, and `case`: in words, what the suite and the axes are."""
    known = {COLUMNS[axis].label for axis in ("suite", *AXES)}
    words = [name for name in rows.columns if name in known]
    case = [", ".join(f"{n} {row[n]}" for n in words) for row in rows[words].to_dict("records")]
    return rows[[COLUMNS["impl"].label, *numbers]].rename(columns={COLUMNS["impl"].label: "impl"}).assign(case=case)


def _joined(rows: pd.DataFrame, columns: Sequence[str], mark: str) -> pd.Series:
    return pd.Series(list(map(mark.join, zip(*(rows[c].astype(str) for c in columns), strict=True))), index=rows.index)


def _roof_line(roof: Roof, least: float, largest: float) -> list[dict[str, Any]]:
    peak, bandwidth = roof.peak_flops_per_s, roof.bandwidth_bytes_per_s
    ridge = peak / bandwidth
    words = f"{peak / 1e9:.3g} GFLOP/s · {bandwidth / 1e9:.3g} GB/s, measured"
    at = sorted({min(least, ridge / 2), ridge, max(largest, ridge * 2)})
    return [
        {
            "roof": f"{roof.device}/{roof.dtype}/{roof.threads}",
            "intensity": intensity,
            "flops_per_s": min(peak, intensity * bandwidth),
            "words": words if intensity == at[-1] else "",
            "place": str(place),
        }
        for place, intensity in enumerate(at)
    ]
