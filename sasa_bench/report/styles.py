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
    "#e01fd0",
    "#3355ff",
    "#006d1f",
    "#a3128f",
    "#ff2d78",
    "#9a2bff",
    "#a58cff",
    "#9a9a86",
)
"""Okabe and Ito's set less yellow and black, five more that are safe for the colour-blind, and eight that lie farthest
from all of them in OKLab: each is seen on white and on black."""
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
    """Name -> its look, in the order of the registry.

    A name has the colour of its place in the registry, so the same on every page; where an earlier name of the page has
    it already, the next one that is free. Beyond as many names as COLOURS, colours repeat with other dashes.

    `names` are those of implementations, or their labels, as in a table that is `marked`.
    """
    impls = dict(impls) | {info.label: info for info in impls.values()}
    behind = max((info.index for info in impls.values()), default=-1) + 1
    place = {}
    for name in sorted(names):
        place[name] = impls[name].index if name in impls else behind
        if name not in impls:
            behind += 1
    taken: set[int] = set()
    looks = {}
    for name, index in sorted(place.items(), key=lambda item: item[1]):
        colour = next((c for i in range(len(COLOURS)) if (c := (index + i) % len(COLOURS)) not in taken), index)
        taken |= set() if name == BASELINE else {colour}
        marker, shape = MARKERS[index % len(MARKERS)]
        shown = BASELINE_COLOUR if name == BASELINE else COLOURS[colour % len(COLOURS)]
        looks[name] = Style(shown, marker, shape, DASHES[index // len(COLOURS) % len(DASHES)])
    return looks
