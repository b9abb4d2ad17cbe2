"""Plots of a table: time, memory and FLOPs against each axis, one colour per implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sasa_bench.case import Case
from sasa_bench.report.table import BASELINE, marked, varying_axes
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.file import ResultsError
from sasa_bench.results.record import ImplInfo

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#7d5fd3",
    "#56b4e9",
    "#b02a4b",
    "#8f7a00",
    "#5aa02c",
    "#8c564b",
)
"""Okabe and Ito's set less yellow and black, and five more: safe for the colour-blind, seen on white and on black."""
BASELINE_COLOUR = "#7a7a85"
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("D", "diamond"),
    ("^", "triangle-up"),
    ("v", "triangle-down"),
    ("P", "cross"),
    (">", "triangle-right"),
    ("<", "triangle-left"),
)
"""The same shape as matplotlib and as Vega call it. As many as share no factor with the colours."""
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 3, 2, 3))
"""Points on and off along a line."""


@dataclass(frozen=True)
class Style:
    """How an implementation looks: `marker` for matplotlib, `shape` the same for Vega, `dash` in points on and off."""

    colour: str
    marker: str
    shape: str
    dash: tuple[int, ...]


QUANTITIES = ("time_median_s", "peak_memory_bytes", "flops")
NUMERIC = ("kernel_size", "channels", "heads", "resolution", "batch", "threads")


@dataclass(frozen=True)
class Panel:
    """One plot of a suite as data.

    x        the axis along the bottom; `coupled` axes change with it and appear in the tick labels
    facet    words for the axes that are held in this panel
    data     the ok rows, with `x_place` (number on the x axis) and `x_tick` (its label)
    """

    suite: str
    x: str
    coupled: tuple[str, ...]
    facet: str
    data: pd.DataFrame


def panels(table: pd.DataFrame) -> Iterator[Panel]:
    """The panels of a table: for each suite, and each combination of the axes that do not lie along the bottom."""
    for suite, rows in table.groupby("suite", sort=False):
        axes = free_axes(rows)
        x = along(rows, list(axes))
        coupled = axes[x]
        held = [a for axis in axes if axis != x for a in (axis, *axes[axis])]
        ok = rows[rows["status"] == "ok"]
        groups = ok.groupby(held, sort=False) if held else [((), ok)]
        for values, group in groups:
            facet = ", ".join(f"{COLUMNS[a].label} {v}" for a, v in zip(held, values, strict=True))
            if len(group):
                yield Panel(str(suite), x, coupled, facet, _placed(group, x, coupled))


def _placed(rows: pd.DataFrame, x: str, coupled: tuple[str, ...]) -> pd.DataFrame:
    where = rows[x].map(places(x, list(dict.fromkeys(rows[x]))))
    return rows.assign(x_place=where, x_tick=ticks(rows, x, coupled)).sort_values("x_place", kind="stable")


def ticks(rows: pd.DataFrame, x: str, coupled: Sequence[str]) -> pd.Series:
    """The tick label of each row: its value of `x` and of the axes that change with it."""
    labels = rows[x].astype(str)
    for axis in coupled:
        labels = labels + " · " + rows[axis].astype(str)
    return labels


def places(axis: str, values: Sequence[Any]) -> dict[Any, float]:
    """Value of an axis -> where it lies: a number as it is, a resolution by its side, a choice by its turn."""
    if axis == "resolution":
        return {value: _side(value) for value in values}
    if axis in NUMERIC:
        return {value: float(value) for value in values}
    return {value: float(i) for i, value in enumerate(values)}


def spans_octaves(axis: str, where: Sequence[float]) -> bool:
    """Whether an axis is wide enough to be drawn by its logarithm."""
    return axis in NUMERIC and min(where) > 0 and max(where) / min(where) >= 8


