"""What the interactive charts share, as pieces of Vega-Lite: data, selectors, legend, zoom, axes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt
import pandas as pd

from sasa_bench.report.styles import DASHES, Style

Spec = dict[str, Any]
RUN = "run"
"""The column that tells results files apart where several are compared."""

FONT = 'system-ui, -apple-system, "Segoe UI", sans-serif'
"""That of the pages: long labels are measured in the font that they are shown in."""

FIT = alt.AutoSizeParams(type="fit-x", contains="padding", resize=True)


def chart_of(data: pd.DataFrame, digits: int = 5) -> alt.Chart:
    """A chart without marks that carries its data as CSV."""
    text = data.to_csv(index=False, float_format=f"%.{digits}g")
    return alt.Chart(alt.InlineData(text, format=_csv_format(data)))


def spec_of(layers: Sequence[alt.Chart], around: alt.Chart) -> Spec:
    """These layers with the transforms, parameters, size and title of `around`, whose marks do not matter.

    Altair copies all that a chart of layers holds at each step, and checks it against its schema: what belongs to the
    whole is added once here, and tests draw every chart.
    """
    made: Spec = dict(alt.layer(*layers).to_dict(validate=False))
    whole = around.to_dict(validate=False)
    kept = {name: whole[name] for name in ("transform", "width", "height", "title", "autosize") if name in whole}
    return made | kept | {"params": [*whole.get("params", ()), *made.get("params", ())]}


def tooltip(fields: Mapping[str, str]) -> alt.ExprRef:
    """Label -> Vega expression of what a tooltip shows; the label "title" stands above the others."""
    return alt.ExprRef("{" + ", ".join(f"{json.dumps(label)}: {value}" for label, value in fields.items()) + "}")


def _csv_format(data: pd.DataFrame) -> alt.CsvDataFormat:
    numbers = {str(name): "number" for name in data if pd.api.types.is_float_dtype(data[name])}
    return alt.CsvDataFormat(type="csv", parse=numbers | {str(n): "string" for n in data if n not in numbers})


def select(name: str, label: str, values: Sequence[str], labels: Sequence[str], value: str) -> alt.Parameter:
    menu = alt.binding_select(options=list(values), labels=list(labels), name=f"{label} ")
    return alt.param(name, value=value, bind=menu)


def toggles(names: Sequence[str]) -> alt.Parameter:
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


def zoom(*encodings: Literal["x", "y"]) -> alt.Parameter:
    """Shift and wheel zoom, dragging with a mouse moves: a finger or a plain wheel still scrolls the page."""
    return alt.selection_interval(
        name="zoom",
        bind="scales",
        encodings=list(encodings or ("x", "y")),
        zoom="wheel![event.shiftKey]",
        translate="[mousedown, window:mouseup] > window:mousemove!",
    )


def by_impl(names: Sequence[str], styles: Mapping[str, Style], look: str) -> alt.Color | alt.Shape:
    scale = alt.Scale(domain=list(names), range=[getattr(styles[name], look) for name in names])
    kind = alt.Color if look == "colour" else alt.Shape
    return kind("impl:N", title=None, scale=scale, legend=legend())


def dashes(names: Sequence[str], styles: Mapping[str, Style], runs: Sequence[str]) -> alt.StrokeDash:
    if runs:
        patterns = [list(DASHES[i % len(DASHES)]) or [1, 0] for i in range(len(runs))]
        top = alt.Legend(orient="top", symbolSize=600, labelLimit=600, direction="vertical")
        return alt.StrokeDash(f"{RUN}:N", title=None, scale=alt.Scale(domain=list(runs), range=patterns), legend=top)
    patterns = [list(styles[name].dash) or [1, 0] for name in names]
    return alt.StrokeDash("impl:N", title=None, scale=alt.Scale(domain=list(names), range=patterns), legend=legend())


def legend() -> alt.Legend:
    return alt.Legend(
        orient="bottom",
        columns=alt.ExprRef("max(2, floor(containerSize()[0] / 150))"),
        symbolSize=90,
        symbolOpacity=1,
        labelFontSize=13,
        labelLimit=140,
        rowPadding=6,
        columnPadding=18,
        offset=10,
    )


def title(text: Any) -> alt.Title:
    return alt.Title(text, anchor="start", fontWeight="normal", fontSize=13, offset=10)


MANTISSA = "round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))"


def log_axis(label: str) -> alt.Axis:
    """Labels at 1, 2 and 5 of each decade, at every line where less than a decade is seen; a strong line at 1."""
    return alt.Axis(
        labelExpr=f"domain('y')[1] < 10 * domain('y')[0] || indexof([1, 2, 5], {MANTISSA}) >= 0 ? {label} : ''",
        labelOverlap=True,
        gridOpacity={"condition": {"test": f"{MANTISSA} == 1", "value": 0.9}, "value": 0.25},
        ticks=False,
        labelPadding=6,
        domain=False,
    )


def log_y(field: str, label: str) -> alt.Y:
    """A logarithmic upright axis without a title; `label` as in log_axis."""
    return alt.Y(field, title=None, scale=alt.Scale(type="log", nice=False, padding=12), axis=log_axis(label))


def series(
    base: alt.Chart,
    x: alt.X,
    y: alt.Y,
    names: Sequence[str],
    styles: Mapping[str, Style],
    shown: alt.ExprRef,
    runs: Sequence[str] = (),
) -> list[alt.Chart]:
    """A line for each implementation, and of each of `runs`, with a mark at each point that shows `shown`."""
    colour, detail = by_impl(names, styles, "colour"), [f"{RUN}:N"] if runs else []
    return [
        base.mark_line(strokeWidth=2).encode(
            x=x, y=y, color=colour, strokeDash=dashes(names, styles, runs), detail=detail
        ),
        base.mark_point(filled=True, size=75, opacity=1, tooltip=shown)
        .encode(x=x, y=y, color=colour, shape=by_impl(names, styles, "shape"), detail=detail)
        .add_params(toggles(names), zoom()),
    ]


def joined(rows: pd.DataFrame, columns: Sequence[str], mark: str) -> pd.Series:
    return pd.Series(list(map(mark.join, zip(*(rows[c].astype(str) for c in columns), strict=True))), index=rows.index)
