from __future__ import annotations

import io
import json
import re
from pathlib import Path

import factory
import pandas as pd
import pytest

from sasa_bench.case import AXES, Case
from sasa_bench.report import report
from sasa_bench.report.charts.roofline import roofline
from sasa_bench.report.sections import rows_table
from sasa_bench.report.styles import style
from sasa_bench.report.table import FORMATS, above_roof, display, frame, load, render, reported_statuses
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.record import Results

CONTRACT = """suite, impl, op, status, reason,
scope, kernel_size, channels, heads, resolution, batch, position, border, dtype, device, mode, threads, network, stem,
attention_groups, memory_format,
time_median_s, time_p20_s, time_p80_s, sample_count, flops, params, min_bytes, peak_memory_bytes, memory_source,
max_abs_err, err_budget, flops_per_s, roofline_fraction, time_vs_conv3x3,
time_vs_conv3x3_low, time_vs_conv3x3_high, best_conv3x3, time_vs_best_conv3x3, time_vs_best_conv3x3_low,
time_vs_best_conv3x3_high, needed_flops, machine, commit, started_at"""


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    rows = [*factory.sweep(), factory.failed("naive", "error", "RuntimeError: boom")]
    return load(factory.results_file(tmp_path / "a.jsonl", rows))


def test_the_columns_are_those_of_the_contract(table: pd.DataFrame) -> None:
    names = [name.strip() for name in CONTRACT.replace("\n", " ").split(",")]
    assert list(COLUMNS) == names
    assert list(pd.read_csv(io.BytesIO(render(table, "csv"))).columns)[: len(names)] == names
    assert set(AXES) <= set(names)


def test_quantiles_and_rates_follow_from_the_samples(table: pd.DataFrame) -> None:
    ok = table[table.status == "ok"]
    assert (ok.time_p20_s <= ok.time_median_s).all()
    assert (ok.time_median_s <= ok.time_p80_s).all()
    assert ((ok.flops_per_s * ok.time_median_s / ok.flops.astype(float)) - 1).abs().max() < 1e-12


def test_times_are_divided_by_the_convolution_of_the_same_case(table: pd.DataFrame) -> None:
    unfold = table[table.impl == "unfold"].set_index("kernel_size")
    assert unfold.time_vs_conv3x3[9] == pytest.approx(0.081 / 0.0022, rel=0.05)
    assert (table[table.impl == "conv3x3"].time_vs_conv3x3 == 1).all()


def test_the_baseline_of_another_suite_or_machine_does_not_count(tmp_path: Path) -> None:
    other = factory.machine(cores=64)
    first = factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold")])
    second = factory.results_file(tmp_path / "b.jsonl", [factory.record("conv3x3", machine=other.id)], other)
    assert load(first, second).time_vs_conv3x3.isna()[0]
    third = factory.results_file(tmp_path / "c.jsonl", [factory.record("unfold"), factory.record("conv3x3", suite="s")])
    assert load(third).time_vs_conv3x3.isna()[0]


def test_the_roofline_fraction_is_least_time_over_time(table: pd.DataFrame) -> None:
    row = table[(table.impl == "unfold") & (table.kernel_size == 9)].iloc[0]
    assert row.roofline_fraction == pytest.approx(max(row.flops / 2e11, row.min_bytes / 3e10) / row.time_median_s)


def test_a_row_that_beats_its_roof_has_no_fraction_of_it_and_says_so(tmp_path: Path) -> None:
    slow, quick = factory.record("unfold", 1.0), factory.record("blocked", 1e-5)
    table = load(factory.results_file(tmp_path / "a.jsonl", [slow, quick])).set_index("impl")
    assert 0 < table.roofline_fraction["unfold"] < 1
    assert pd.isna(table.roofline_fraction["blocked"])
    assert table.above_roof["blocked"] > 1


def test_a_row_that_beats_its_roof_is_marked_wherever_people_read_it(tmp_path: Path) -> None:
    slow, quick = factory.record("unfold", 1.0), factory.record("blocked", 1e-5)
    results = read([factory.results_file(tmp_path / "a.jsonl", [slow, quick])])
    table = frame(results)
    (sentence,) = above_roof(table)
    assert sentence.startswith(f"1 row is faster than the measured roof, by up to {table.above_roof.max():.0f} times")
    assert reported_statuses(table) == ["ok", "ok, faster than the measured roof"]
    assert sentence in render(table, "text").decode()
    assert sentence.replace("'", "&#39;") in report.html(results)
    chart = json.dumps(roofline(table, list(results.roofs.values()), style(results.impls, ["blocked", "unfold"])))
    assert "'faster than the measured roof'" in chart
    assert '"impl": "blocked"' in chart


