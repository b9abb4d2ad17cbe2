"""How each implementation looks, the same on every page: colour, marker and dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sasa_bench.report.baselines import BASELINE
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
