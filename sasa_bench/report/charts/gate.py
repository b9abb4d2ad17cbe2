"""Charts of a gate: ratios of head to base by case, by pair and over time."""

from __future__ import annotations

import altair as alt
import pandas as pd

from sasa_bench.report.charts.parts import FIT, FONT, Spec, chart_of, legend, title, tooltip, zoom

COLOURS = {
    "REGRESSION": "#d55e00",
    "INCONCLUSIVE": "#b58900",
    "IMPROVED": "#009e73",
    "EQUIVALENT": "#7a7a85",
}
FRESH, SCREEN, COPY = "fresh pairs", "screen", "copy / base"
KINDS = {FRESH: "#0072b2", SCREEN: "#8f7a00", COPY: "#7a7a85"}
PERCENT = "format(datum.value - 1, '+.1~%')"
"""The label of a tick: how much longer head takes."""

_NAMES = alt.Axis(
    labelLimit=alt.ExprRef("min(330, 0.5 * containerSize()[0])"),
    labelFont=FONT,
    ticks=False,
    domain=False,
    grid=True,
    gridOpacity=0.25,
    labelFontSize=alt.ExprRef("containerSize()[0] < 500 ? 10 : 12"),
)


def _x(field: str = "ratio:Q") -> alt.X:
    axis = alt.Axis(labelExpr=PERCENT, tickCount=alt.ExprRef("containerSize()[0] < 500 ? 3 : 6"), labelFlush=True)
    return alt.X(field, title="time of head over base", axis=axis, scale=alt.Scale(zero=False, padding=12))


def overview(rows: pd.DataFrame) -> Spec:
    """A mark for each timed case, with the bounds of its decision.

    Columns: case (short name), verdict, ratio, low, high (its ratio where there are no bounds), bounds ("" for none).
    """
    present = [verdict for verdict in COLOURS if verdict in set(rows["verdict"])]
    scale = alt.Scale(domain=present, range=[COLOURS[verdict] for verdict in present])
    colour = alt.Color("verdict:N", title=None, scale=scale, legend=legend())
    shown = tooltip(
        {
            "title": "datum.case",
            "verdict": "datum.verdict",
            "head / base": "format(datum.ratio, '.3f')",
            "bounds": "datum.bounds",
        }
    )
    base = chart_of(rows)
    y = alt.Y("case:N", title=None, sort=list(rows["case"]), axis=_NAMES)
    one = alt.Chart(alt.InlineData([{"ratio": 1.0}])).mark_rule(opacity=0.6).encode(x=_x())
    chart = alt.layer(
        one,
        base.mark_rule(strokeWidth=2).encode(x=_x("low:Q"), x2="high:Q", y=y, color=colour),
        base.mark_point(filled=True, size=70, opacity=1, tooltip=shown).encode(x=_x(), y=y, color=colour),
    ).properties(width="container", height=17 * len(rows) + 10, autosize=FIT)
    return dict(chart.to_dict())


def paired(rows: pd.DataFrame, low: float | None, high: float | None, margin: float | None) -> Spec:
    """The ratio of each pair, a row for each kind; the bounds of the decision as a band, the margin as a dashed line.

    Columns: kind (one of KINDS), ratio, pair (its number).
    """
    shown = tooltip(
        {"title": "datum.kind + ', pair ' + format(datum.pair, 'd')", "ratio": "format(datum.ratio, '.4f')"}
    )
    present = [kind for kind in KINDS if kind in set(rows["kind"])]
    scale = alt.Scale(domain=present, range=[KINDS[kind] for kind in present])
    lines = [{"ratio": 1.0}]
    layers: list[alt.Chart] = []
    if low is not None and high is not None:
        band = alt.Chart(alt.InlineData([{"low": low, "high": high}]))
        layers.append(band.mark_rect(color=KINDS[FRESH], opacity=0.16).encode(x=_x("low:Q"), x2="high:Q"))
    layers.append(alt.Chart(alt.InlineData(lines)).mark_rule(opacity=0.6).encode(x=_x()))
    if margin is not None:
        dashed = alt.Chart(alt.InlineData([{"ratio": 1 + margin}]))
        layers.append(dashed.mark_rule(strokeDash=[5, 4], color=COLOURS["REGRESSION"]).encode(x=_x()))
    marks = chart_of(rows).mark_tick(thickness=2, height=16, tooltip=shown)
    y = alt.Y("kind:N", title=None, sort=present, axis=_NAMES)
    layers.append(marks.encode(x=_x(), y=y, color=alt.Color("kind:N", scale=scale, legend=None)))
    words = "one mark a pair; band: bounds of the decision; dashed: the margin it has to exceed"
    chart = alt.layer(*layers).properties(
        width="container", height=34 * len(present) + 10, autosize=FIT, title=title(words)
    )
    return dict(chart.to_dict())


def over_time(blocks: pd.DataFrame, pairs: pd.DataFrame) -> Spec:
    """Every block, in the order of time, and the value of each pair over its blocks.

    Columns of both: minute (from the start of the run), ratio, kind (FRESH or SCREEN), pair.
    """
    present = [kind for kind in KINDS if kind in set(pairs["kind"])]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=present, range=[KINDS[kind] for kind in present]),
        legend=legend(),
    )
    x = alt.X("minute:Q", title="minutes from the start of the run", axis=alt.Axis(grid=False, tickCount=8))
    y = alt.Y(
        "ratio:Q",
        title=None,
        axis=alt.Axis(labelExpr=PERCENT, tickCount=5),
        scale=alt.Scale(zero=False, clamp=True, domain=_middle(blocks["ratio"])),
    )
    shown = tooltip({"title": "'pair ' + format(datum.pair, 'd')", "ratio": "format(datum.ratio, '.4f')"})
    one = alt.Chart(alt.InlineData([{"ratio": 1.0}])).mark_rule(opacity=0.6).encode(y=y)
    chart = alt.layer(
        one,
        chart_of(blocks).mark_circle(size=9, opacity=0.3).encode(x=x, y=y, color=colour),
        chart_of(pairs)
        .mark_point(filled=True, size=60, opacity=1, tooltip=shown)
        .encode(x=x, y=y, color=colour)
        .add_params(zoom()),
    ).properties(
        width="container",
        height=200,
        autosize=FIT,
        title=title("head over base alone, by block (small) and pair (large), in order of time"),
    )
    return dict(chart.to_dict())


def _middle(ratios: pd.Series) -> list[float]:
    """What the axis shows: nearly all of the blocks, so that single ones do not flatten the rest, and always 1."""
    low, high = float(ratios.quantile(0.01)), float(ratios.quantile(0.99))
    room = 0.1 * (high - low) + 0.005
    return [min(low, 1.0) - room, max(high, 1.0) + room]
