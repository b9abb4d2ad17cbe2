"""Charts of series over runs."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from sasa_bench.report.charts.parts import (
    FIT,
    Spec,
    chart_of,
    log_y,
    select,
    series,
    spec_of,
    title,
    tooltip,
    zoom,
)
from sasa_bench.report.styles import Style
from sasa_bench.results.columns import RATIO, TIME


def levels(points: pd.DataFrame, spans: pd.DataFrame, quantity: str, look: Style) -> Spec:
    """One series over runs with the levels between its changes.

    points: place, commit, started_at, value, low, high. spans: first, last (places), level, words at its start.
    """
    base = chart_of(points)
    bars = chart_of(spans)
    x = _by_run("place:Q", points)
    scale = alt.Scale(zero=False, nice=False, padding=14)
    tick = (TIME if quantity == "time" else RATIO).tick
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(labelExpr=tick.of("datum.value", 3)))
    shown = tooltip(
        {
            "title": "datum.commit",
            "measured": "datum.started_at",
            "value": tick.of("datum.value", 3),
            "95 %": f"isValid(datum.low) ? {tick.of('datum.low', 3)} + ' to ' + {tick.of('datum.high', 3)} "
            ": 'too few samples'",
        }
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
            base.mark_point(filled=True, size=70, opacity=1, color=look.colour, shape=look.shape, tooltip=shown)
            .encode(x=x, y=y)
            .add_params(zoom()),
            bars.transform_filter("datum.words")
            .mark_text(align="left", baseline="top", dx=5, fontSize=12)
            .encode(x=alt.X("first:Q", title=None), y=alt.YValue(4), text="words:N"),
        )
        .properties(width="container", height=240, autosize=FIT, title=title(f"{quantity}, over runs"))
        .add_params(alt.param("commits", value=list(points["commit"])))
    )
    return dict(chart.to_dict(validate=False))


def over_runs(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec:
    """Every series of a suite over the runs of one machine, for a chosen case and quantity.

    Columns: impl, case, quantity, place (turn of the run), commit, started_at, value, low, high.
    """
    data = rows[["impl", "case", "quantity", "place", "commit", "started_at", "value"]]
    names = [name for name in styles if name in set(data["impl"])]
    cases, quantities = list(dict.fromkeys(data["case"])), sorted(set(data["quantity"]), reverse=True)
    base = chart_of(data)
    x = _by_run("place:Q", data)
    written = f"(quantity == 'time' ? {TIME.tick.of('datum.value', 3)} : {RATIO.tick.of('datum.value', 3)})"
    shown = tooltip({"title": "datum.impl", "commit": "datum.commit", "measured": "datum.started_at", "value": written})
    commits = data.drop_duplicates("place").set_index("place")["commit"]
    labels = [commits.get(float(i), "") for i in range(int(data["place"].max()) + 1)]
    whole = (
        alt.Chart()
        .mark_point()
        .transform_filter("datum.case == chosen && datum.quantity == quantity")
        .transform_filter({"param": "shown"})
        .properties(width="container", height=320, autosize=FIT, title=title(alt.ExprRef("quantity + ', over runs'")))
        .add_params(
            alt.param("commits", value=labels),
            select("quantity", "show", quantities, quantities, quantities[0]),
            select("chosen", "case", cases, cases, cases[0]),
        )
    )
    return spec_of(series(base, x, log_y("value:Q", written), names, styles, shown), whole)


def _by_run(field: str, data: pd.DataFrame) -> alt.X:
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
