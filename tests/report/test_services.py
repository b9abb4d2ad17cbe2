from __future__ import annotations

import json
from pathlib import Path

import factory
import pytest

from sasa_bench.case import Case
from sasa_bench.report.services import EXPORTS, named
from sasa_bench.report.table import frame, render
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.record import Record


def exported(path: Path, form: str, rows: list[Record]) -> object:
    return json.loads(render(frame(read([factory.results_file(path / f"{len(rows)}.jsonl", rows)])), form))


def test_github_action_benchmark_reads_a_list_of_medians_in_milliseconds(tmp_path: Path) -> None:
    record = factory.record("unfold", 0.0123, case=Case(kernel_size=5, threads=2))
    entries = exported(tmp_path, "github-action-benchmark", [record, factory.failed("naive", "wrong", "off")])
    assert isinstance(entries, list)
    (entry,) = entries
    assert set(entry) == {"name", "unit", "value", "range", "extra"}
    assert entry["name"] == "kernel_size/unfold: kernel_size=5 threads=2"
    assert entry["unit"] == "ms"
    assert entry["value"] == pytest.approx(12.3, rel=0.03)
    low, high = (float(bound) for bound in entry["range"].split(" – "))
    assert low <= entry["value"] <= high
    assert f"FLOPs: {record.flops}" in entry["extra"].splitlines()


def test_bencher_reads_latencies_in_nanoseconds_with_their_bounds(tmp_path: Path) -> None:
    document = exported(tmp_path, "bencher", [*factory.sweep(), factory.failed("naive", "error", "boom")])
    assert isinstance(document, dict)
    assert len(document) == 12
    for measures in document.values():
        latency = measures["latency"]
        assert set(measures) == {"latency"}
        assert 0 < latency["lower_value"] <= latency["value"] <= latency["upper_value"]
    convolution = document["kernel_size/conv3x3: kernel_size=3 threads=2"]["latency"]
    assert convolution["value"] == pytest.approx(2.2e6, rel=0.03)


@pytest.mark.parametrize("form", EXPORTS)
def test_a_row_keeps_its_name_whatever_else_is_in_the_table(tmp_path: Path, form: str) -> None:
    rows = factory.sweep()
    alone = exported(tmp_path, form, rows[:1])
    beside = exported(tmp_path, form, rows)
    if isinstance(alone, dict) and isinstance(beside, dict):
        assert alone.items() <= beside.items()
    else:
        assert alone[0] in beside


def test_what_has_no_name_of_its_own_or_no_time_is_not_exported(tmp_path: Path) -> None:
    other = factory.machine(cores=64)
    files = [
        factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold")]),
        factory.results_file(tmp_path / "b.jsonl", [factory.record("unfold", machine=other.id)], other),
    ]
    with pytest.raises(ResultsError, match="one machine and revision at a time"):
        list(named(frame(read(files))))
    with pytest.raises(ResultsError, match="no row has a time"):
        exported(tmp_path, "bencher", [factory.failed("naive", "error", "boom")])
