"""The chart of a sweep: which axes its menus offer, and where it starts."""

from __future__ import annotations

import json
from pathlib import Path

import factory
import numpy as np
import pandas as pd

from sasa_bench.case import AXES, Case
from sasa_bench.report.charts.parts import RUN
from sasa_bench.report.charts.sweep import _plotted, sweep
from sasa_bench.report.styles import style
from sasa_bench.report.table import load


def test_every_axis_of_a_large_sweep_can_be_chosen(tmp_path: Path) -> None:
    table = load(factory.results_file(tmp_path / "a.jsonl", factory.large_sweep(1000)))
    spec = sweep(table, style({}, sorted(set(table["impl"]))))
    assert spec is not None
    menus = {p["name"]: p["bind"]["options"] for p in spec["params"] if "input" in p.get("bind", {})}
    assert set(menus["along"]) == {axis for axis in AXES if table[axis].nunique() > 1}


def test_a_chart_of_no_full_grid_starts_with_values_that_show_all_points(tmp_path: Path) -> None:
    cases = [Case(channels=c, kernel_size=7, threads=2) for c in (32, 64, 128, 256)]
    cases += [Case(channels=64, kernel_size=k, threads=2) for k in (11, 19)]
    table = load(factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold", case=case) for case in cases]))
    spec = sweep(table, style({}, ["unfold"]))
    assert spec is not None
    first = {p["name"]: p["value"] for p in spec["params"] if "input" in p.get("bind", {})}
    assert (first["along"], first["at_kernel_size"]) == ("channels", "7")


def test_a_ratio_without_an_interval_has_no_bounds_that_a_logarithmic_axis_cannot_place(tmp_path: Path) -> None:
    case = Case(threads=2)
    rows = [factory.record("unfold", 0.02, count=3, case=case), factory.record("conv3x3", 0.01, count=3, case=case)]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows))
    assert np.isinf(table["time_vs_conv3x3_high"]).any()
    plotted = _plotted(table, {"kernel_size": ()}, ["time_vs_conv3x3"], [])
    assert plotted.loc[table["impl"] == "unfold", ["time_vs_conv3x3_low", "time_vs_conv3x3_high"]].isna().all(axis=None)
    assert plotted.loc[table["impl"] == "conv3x3", "time_vs_conv3x3_low"].notna().all()
    assert "no interval" in json.dumps(sweep(table, style({}, sorted(set(table["impl"])))))


def test_limits_of_one_machine_are_not_drawn_where_there_are_several(tmp_path: Path) -> None:
    table = load(factory.results_file(tmp_path / "a.jsonl", factory.sweep()))
    styles = style({}, sorted(set(table["impl"])))
    assert "'fastest 3×3 convolution'" in json.dumps(sweep(table, styles), ensure_ascii=False)
    both = pd.concat([table.assign(**{RUN: "A"}), table.assign(**{RUN: "B"})], ignore_index=True)
    assert "'fastest 3×3 convolution'" not in json.dumps(sweep(both, styles), ensure_ascii=False)
