"""Files of pytest-benchmark as results; tests/test_pytest_plugin.py reads one that pytest-benchmark wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import factory
import pytest

from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.pytest_benchmark import MARK, extra_info, parse
from sasa_bench.results.record import ImplInfo, Record

OTHER = {"name": "test_sum", "extra_info": {}, "stats": {"data": [1.0], "iterations": 1}}


def benchmark(record: Record) -> dict[str, Any]:
    info = ImplInfo(record.impl, record.op, "made up", 3)
    return {
        "name": record.impl,
        "extra_info": extra_info(record.to_dict(), asdict(info), factory.machine()),
        "stats": {"data": list(record.samples_s), "iterations": record.inner_count},
    }


def written(path: Path, benchmarks: list[dict[str, Any]], **indent: int) -> Path:
    path.write_text(json.dumps({"machine_info": {}, "version": "5.3.1", "benchmarks": benchmarks}, **indent))
    return path


@pytest.mark.parametrize("indent", [{}, {"indent": 4}], ids=["compact", "indented"])
def test_rows_machines_and_implementations_come_back(tmp_path: Path, indent: dict[str, int]) -> None:
    records = [factory.record("unfold", extra={"build_s": 0.5}), factory.record("conv3x3")]
    found = read([written(tmp_path / "b.json", [benchmark(record) for record in records], **indent)])
    assert found.rows == records
    assert found.machines == {factory.machine().id: factory.machine()}
    assert found.impls["unfold"] == ImplInfo("unfold", "local_attention", "made up", 3)
    assert not found.warnings


def test_other_benchmarks_in_the_file_are_left_out_with_a_warning(tmp_path: Path) -> None:
    found = read([written(tmp_path / "b.json", [benchmark(factory.record()), OTHER])])
    assert len(found.rows) == 1
    assert "1 benchmarks that are no cases" in found.warnings[0]


def test_it_is_read_beside_a_results_file(tmp_path: Path) -> None:
    lines = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    document = written(tmp_path / "b.json", [benchmark(replace(factory.record(), suite="other"))])
    assert len(read([lines, document]).rows) == 13


def without_samples() -> dict[str, Any]:
    found = benchmark(factory.record())
    del found["stats"]["data"]
    return found


def without(key: str) -> dict[str, Any]:
    found = benchmark(factory.record())
    del found["extra_info"][key]
    return found


@pytest.mark.parametrize(
    ("benchmarks", "words"),
    [
        ([without_samples()], "without its samples.*--benchmark-json"),
        ([without("case")], "lacks 'case'"),
        ([without("impl")], "cannot be used"),
        ([without(MARK)], "no case of a suite"),
        ([OTHER], "no case of a suite"),
        ([], "no case of a suite"),
    ],
    ids=["no samples", "no case", "no impl", "no mark", "other", "empty"],
)
def test_a_file_without_usable_cases_is_refused(tmp_path: Path, benchmarks: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ResultsError, match=rf"b\.json.*{words}"):
        read([written(tmp_path / "b.json", benchmarks)])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "row"}', '{"benchmarks": 1, "machine_info": {}}', "{}\n{}"])
def test_other_text_is_not_taken_for_one(text: str) -> None:
    assert parse(text) is None