def free_axes(rows: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Each axis that varies by itself -> the axes that change together with it, one value for one value."""
    found: dict[str, tuple[str, ...]] = {}
    for axis in sorted(varying_axes(rows), key=lambda axis: axis not in NUMERIC):
        pairs = rows[axis].nunique()
        for kept in found:
            if rows[kept].nunique() == pairs == len(rows[[kept, axis]].drop_duplicates()):
                found[kept] += (axis,)
                break
        else:
            found[axis] = ()
    return found or {"kernel_size": ()}


def along(rows: pd.DataFrame, axes: Sequence[str]) -> str:
    """The axis that a plot of `rows` lies along at first: the numeric one with the most values."""
    return max(axes, key=lambda axis: (axis in NUMERIC, rows[axis].nunique()))


def _side(resolution: str) -> float:
    """The side of the square map with as many pixels."""
    case = Case(resolution=resolution)
    return float(np.sqrt(case.height * case.width))


def style(impls: Mapping[str, ImplInfo], names: Sequence[str]) -> dict[str, Style]:
    """Name -> its look, by its place in the registry, so the same on every page; in that order.

    `names` are those of implementations, or their labels, as in a table that is `marked`.
    """
    impls = dict(impls) | {info.label: info for info in impls.values()}
    behind = max((info.index for info in impls.values()), default=-1) + 1
    place = {}
    for name in sorted(names):
        place[name] = impls[name].index if name in impls else behind
        if name not in impls:
            behind += 1
    return {name: _look(name, i) for name, i in sorted(place.items(), key=lambda item: item[1])}


def _look(name: str, index: int) -> Style:
    marker, shape = MARKERS[index % len(MARKERS)]
    colour = BASELINE_COLOUR if name == BASELINE else COLOURS[index % len(COLOURS)]
    return Style(colour, marker, shape, DASHES[index // len(COLOURS) % len(DASHES)])


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
    axes.set_yscale("log", base=2 if column.unit == "B" else 10)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: column.text(value)))
    axes.set_ylabel(column.label)
    axes.grid(alpha=0.3, which="both", lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = panel.suite + (f": {panel.facet}" if panel.facet else "")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def overview(table: pd.DataFrame, impls: Mapping[str, ImplInfo], op: str, most: int = 3) -> Figure:
    """Time of every implementation of `op` over that of the baseline, one plot a suite; dashed, what FLOPs would give.

    Takes the first panel of each suite that has both, `most` at most. Raises ResultsError where none has.
    """
    chosen: dict[str, Panel] = {}
    for panel in panels(table):
        compared = panel.data[(panel.data["op"] == op) & panel.data["time_vs_conv3x3"].notna()]
        if compared["x_place"].nunique() > 1:
            chosen.setdefault(panel.suite, panel)
    if not chosen:
        raise ResultsError(f"no suite has {op} and {BASELINE} at two points or more: there is nothing to draw")
    shown = list(chosen.values())[:most]
    styles = style(impls, sorted(set(table["impl"])))
    figure = Figure(figsize=(3.9 * len(shown) + 0.4, 3.7), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        _ratios(axes, panel, op, styles)
    figure.axes[0].set_ylabel(f"times {BASELINE}")
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
            rows["x_place"], rows["time_vs_conv3x3"], color=look.colour, marker=look.marker, markersize=4, label=impl
        )
    base = panel.data[panel.data["impl"] == BASELINE].drop_duplicates("x_place").set_index("x_place")["flops"]
    work = data.drop_duplicates("x_place").set_index("x_place")["flops"]
    share = (work.astype(float) / base.astype(float)).dropna().sort_index()
    axes.plot(share.index, share, color=BASELINE_COLOUR, ls="--", lw=1.5, label="by FLOPs")
    axes.axhline(1, color=BASELINE_COLOUR, lw=1, label=BASELINE)
    _label_x(axes, panel)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


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
                    path = folder / f"{panel.suite}-{quantity}-{number}.{form}"
                    save(figure, path)
                    written.append(path)
    return written


def save(figure: Figure, path: Path) -> None:
    """Write a figure as its suffix says; the same figure gives the same bytes."""
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix.lstrip("."), {})
    with matplotlib.rc_context({"svg.hashsalt": "sasa-bench"}):
        figure.savefig(path, dpi=150, metadata=undated)