def test_no_row_is_marked_where_all_are_slower_than_their_roof(tmp_path: Path) -> None:
    table = load(factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold", 1.0)]))
    assert above_roof(table) == []
    assert not any("roof" in status for status in reported_statuses(table))


def test_a_failed_row_has_a_reason_and_no_time(table: pd.DataFrame) -> None:
    row = table[table.status == "error"].iloc[0]
    assert row.reason == "RuntimeError: boom"
    assert pd.isna(row.time_median_s)
    for form in ("text", "markdown", "csv"):
        assert "boom" in render(table, form).decode()


def test_parquet_and_csv_hold_the_same(table: pd.DataFrame) -> None:
    parquet = pd.read_parquet(io.BytesIO(render(table, "parquet")))
    csv = pd.read_csv(io.BytesIO(render(table, "csv")), keep_default_na=False, na_values=[""])
    assert list(parquet.columns) == list(csv.columns)
    assert parquet.time_median_s.dropna().tolist() == pytest.approx(csv.time_median_s.dropna().tolist())


def test_an_unknown_format_lists_the_known_ones(table: pd.DataFrame) -> None:
    with pytest.raises(ResultsError, match=", ".join(FORMATS)):
        render(table, "xls")


def test_text_shows_only_axes_that_vary(table: pd.DataFrame) -> None:
    head = render(table, "text").decode().splitlines()[0]
    assert "kernel size" in head
    assert "channels" not in head


def test_extra_figures_of_one_implementation_become_columns(tmp_path: Path) -> None:
    rows = [factory.record("unfold"), factory.record("other", extra={"node_count": 7}, case=Case(threads=1))]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows))
    assert table.node_count.tolist()[1] == 7
    assert pd.isna(table.node_count[0])


@pytest.mark.parametrize("noisy", ["unfold", "conv3x3"])
def test_the_table_says_of_which_rows_the_median_means_little(noisy: str, tmp_path: Path) -> None:
    uneven = tuple(0.08 if i % 20 < 11 else 0.8 for i in range(21))
    rows = [factory.record(n, 0.1, **({"samples_s": uneven} if n == noisy else {})) for n in ("unfold", "conv3x3")]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows))
    shown = display(table).set_index("implementation")
    assert (shown["status"] == "ok, too noisy").to_dict() == {n: n == noisy for n in ("unfold", "conv3x3")}
    assert shown.loc["unfold", "time / conv3x3"].endswith("(no interval)")
    assert (table.status == "ok").all()
    assert "ok, too noisy" in rows_table(table)


def test_a_foreign_text_is_no_formula_in_a_spreadsheet() -> None:
    row = factory.failed("naive", "error", '=HYPERLINK("http://x","y")', suite="@SUM(A1)")
    table = frame(Results([factory.record(median_s=0.01), row]))
    text = render(table, "csv").decode()
    assert "'=HYPERLINK" in text
    assert "'@SUM" in text
    again = pd.read_csv(io.StringIO(text))
    assert again["time_median_s"].max() == pytest.approx(0.01, rel=0.1)
    assert "'" not in again["impl"].str.cat()


def test_a_foreign_text_stays_in_its_cell_of_a_markdown_table() -> None:
    row = factory.failed("naive", "error", "a | b\n| c\x1b[2J |")
    lines = render(frame(Results([row])), "markdown").decode().splitlines()
    assert len(lines) == 3
    assert "a \\| b \\| c\\x1b[2J \\|" in lines[2]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert len(set(cells)) == 1


def test_a_figure_that_is_now_a_number_and_now_a_text_is_written_as_text(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [factory.record("unfold", extra={"tile": 8}), factory.record("blocked", extra={"tile": "auto"})]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows))
    again = pd.read_parquet(io.BytesIO(render(table, "parquet")))
    assert list(again["tile"]) == ["8", "auto"]
