"""Charts of the samples of one row; the page fills in the data: turn (from 0), seconds."""

from __future__ import annotations

import altair as alt

from sasa_bench.report.charts.parts import FIT, Spec, title, tooltip
from sasa_bench.results.columns import TIME

COLOUR = "#0072b2"


def over_time() -> Spec:
    """Every sample in the order in which it was taken; a line at the median and a band from p20 to p80."""
    base = alt.Chart(alt.NamedData("samples"))
    y = alt.Y(
        "seconds:Q",
        title=None,
        scale=alt.Scale(zero=False, nice=False, padding=10),
        axis=alt.Axis(labelExpr=TIME.tick.of("datum.value", 4), tickCount=5),
    )
    x = alt.X("turn:Q", title="sample, in order of time", axis=alt.Axis(grid=False, tickMinStep=1))
    bounds = base.transform_aggregate(
        low="q1(seconds)", median="median(seconds)", high="q3(seconds)", first="min(turn)", last="max(turn)"
    )
    shown = tooltip({"title": "'sample ' + (datum.turn + 1)", "time": TIME.tick.of("datum.seconds", 4)})
    chart = alt.layer(
        bounds.mark_rect(opacity=0.15, color=COLOUR).encode(
            x=alt.X("first:Q"), x2="last:Q", y=alt.Y("low:Q", title=None), y2="high:Q"
        ),
        bounds.mark_rule(color=COLOUR, opacity=0.8).encode(x=alt.X("first:Q"), x2="last:Q", y="median:Q"),
        base.mark_point(filled=True, size=45, opacity=0.9, color=COLOUR, tooltip=shown).encode(x=x, y=y),
    ).properties(width="container", height=220, autosize=FIT, title=title("time of a call, by sample; band: quartiles"))
    return dict(chart.to_dict(validate=False))


def distribution() -> Spec:
    """How many samples took how long."""
    shown = tooltip({"title": "datum.count + ' samples'"})
    chart = (
        alt.Chart(alt.NamedData("samples"))
        .transform_bin(["from", "to"], "seconds", bin=alt.Bin(maxbins=40))
        .transform_aggregate(count="count()", groupby=["from", "to"])
        .mark_bar(color=COLOUR, opacity=0.85, tooltip=shown)
        .encode(
            x=alt.X(
                "from:Q",
                title=None,
                bin="binned",
                scale=alt.Scale(zero=False, padding=8),
                axis=alt.Axis(labelExpr=TIME.tick.of("datum.value", 4), grid=False, labelOverlap="parity"),
            ),
            x2="to:Q",
            y=alt.Y("count:Q", title=None, axis=alt.Axis(tickMinStep=1, tickCount=4)),
        )
        .properties(width="container", height=140, autosize=FIT, title=title("distribution of the samples"))
    )
    return dict(chart.to_dict(validate=False))
