"""Plots of a table: time, memory and FLOPs against each axis, one colour per implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sasa_bench.case import Case
from sasa_bench.record import COLUMNS, ImplInfo
from sasa_bench.table import size, varying_axes

COLOURS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#000000",
    "#ddaa33",
    "#aa4499",
    "#44aa99",
    "#999933",
    "#882255",
    "#0077bb",
    "#ee7733",
)
"""Distinct for the colour-blind (Tol's muted set and four of his vibrant one)."""
MARKERS = "osD^vP*X<>hp"

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
        axes = varying_axes(rows) or ["kernel_size"]
        x = max(axes, key=lambda axis: (axis in NUMERIC, rows[axis].nunique()))
        coupled = tuple(a for a in axes if a != x and (rows.groupby(x)[a].nunique() == 1).all())
        held = [a for a in axes if a != x and a not in coupled]
        ok = rows[rows["status"] == "ok"]
        groups = ok.groupby(held, sort=False) if held else [((), ok)]
        for values, group in groups:
            facet = ", ".join(f"{COLUMNS[a].label} {v}" for a, v in zip(held, values, strict=True))
            if len(group):
                yield Panel(str(suite), x, coupled, facet, _placed(group, x, coupled))


def _placed(rows: pd.DataFrame, x: str, coupled: tuple[str, ...]) -> pd.DataFrame:
    labels = rows[[x, *coupled]].astype(str).agg(" · ".join, axis=1)
    if x == "resolution":
        where = rows[x].map(_side)
    elif x in NUMERIC:
        where = rows[x].astype(float)
    else:
        where = rows[x].map({value: float(i) for i, value in enumerate(dict.fromkeys(rows[x]))})
    return rows.assign(x_place=where, x_tick=labels).sort_values("x_place", kind="stable")


def _side(resolution: str) -> float:
    """The side of the square map with as many pixels."""
    case = Case(resolution=resolution)
    return float(np.sqrt(case.height * case.width))


def style(impls: Mapping[str, ImplInfo], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Implementation -> (colour, marker), by its place in the registry, so the same on every page."""
    behind = max((info.index for info in impls.values()), default=-1) + 1
    place = {}
    for name in sorted(names):
        place[name] = impls[name].index if name in impls else behind
        if name not in impls:
            behind += 1
    return {n: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for n, i in place.items()}


def draw(panel: Panel, quantity: str, styles: Mapping[str, tuple[str, str]]) -> Figure:
    """One panel for one of QUANTITIES. Times are medians with a band from p20 to p80."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for impl, rows in panel.data.groupby("impl", sort=False):
        colour, marker = styles[str(impl)]
        rows = rows.dropna(subset=[quantity])
        if rows.empty:
            continue
        where = rows["x_place"]
        axes.plot(where, rows[quantity].astype(float), color=colour, marker=marker, markersize=4, lw=1.5, label=impl)
        if quantity == "time_median_s":
            axes.fill_between(where, rows["time_p20_s"], rows["time_p80_s"], color=colour, alpha=0.15, lw=0)
    places = panel.data.drop_duplicates("x_place")
    positions = places["x_place"]
    if panel.x in NUMERIC and positions.min() > 0 and positions.max() / positions.min() >= 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(positions, places["x_tick"])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_FORMATTERS[quantity])
    axes.set_xlabel(" · ".join(COLUMNS[a].label for a in (panel.x, *panel.coupled)))
    axes.set_ylabel(COLUMNS[quantity].label)
    axes.grid(alpha=0.3, which="both", lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = panel.suite + (f": {panel.facet}" if panel.facet else "")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


_FORMATTERS = {
    "time_median_s": matplotlib.ticker.EngFormatter(unit="s"),
    "flops": matplotlib.ticker.EngFormatter(unit="FLOP"),
    "peak_memory_bytes": matplotlib.ticker.FuncFormatter(lambda value, _: size(value)),
}


def save_all(
    table: pd.DataFrame, impls: Mapping[str, ImplInfo], folder: Path, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Every panel and quantity as files `SUITE-QUANTITY[-N].FORMAT` in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
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
                    figure.savefig(path, dpi=150)
                    written.append(path)
    return written
