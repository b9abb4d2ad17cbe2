"""A table laid out for plotting: one panel for each suite and combination of held axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasa_bench.case import Case
from sasa_bench.report.table import varying_axes
from sasa_bench.results.columns import COLUMNS

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
    """Value of an axis -> where it lies: a number as it is, a resolution by its side, a choice by its turn.

    Resolutions with as many pixels lie beside each other.
    """
    if axis == "resolution":
        found: dict[Any, float] = {}
        for value in values:
            place = _side(value)
            while place in found.values():
                place *= 1.02
            found[value] = place
        return found
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
