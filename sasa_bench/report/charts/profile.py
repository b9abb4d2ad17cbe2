"""Charts of a profile: stages, stacks, memory."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from sasa_bench.report.charts.parts import FIT, FONT, Spec, by_impl, chart_of, legend, toggles, tooltip, zoom
from sasa_bench.report.styles import Style
from sasa_bench.results.columns import BYTES, TIME

STAGE_COLOURS = {
    "project": "#0072b2",
    "pad": "#e69f00",
    "interleave": "#b8860b",
    "position": "#cc79a7",
    "logits": "#009e73",
    "softmax": "#7d5fd3",
    "aggregate": "#d55e00",
    "gradients": "#a05195",
    "write": "#2f4b7c",
    "one operator": "#56b4e9",
    "convolution": "#8f7a00",
    "other": "#7a7a85",
}


def stage_bars(rows: pd.DataFrame) -> Spec:
    """Milliseconds by stage, a bar for each implementation. Columns: impl, stage, ms, share (of the bar)."""
    order = [stage for stage in STAGE_COLOURS if stage in set(rows["stage"])]
    names = list(dict.fromkeys(rows["impl"]))
    data = rows.assign(order=[float(order.index(stage)) for stage in rows["stage"]])
    shown = tooltip(
        {
            "title": "datum.stage",
            "implementation": "datum.impl",
            "time": "format(datum.ms, '.3~r') + ' ms'",
            "share": "format(datum.share, '.0%')",
        }
    )
    chart = (
        chart_of(data)
        .mark_bar(height=30, tooltip=shown)
        .encode(
            x=alt.X("ms:Q", title="ms a call", stack="zero", axis=alt.Axis(tickCount=6)),
            y=alt.Y("impl:N", title=None, sort=names, axis=alt.Axis(labelFontSize=13, labelLimit=130, ticks=False)),
            color=alt.Color(
                "stage:N",
                title=None,
                scale=alt.Scale(domain=order, range=[STAGE_COLOURS[stage] for stage in order]),
                legend=legend(),
            ),
            order=alt.Order("order:Q"),
        )
        .properties(width="container", height=46 * len(names), autosize=FIT)
    )
    return dict(chart.to_dict(validate=False))


def flame(boxes: pd.DataFrame) -> Spec | None:
    """Stacks as boxes, callers above callees. Columns: name, kind, depth, start_s, length_s; None for no rows."""
    if boxes.empty:
        return None
    data = boxes.assign(end_s=boxes["start_s"] + boxes["length_s"], depth=boxes["depth"].astype("float64"))
    whole, deepest = float(data["end_s"].max()), int(data["depth"].max()) + 1
    base = chart_of(data, digits=6)
    scale = alt.Scale(domain=[0, whole], nice=False)
    x = alt.X("start_s:Q", title=None, scale=scale, axis=_seconds())
    y = alt.Y("depth:Q", title=None, axis=None, scale=alt.Scale(domain=[0, deepest], reverse=True, nice=False))
    shown = tooltip(
        {
            "title": "datum.name",
            "time a call": TIME.tick.of("datum.length_s", 3),
            "share": f"format(datum.length_s / {whole!r}, '.1%')",
            "kind": "datum.kind",
        }
    )
    kinds = alt.Scale(domain=["Python", "operator"], range=["#8fb8de", "#f0b27a"])
    visible = "clamp(scale('x', datum.end_s), 0, width) - clamp(scale('x', datum.start_s), 0, width)"
    chart = (
        alt.layer(
            base.mark_rect(stroke="#fff", strokeWidth=0.6, clip=True, tooltip=shown)
            .encode(
                x=x,
                x2="end_s:Q",
                y=y,
                y2="below:Q",
                color=alt.Color("kind:N", title=None, scale=kinds, legend=legend()),
            )
            .add_params(zoom("x")),
            base.mark_text(
                align="left",
                baseline="middle",
                dx=3,
                dy=9,
                fontSize=11,
                clip=True,
                limit=alt.ExprRef(f"max(0, {visible} - 6)"),
                tooltip=shown,
            ).encode(x=x, y=y, text="name:N", opacity=alt.OpacityValue(alt.ExprRef(f"{visible} > 30 ? 1 : 0"))),
        )
        .transform_calculate(below="datum.depth + 1")
        .properties(width="container", height=18 * deepest, autosize=FIT)
    )
    return dict(chart.to_dict(validate=False))


def _seconds() -> alt.Axis:
    return alt.Axis(
        labelExpr=TIME.tick.of("datum.value"), grid=False, labelOverlap=True, labelSeparation=8, tickCount=10
    )


def memory(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Spec | None:
    """Bytes in use over one call, a line for each implementation. Columns: impl, seconds, mib; None for no rows."""
    if rows.empty:
        return None
    names = [name for name in styles if name in set(rows["impl"])]
    shown = tooltip(
        {
            "title": "datum.impl",
            "after": TIME.tick.of("datum.seconds", 3),
            "in use": BYTES.tick.of("datum.mib", 3),
        }
    )
    base = chart_of(rows, digits=6)
    x = alt.X("seconds:Q", title=None, axis=_seconds())
    y = alt.Y("mib:Q", title=None, axis=alt.Axis(labelExpr=BYTES.tick.of("datum.value")))
    colour = by_impl(names, styles, "colour")
    chart = (
        alt.layer(
            base.mark_line(interpolate="step-after", strokeWidth=2).encode(x=x, y=y, color=colour),
            base.mark_point(filled=True, size=25, tooltip=shown)
            .encode(x=x, y=y, color=colour)
            .add_params(toggles(names), zoom()),
        )
        .transform_filter({"param": "shown"})
        .properties(width="container", height=260, autosize=FIT)
    )
    return dict(chart.to_dict(validate=False))


def growth(rows: pd.DataFrame) -> Spec:
    """Milliseconds that each operator takes more or less. Columns: what, ms, turn (its place from the top)."""
    shown = tooltip({"title": "datum.what", "growth": "format(datum.ms, '+.3~r') + ' ms'"})
    sign = alt.condition("datum.ms > 0", alt.value("#d55e00"), alt.value("#009e73"))
    names = list(rows["what"])
    limit = alt.ExprRef("min(300, 0.5 * containerSize()[0])")
    names_axis = alt.Axis(labelLimit=limit, labelFont=FONT, ticks=False)
    chart = (
        chart_of(rows)
        .mark_bar(tooltip=shown)
        .encode(
            x=alt.X("ms:Q", title="ms more", axis=alt.Axis(tickCount=6)),
            y=alt.Y("what:N", title=None, sort=names, axis=names_axis),
            color=sign,
        )
        .properties(width="container", height=24 * len(names), autosize=FIT)
    )
    return dict(chart.to_dict(validate=False))
