from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from browser import Browser

from sasa_bench.case import Case
from sasa_bench.report import report
from sasa_bench.report.findings import exports
from sasa_bench.results.file import read
from sasa_bench.results.record import Record, Results

CASES = [Case(threads=2, resolution=resolution) for resolution in (14, 28, 56)]
EXPORT = {"export_s": 1.5, "model_bytes": 2048, "node_count": 30, "optimised_node_count": 20}


def results(tmp_path: Path, rows: list[Record]) -> Results:
    return read([factory.results_file(tmp_path / "a.jsonl", rows)])


def rows(times: dict[str, float], cases: list[Case] = CASES, **changes: object) -> list[Record]:
    """A row for each case and implementation, its time in ms at the first case given."""
    return [
        factory.record(name, 1e-3 * ms * (1 + i), case=case, extra=EXPORT if name in factory.EXPORTS else {}, **changes)
        for i, case in enumerate(cases)
        for name, ms in times.items()
    ]


def sentences(tmp_path: Path, made: list[Record]) -> list[str]:
    return list(exports.answers(exports.pairs(results(tmp_path, made))))


def test_a_file_is_paired_with_the_formulation_it_was_exported_from(tmp_path: Path) -> None:
    found = exports.pairs(results(tmp_path, rows({"unfold": 2, "unfold_file": 6, "blocked_file": 1}, CASES[:1])))
    assert [(pair.info.name, pair.torch and pair.torch.impl) for pair in found] == [
        ("unfold_file", "unfold"),
        ("blocked_file", None),
    ]
    assert found[0].ratio is not None
    assert found[0].ratio.value == pytest.approx(3, rel=0.05)
    assert found[1].ratio is None


def test_the_table_holds_times_export_size_and_nodes_of_each_file(tmp_path: Path) -> None:
    made = rows({"blocked": 3, "blocked_file": 1, "blocked_any_size": 2, "kernel_file": 1})
    shown, words = exports.table(exports.pairs(results(tmp_path, made)))
    assert len(shown) == 9
    assert words == ["resolution", "formulation", "file", "sizes", "operators"]
    first = shown[shown["resolution"] == "14"].set_index("file")
    assert first["sizes"].to_dict() == {
        "blocked_file": "one size",
        "blocked_any_size": "every size",
        "kernel_file": "one size",
    }
    assert first["operators"]["kernel_file"] == "its own library"
    assert first["PyTorch, ms"]["blocked_any_size"] == pytest.approx(3, rel=0.05)
    assert first["ONNX Runtime, ms"]["blocked_any_size"] == pytest.approx(2, rel=0.05)
    assert (
        first["95 %, from"]["blocked_file"]
        < first["ONNX Runtime / PyTorch"]["blocked_file"]
        < first["to"]["blocked_file"]
    )
    assert first["PyTorch, ms"].isna()["kernel_file"]
    assert (shown["export, s"] == 1.5).all()
    assert (shown["file, KiB"] == 2).all()
    assert (shown["nodes"] == 30).all()
    assert (shown["nodes, optimised"] == 20).all()


def test_the_fastest_file_is_recommended_with_figures(tmp_path: Path) -> None:
    fast = random.uniform(0.5, 1.5)
    times = {"unfold": 4 * fast, "unfold_file": 9 * fast, "blocked": 2 * fast, "blocked_file": fast}
    (said,) = sentences(tmp_path, rows(times))
    assert said.startswith("The formulation to export is that of `blocked`, as `blocked_file` does: it is the fastest")
    lead, _, against = said.partition(", and takes ")
    assert figures(lead.partition("points, ")[2]) == pytest.approx([9, 9, 9, 9], rel=0.1)
    assert figures(against) == pytest.approx([0.5, 0.5, 0.5, 0.5], rel=0.1)
    assert said.endswith("times as long as `blocked` in PyTorch.")


def figures(said: str) -> list[float]:
    """The ends of the span of a ratio, and those of its interval."""
    found = re.match(r"([\d.]+)(?: to ([\d.]+))? \(95 %: ([\d.]+) to ([\d.]+)\)", said)
    assert found, said
    low, high, *ends = found.groups()
    return [float(low), float(high or low), *map(float, ends)]


def test_beside_a_file_that_needs_a_library_one_of_standard_operators_is_recommended(tmp_path: Path) -> None:
    first, second = sentences(tmp_path, rows({"unfold_file": 9, "blocked_file": 3, "kernel_file": 1}))
    assert "as `kernel_file` does, with its library: " in first
    assert "if it may use standard operators alone, is that of `blocked`, as `blocked_file` does: " in second


def test_what_open_sizes_cost_is_told_apart_from_the_choice(tmp_path: Path) -> None:
    (said,) = sentences(tmp_path, rows({"blocked_file": 1, "blocked_any_size": 1.5}))
    assert said.startswith("One file for every size (`blocked_any_size`) takes 1.5")
    assert said.endswith("times as long as `blocked_file`.")
    fixed = rows({"blocked_file": 1})
    (said,) = sentences(tmp_path, fixed + [replace(row, impl="blocked_any_size") for row in fixed])
    assert said.endswith("times as long as `blocked_file`: too close to call.")


@pytest.mark.parametrize(
    "made",
    [
        rows({"blocked_file": 1}),
        rows({"blocked": 1, "unfold": 2}),
        rows({"blocked_file": 1, "unfold_file": 1}, noise=0.2),
        rows({"blocked_file": 1, "unfold_file": 5}, count=3),
        rows({"blocked_file": 1, "unfold_file": 2}, CASES[:2]) + rows({"blocked_file": 2, "unfold_file": 1}, CASES[2:]),
    ],
    ids=["one file", "no file", "too close", "too few samples", "beaten somewhere"],
)
def test_where_the_rows_decide_nothing_nothing_is_said(made: list[Record], tmp_path: Path) -> None:
    assert sentences(tmp_path, made) == []


def test_a_file_written_before_exports_were_known_is_read_without_them(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", rows({"blocked": 1, "blocked_file": 2}))
    old = []
    for line in map(json.loads, path.read_text().splitlines()):
        if line["kind"] == "impl":
            line = {key: line[key] for key in ("kind", "name", "op", "summary", "index")}
        old.append(json.dumps(line) + "\n")
    path.write_text("".join(old))
    found = read([path])
    assert len(found.rows) == 6
    assert exports.pairs(found) == []
    assert "Which formulation to export" not in report.html(found)


def test_the_report_shows_the_table_and_the_sentence(browser: Browser, tmp_path: Path) -> None:
    made = rows({"blocked": 3, "blocked_file": 1, "unfold": 4, "unfold_file": 9, "conv3x3": 1})
    report.write(results(tmp_path, made), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    browser.wait_for("return document.querySelectorAll('#exported tbody tr').length == 6")
    text = browser.ask("return document.body.innerText")
    assert "The formulation to export is that of blocked, as blocked_file does: it is the fastest file" in text
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length == 15")
    assert browser.complaints() == []
