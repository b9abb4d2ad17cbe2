"""FLOP/s under the measured roof of the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sasa_bench.report.charts.parts import (
    FIT,
    Spec,
    by_impl,
    chart_of,
    joined,
    log_y,
    select,
    title,
    toggles,
    tooltip,
    zoom,
)
from sasa_bench.report.styles import Style
from sasa_bench.report.table import ABOVE_ROOF, varying_axes
from sasa_bench.results.columns import COLUMNS, RATE, SHARE, TIME
from sasa_bench.results.record import Roof


def roofline(rows: pd.DataFrame, roofs: Sequence[Roof], styles: Mapping[str, Style], most: int = 400) -> Spec | None:
    """FLOP/s against FLOPs per byte for a chosen case under the measured peak and bandwidth; None without a roof.

    FLOPs are those that lie inside the map, and the bandwidth is that of the caches where it was measured, as for the
    column `roofline_fraction`.

    Offers `most` cases at most, spread evenly over the table.
    """
    above = rows["above_roof"] if "above_roof" in rows else pd.Series(float("nan"), rows.index)
    ok = rows[(rows["status"] == "ok") & (rows["roofline_fraction"].notna() | above.notna())]
    if ok.empty or not roofs:
        return None
    axes = varying_axes(ok)
    cases = joined(ok, axes, ", ") if axes else pd.Series("the case", index=ok.index)
    known = list(dict.fromkeys(cases))
    known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).astype(int))]
    ok, cases = ok[cases.isin(known)], cases[cases.isin(known)]
    which = joined(ok, ["device", "dtype", "threads"], "/")
    needed = ok["needed_flops"].astype("float64").fillna(ok["flops"].astype("float64"))
    data = pd.DataFrame(
        {
            "impl": ok["impl"],
            "case": cases,
            "intensity": needed / ok["min_bytes"].astype("float64"),
            "flops_per_s": needed / ok["time_median_s"],
            "fraction": ok["roofline_fraction"],
            "time": ok["time_median_s"],
        }
    ).drop_duplicates(["impl", "case"], keep="last")
    least, largest = data["intensity"].min() / 2, data["intensity"].max() * 2
    lines = pd.DataFrame([point for roof in roofs for point in _roof_line(roof, least, largest)])
    lines = lines.drop_duplicates(["roof", "place"], keep="last")
    names = [name for name in styles if name in set(data["impl"])]
    first = known[len(known) // 2]
    roof_of = dict(zip(cases, which, strict=True))
    x = alt.X(
        "intensity:Q",
        title="FLOPs inside the map per byte of least traffic",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~r", tickCount=6, grid=False),
    )
    y = log_y("flops_per_s:Q", RATE.tick.of("datum.value"))
    roof = chart_of(lines).transform_filter("datum.roof == roof_of[chosen]")
    colour, shape = by_impl(names, styles, "colour"), by_impl(names, styles, "shape")
    shown = tooltip(
        {
            "title": "datum.impl",
            "FLOP/s": RATE.tick.of("datum.flops_per_s", 3),
            "of roofline": f"isValid(datum.fraction) ? {SHARE.tick.of('datum.fraction', 3)} : '{ABOVE_ROOF}'",
            "time": TIME.tick.of("datum.time", 3),
            "FLOPs per byte": "format(datum.intensity, '.3r')",
        }
    )
    points = chart_of(data).transform_filter("datum.case == chosen").transform_filter({"param": "shown"})
    chart = (
        alt.layer(
            roof.mark_line(strokeWidth=2, opacity=0.8).encode(x=x, y=y, detail="roof:N"),
            roof.transform_filter("datum.words")
            .mark_text(align="right", baseline="top", dx=-4, dy=7, fontSize=12)
            .encode(x=x, y=y, text="words:N"),
            points.mark_point(filled=True, size=120, opacity=1, tooltip=shown)
            .encode(x=x, y=y, color=colour, shape=shape)
            .add_params(toggles(names), zoom()),
            points.mark_text(align="left", dx=10, fontSize=12).encode(x=x, y=y, text="impl:N"),
        )
        .properties(
            width="container", height=360, autosize=FIT, title=title("FLOP/s inside the map, under the measured roof")
        )
        .add_params(
            alt.param("roof_of", value=roof_of),
            select("chosen", " · ".join(COLUMNS[a].label for a in axes) or "case", known, known, first),
        )
    )
    return dict(chart.to_dict(validate=False))


def _roof_line(roof: Roof, least: float, largest: float) -> list[dict[str, Any]]:
    peak, bandwidth = roof.peak_flops_per_s, roof.hot_bytes_per_s
    ridge = peak / bandwidth
    words = f"{peak / 1e9:.3g} GFLOP/s · {bandwidth / 1e9:.3g} GB/s, measured"
    at = sorted({min(least, ridge / 2), ridge, max(largest, ridge * 2)})
    return [
        {
            "roof": f"{roof.device}/{roof.dtype}/{roof.threads}",
            "intensity": intensity,
            "flops_per_s": min(peak, intensity * bandwidth),
            "words": words if intensity == at[-1] else "",
            "place": str(place),
        }
        for place, intensity in enumerate(at)
    ]
