"""The chart of a sweep: which axes its menus offer, and where it starts."""

from __future__ import annotations

from pathlib import Path

import factory

from sasa_bench.case import AXES, Case
from sasa_bench.report.charts.sweep import sweep
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
