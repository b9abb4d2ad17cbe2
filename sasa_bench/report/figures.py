"""Plots of a table: time, memory and FLOPs against each axis, one colour per implementation."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_bench.report.baselines import BASELINE
from sasa_bench.report.panels import Panel, panels, spans_octaves
from sasa_bench.report.styles import BASELINE_COLOUR, Style, style
from sasa_bench.report.table import marked
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.file import ResultsError, replace_file
from sasa_bench.results.record import ImplInfo

QUANTITIES = ("time_median_s", "peak_memory_bytes", "flops")


def draw(panel: Panel, quantity: str, styles: Mapping[str, Style]) -> Figure:
    """One panel for one of QUANTITIES. A band lies between the bounds of the quantity: p20 and p80 of a time."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for impl, rows in panel.data.groupby("impl", sort=False):
        look = styles[str(impl)]
        rows = rows.dropna(subset=[quantity])
        if rows.empty:
            continue
        where = rows["x_place"]
        (line,) = axes.plot(
            where, rows[quantity].astype(float), color=look.colour, marker=look.marker, markersize=4, lw=1.5, label=impl
        )
        if look.dash:
            line.set_dashes(look.dash)
        if bounds := COLUMNS[quantity].bounds:
            axes.fill_between(where, rows[bounds[0]], rows[bounds[1]], color=look.colour, alpha=0.15, lw=0)
    _label_x(axes, panel)
    column = COLUMNS[quantity]
    _log_y(axes, column.text, base=2 if column.unit == "B" else 10)
    axes.set_ylabel(column.label)
    axes.grid(alpha=0.3, which="both", lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = panel.suite + (f": {panel.facet}" if panel.facet else "")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def overview(table: pd.DataFrame, impls: Mapping[str, ImplInfo], op: str, most: int = 3) -> Figure:
    """Time of every implementation of `op` over that of the fastest 3 x 3 convolution, one plot a suite.

    A dashed line is what FLOPs would give.

    Takes the first panel of each suite that has both, `most` at most. Raises ResultsError where none has.
    """
    chosen: dict[str, Panel] = {}
    for panel in panels(table):
        compared = panel.data[(panel.data["op"] == op) & panel.data["time_vs_best_conv3x3"].notna()]
        if compared["x_place"].nunique() > 1:
            chosen.setdefault(panel.suite, panel)
    if not chosen:
        raise ResultsError(f"no suite has {op} and a 3×3 convolution at two points or more: there is nothing to draw")
    shown = list(chosen.values())[:most]
    styles = style(impls, sorted(set(table["impl"])))
    figure = Figure(figsize=(3.9 * len(shown) + 0.4, 3.7), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        _ratios(axes, panel, op, styles)
    figure.axes[0].set_ylabel("times the fastest 3×3 convolution")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _ratios(axes: Axes, panel: Panel, op: str, styles: Mapping[str, Style]) -> None:
    data = panel.data[panel.data["op"] == op]
    for impl, rows in data.groupby("impl", sort=False):
        look = styles[str(impl)]
        axes.plot(
            rows["x_place"],
            rows["time_vs_best_conv3x3"],
            color=look.colour,
            marker=look.marker,
            markersize=4,
            label=impl,
        )
    base = panel.data[panel.data["impl"] == BASELINE].drop_duplicates("x_place").set_index("x_place")["flops"]
    work = data.drop_duplicates("x_place").set_index("x_place")["flops"]
    share = (work.astype(float) / base.astype(float)).dropna().sort_index()
    axes.plot(share.index, share, color=BASELINE_COLOUR, ls="--", lw=1.5, label="by FLOPs")
    axes.axhline(1, color=BASELINE_COLOUR, lw=1, label="fastest 3×3")
    _label_x(axes, panel)
    _log_y(axes, lambda value: f"{value:.3g}×")
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _log_y(axes: Axes, text: Callable[[float], str], base: int = 10) -> None:
    """A logarithmic axis with labels to read it by, however little of it is seen."""
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    if high < 3 * low:
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    elif base == 10:
        steps = range(1, 10) if high < 10 * low else (1, 2, 5)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base, steps, numticks=15))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: text(value)))


def _label_x(axes: Axes, panel: Panel) -> None:
    places = panel.data.drop_duplicates("x_place")
    positions = places["x_place"]
    if spans_octaves(panel.x, list(positions)):
        axes.set_xscale("log", base=2)
    axes.set_xticks(positions, places["x_tick"])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel(" · ".join(COLUMNS[a].label for a in (panel.x, *panel.coupled)))


def save_all(
    table: pd.DataFrame, impls: Mapping[str, ImplInfo], folder: Path, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Every panel and quantity as files `SUITE-QUANTITY[-N].FORMAT` in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = marked(table)
    styles = style(impls, sorted(set(table["impl"])))
    written = []
    numbers: dict[str, int] = {}
    for panel in panels(table):
        numbers[panel.suite] = number = numbers.get(panel.suite, 0) + 1
        for quantity in QUANTITIES:
            if panel.data[quantity].notna().any():
                figure = draw(panel, quantity, styles)
                for form in formats:
                    path = folder / f"{file_name(panel.suite)}-{quantity}-{number}.{form}"
                    save(figure, path)
                    written.append(path)
    return written


def file_name(text: str) -> str:
    """The text as a part of a file's name that cannot leave its folder: other than letters and digits become _."""
    return re.sub(r"[^\w=-]+", "_", text)[:100]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as its suffix says; the same figure gives the same bytes."""
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix.lstrip("."), {})
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sasa-bench"}):
        figure.savefig(drawn, format=path.suffix.lstrip("."), dpi=150, metadata=undated)
    replace_file(path, drawn.getvalue())
