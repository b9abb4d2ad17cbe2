from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import factory
import pandas as pd
import pytest

from sasa_bench.report import report
from sasa_bench.report.charts import sweep
from sasa_bench.report.table import display, load
from sasa_bench.results import columns
from sasa_bench.results.columns import COLUMNS, EXTRAS, Column, cells, charted, column
from sasa_bench.results.file import read
from sasa_bench.results.record import Record

EVERY = COLUMNS | EXTRAS


@pytest.mark.parametrize("name", [name for name in EVERY if name.endswith(("_s", "_bytes", "_mhz", "_j"))])
def test_a_name_ends_with_the_unit_of_what_is_stored(name: str) -> None:
    unit = {"s": "s", "bytes": "B", "mhz": "MHz", "j": "J"}[name.rpartition("_")[2]]
    assert EVERY[name].unit == ("FLOP/s" if name == "flops_per_s" else unit)


@pytest.mark.parametrize("name", EVERY)
def test_bounds_are_columns_of_the_same_kind(name: str) -> None:
    for bound in EVERY[name].bounds or ():
        assert EVERY[bound].kind is EVERY[name].kind


@pytest.mark.parametrize("value", [None, math.nan, pd.NA])
@pytest.mark.parametrize("name", EVERY)
def test_a_missing_value_is_written_as_nothing(name: str, value: object) -> None:
    assert EVERY[name].text(value) == ""


@pytest.mark.parametrize(
    ("name", "stored", "text", "heading", "cell"),
    [
        ("time_median_s", 0.00213, "2.13 ms", "time, ms", 2.13),
        ("flops", 185e6, "185 MFLOP", "MFLOP", 185.0),
        ("peak_memory_bytes", 3670016, "3.5 MiB", "peak memory, MiB", 3.5),
        ("roofline_fraction", 0.0432, "4.3 %", "of roofline, %", 4.32),
        ("time_vs_conv3x3", 1.23456, "1.23", "time / conv3x3", 1.235),
        ("export_s", 1.5, "1.5 s", "export, s", 1.5),
        ("model_bytes", 2048, "2 KiB", "file, KiB", 2.0),
    ],
)
def test_a_value_is_scaled_for_a_text_and_for_a_sortable_table(
    name: str, stored: float, text: str, heading: str, cell: float
) -> None:
    found = column(name)
    assert (found.text(stored), found.heading, found.scaled(stored)) == (text, heading, cell)


def test_ticks_and_tooltips_write_the_same_value_with_more_or_fewer_digits() -> None:
    assert column("time_median_s").kind.tick.of("datum.y") == "format(datum.y, '~s') + 's'"
    assert column("time_median_s").kind.tick.of("datum.y", 3) == "format(datum.y, '.3~s') + 's'"


def test_what_a_row_stores_has_a_column() -> None:
    inside = {"case", "samples_s", "inner_count", "worker_samples", "cold_samples_s", "extra"}
    assert {field.name for field in fields(Record)} - inside <= set(COLUMNS)


def test_times_come_first_then_ratios() -> None:
    assert list(charted())[:2] == ["time_median_s", "time_vs_conv3x3"]
    assert list(cells(COLUMNS))[:4] == ["time_median_s", "time_p20_s", "time_p80_s", "time_vs_conv3x3"]


def test_a_new_metric_is_one_entry_and_reaches_the_table_the_report_and_the_loaded_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read([factory.results_file(tmp_path / "plain.jsonl", factory.sweep())])
    metric = Column("cycles", columns.LARGE_COUNT, cell="cycles", title="cycles of a call")
    monkeypatch.setitem(EXTRAS, "cycle_count", metric)
    monkeypatch.setattr(sweep, "QUANTITIES", charted())
    rows = [factory.record("unfold", extra={"cycle_count": 12_000}), factory.record("blocked")]
    path = factory.results_file(tmp_path / "a.jsonl", rows)
    table = load(path)
    assert table["cycle_count"].dtype == "Int64"
    assert display(table, ["cycle_count", "status"])["cycles"].tolist() == ["12 k", ""]
    page = report.html(read([path]))
    assert "cycles, k" in page
    assert "cycles of a call" in page
    assert "cycles of a call" not in report.html(plain)
