"""The paper's tables: published figures, ours, and how near they are."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from click.testing import CliRunner

from sasa_bench.cli import cli
from sasa_bench.paper.tables import FORMATS, TABLES, Cell, cells, published, render, suite, timed
from sasa_bench.results.file import ResultsError
from sasa_bench.results.record import Results

EXPLAINED = {("T2", "attention, full attention backbone", "flops")}
"""Cells outside the target, with their arithmetic in docs/paper.md."""


def test_every_table_has_its_cells() -> None:
    counts = {table: sum(cell.table == table for cell in cells()) for table in TABLES}
    assert counts == {"T1": 18, "T2": 10, "T3": 16, "T4": 5, "T5": 6, "T6": 4, "T7": 3}


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: f"{cell.table} {cell.row} {cell.quantity}")
def test_a_cell_is_near_what_is_published_or_explained(cell) -> None:  # type: ignore[no-untyped-def]
    share = {"flops": 0.03, "params": 0.02}[cell.quantity]
    # What is published was rounded: 25.0 for a network of 25.1 is a difference of 0.1 in print.
    allowed = share * float(cell.paper) if cell.table == "T2" else 0.1 + 1e-2 * (cell.paper == "25.0")
    explained = (cell.table, cell.row, cell.quantity) in EXPLAINED
    assert (abs(cell.difference) > allowed) == explained


def test_an_explained_cell_stands_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    for table, row, quantity in EXPLAINED:
        ours = next(c.ours for c in cells() if (c.table, c.row, c.quantity) == (table, row, quantity))
        assert f"Table {table[1:]}, attention heads, full attention backbone: {ours:.1f} B" in text


def test_a_published_figure_is_the_one_of_the_paper() -> None:
    figures = {(p.table, p.row, p.quantity): p.paper for p in published()}
    assert figures["T1", "ResNet-50 baseline", "flops"] == "8.2"
    assert figures["T2", "attention, conv stem + attention backbone", "params"] == "22.0"
    assert figures["T3", "attention in 34", "params"] == "18.5"
    assert figures["T7", "spatial convolution for values", "flops"] == "7.4"


def test_csv_has_its_columns_and_one_line_a_cell() -> None:
    rows = list(csv.DictReader(io.StringIO(render(cells(), "csv"))))
    assert list(rows[0]) == ["table", "row", "quantity", "paper", "ours", "difference", "within_rounding"]
    assert len(rows) == len(cells())
    for row in rows:
        assert float(row["difference"]) == pytest.approx(float(row["ours"]) - float(row["paper"]))
        assert row["within_rounding"] in ("True", "False")


def test_text_and_markdown_show_every_table() -> None:
    for form in ("text", "markdown"):
        shown = render(cells(), form)
        assert all(table in shown for table in TABLES)
        assert "ResNet-38 full attention" in shown


def test_an_unknown_table_or_format_is_refused() -> None:
    with pytest.raises(ResultsError, match="there are T1, T2"):
        cells(("T8",))
    with pytest.raises(ResultsError, match=", ".join(FORMATS)):
        render(cells(), "html")


def test_times_stand_beside_the_figures_of_their_row() -> None:
    cases = suite(("T4",), ("unfold", "conv3x3"), "cpu").cases
    assert len(cases) == 10
    records = [
        factory.record(impl, median, case=case.with_(threads=2), suite="paper")
        for case in cases
        for impl, median in (("unfold", 2.0), ("conv3x3", 0.5))
    ]
    found = timed(("T4",), Results(records))
    assert {cell.quantity for cell in found} == {
        f"{kind}:{impl}" for kind in ("inference_s", "training_s") for impl in ("unfold", "conv3x3")
    }
    assert len(found) == 20
    for cell in found:
        assert cell.ours == pytest.approx(2.0 if cell.quantity.endswith("unfold") else 0.5, rel=0.1)
        assert (cell.paper, cell.difference, cell.within_rounding) == ("", None, None)
    assert "inference, s, unfold" in render([*cells(("T4",)), *found], "text")
    one = [replace(record, case=record.case.with_(threads=1)) for record in records]
    both = {cell.quantity for cell in timed(("T4",), Results([*records, *one]))}
    assert {"inference_s:unfold, 1 threads", "inference_s:unfold, 2 threads"} <= both


def test_a_file_without_networks_and_two_sources_of_times_are_named(tmp_path: Path) -> None:
    file = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    said = CliRunner().invoke(cli, ["paper", "--table", "T4", "--results", str(file)])
    assert "has no row of these networks" in said.output
    assert CliRunner().invoke(cli, ["paper", "--time", "--results", str(file)]).exit_code == 2


def test_the_verb_prints_and_writes_the_tables(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["paper", "--table", "T4"], standalone_mode=False)
    assert said.exception is None
    assert "11 x 11" in said.output
    out = tmp_path / "new" / "paper.csv"
    CliRunner().invoke(cli, ["paper", "--format", "csv", "--out", str(out)], standalone_mode=False)
    assert out.read_text().startswith("table,row,quantity,paper,ours,difference,within_rounding\n")


@pytest.mark.parametrize(("difference", "printed"), [(-0.001, "+0.00"), (-0.006, "-0.01"), (0.004, "+0.00")])
def test_a_difference_that_rounds_to_zero_has_no_minus(difference: float, printed: str) -> None:
    text = render([Cell("T1", "ResNet-26", "flops", "4.7", 4.7, difference, True)], "text")
    assert printed in text
    assert "-0.00" not in text
