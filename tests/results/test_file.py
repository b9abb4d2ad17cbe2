from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import factory
import pytest

from sasa_bench.case import Case
from sasa_bench.results.file import ResultsError, Writer, append_line, read, replace_text
from sasa_bench.results.machine import Machine
from sasa_bench.results.record import Conditions, Record, Roof
from sasa_bench.timing.probe import detect


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    row = factory.record(case=Case(resolution="6x10", threads=2), extra={"build_s": 1.5})
    found = read([factory.results_file(tmp_path / "a.jsonl", [row])])
    assert found.rows == [row]
    assert found.machines == {factory.machine().id: factory.machine()}
    assert found.impls["unfold"].op == "local_attention"
    assert not found.warnings


def test_this_machine_survives_its_dictionary() -> None:
    machine = detect()
    assert Machine.from_dict(machine.to_dict()) == machine
    assert machine.cores >= 1
    assert machine.libraries["torch"]


def test_software_does_not_change_the_name_of_the_hardware() -> None:
    other = factory.machine(libraries={"torch": "9"}, commit="f" * 12, dirty=True)
    assert other.hardware_id == factory.machine().hardware_id
    assert other.id != factory.machine().id
    assert factory.machine(cores=4).hardware_id != factory.machine().hardware_id


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_cut_last_line_is_left_out_with_a_warning_and_then_written_over(tmp_path: Path, cut: int) -> None:
    rows = factory.sweep()
    path = factory.results_file(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes()[:-cut])
    found = read([path])
    assert len(found.rows) == len(rows) - (cut > 1) or found.rows == rows
    if cut > 1:
        assert "cut off" in found.warnings[0]
    with Writer(path) as writer:
        writer.rows([rows[-1]])
    assert read([path]).rows == rows
    assert not read([path]).warnings


def test_a_file_whose_last_run_did_not_end_says_so(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    for moment, stopped in (("before", True), ("before", True), ("after", False), ("before", True)):
        with Writer(path) as writer:
            writer.conditions(Conditions(machine=factory.machine().id, moment=moment, at="2026-01-01T00:00:00+00:00"))
        found = read([path])
        assert found.stopped == stopped
        assert [f"{path} has no end" in sentence for sentence in found.warnings] == [True] * stopped
    ended = factory.results_file(tmp_path / "b.jsonl", factory.sweep())
    assert len(read([path, ended]).warnings) == len(read([ended, path]).warnings) == 1


@pytest.mark.parametrize(
    "content", ["", "hello\n", '{"a": 1}\n', "[1, 2]\n", '{"kind": "row"}\n', '{"kind": "tale"}\n', "\x00\xff"]
)
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ResultsError, match=r"a\.jsonl"):
        read([path])


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:30]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultsError, match="line 5"):
        read([path])


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ResultsError, match="no such results file"):
        read([Path("nowhere.jsonl")])


def test_rows_of_later_versions_may_have_more_fields(tmp_path: Path) -> None:
    values = factory.record().to_dict() | {"invented_later": 1}
    assert Record.from_dict(values) == factory.record()


def test_the_last_of_two_rows_of_one_case_counts(tmp_path: Path) -> None:
    first, second = factory.record(median_s=0.01), factory.record(median_s=0.02)
    other = factory.record("conv3x3")
    path = factory.results_file(tmp_path / "a.jsonl", [first, other, second])
    assert read([path]).rows == [other, second]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("samples_s", [0.1, float("nan")], "out of range"),
        ("samples_s", [0.1, -0.1], "a time of 0 s or less"),
        ("samples_s", "abc", "is no tuple"),
        ("suite", ["a"], "is no str"),
        ("flops", 1e99, "no whole number"),
        ("flops", 10**4000, "a huge number"),
        ("status", "fine", "is not one of ok, skipped"),
        ("extra", {"build_s": float("inf")}, "out of range"),
    ],
)
def test_a_value_that_no_row_can_have_is_named(tmp_path: Path, field: str, value: object, said: str) -> None:
    line = factory.record().to_dict() | {field: value}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ResultsError, match=said):
        read([path])


def test_control_characters_of_a_foreign_file_are_spelled_out_and_colours_left_out(tmp_path: Path) -> None:
    reason = "\x1b[31mred\x1b[0m\x1b[2J\x00\nnext \u202egnp.exe"
    row = factory.failed("naive", "error", reason, suite="a\x1b]0;title\x07")
    (found,) = read([factory.results_file(tmp_path / "a.jsonl", [row])]).rows
    assert found.reason == "red\\x1b[2J\\x00 next \\u202egnp.exe"
    assert found.suite == "a\\x1b]0;title\\x07"


@pytest.mark.parametrize("kind", ["folder", "below a file", "read-only"])
def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    path = {"folder": tmp_path, "below a file": tmp_path / "file" / "a.jsonl", "read-only": Path("/proc/a.jsonl")}[kind]
    with pytest.raises(ResultsError, match=r"cannot be written \(.*\): give --out another path"):
        Writer(path)


def test_a_full_disk_takes_back_the_rows_in_progress_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    before = path.read_bytes()
    with Writer(path) as writer:
        room = [100]

        def write(content: memoryview) -> int:
            taken = min(len(content), room[0])
            room[0] -= taken
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole.write(content[:taken])

        whole = writer.file
        writer.file = SimpleNamespace(
            write=write, seek=whole.seek, truncate=whole.truncate, fileno=whole.fileno, close=whole.close
        )
        with pytest.raises(ResultsError, match=r"No space left on device.*rows written before are kept"):
            writer.rows([factory.record("conv3x3")])
    assert path.read_bytes() == before


def test_a_figure_that_has_the_name_of_a_column_is_refused(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", [factory.record(extra={"time_median_s": 1e-6})])
    with pytest.raises(ResultsError, match="extra has time_median_s"):
        read([path])


def test_a_page_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.html"
    replace_text(path, "whole")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "another")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_line_is_appended_behind_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    for number in range(2):
        append_line(path, {"number": number})
    path.write_bytes(path.read_bytes() + b'{"number": 2')
    append_line(path, {"number": 3})
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1, 3]


def test_measured_results_are_not_replaced_by_what_is_made_of_them(tmp_path: Path) -> None:
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    benchmarks = tmp_path / "b.json"
    benchmarks.write_text('{\n    "machine_info": {}, "benchmarks": []}')
    (tmp_path / "link").symlink_to(results)
    for path in (results, benchmarks, tmp_path / "link"):
        before = path.read_bytes()
        with pytest.raises(ResultsError, match="holds measured results, which this would replace: give --out another"):
            replace_text(path, "a page")
        assert path.read_bytes() == before


def test_a_link_and_what_is_no_file_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_text(tmp_path / "pipe", "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read([path]).rows == factory.sweep()


def test_other_versions_and_variables_on_one_kind_of_hardware_are_named(tmp_path: Path) -> None:
    old, new = factory.machine(), factory.machine(libraries={"torch": "2.14.0"}, environment={"OMP_DYNAMIC": "true"})
    files = [
        factory.results_file(tmp_path / f"{number}.jsonl", [factory.record(machine=made_on.id)], made_on)
        for number, made_on in enumerate((old, new))
    ]
    said = " ".join(read(files).warnings)
    assert "differ in the library torch (2.13.0, 2.14.0)" in said
    assert "differ in the variable OMP_DYNAMIC (absent, true)" in said
    assert read(files[:1]).warnings == []


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    """As an editor may leave it: it is read, so it must not be written over."""
    path = factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold"), factory.record("blocked")])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [row.impl for row in read([path]).rows] == ["unfold", "blocked"]
    with Writer(path) as writer:
        writer.rows([factory.record("naive")])
    assert [row.impl for row in read([path]).rows] == ["unfold", "blocked", "naive"]


def test_the_roof_of_several_files_is_the_best_of_them_in_any_order(tmp_path: Path) -> None:
    paths = [factory.results_file(tmp_path / f"{name}.jsonl", [factory.record(name)]) for name in ("unfold", "naive")]
    with Writer(paths[1]) as writer:
        writer.roof(Roof(factory.machine().id, "cpu", "float32", 2, 1e11, 9e10))
    for order in (paths, paths[::-1]):
        (roof,) = read(order).roofs.values()
        assert (roof.peak_flops_per_s, roof.bandwidth_bytes_per_s) == (2e11, 9e10)


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"node_count": 2.5}, "whole number"), ({"export_s": "n/a"}, "give a number"), ({"clock": True}, "give a number")],
)
def test_a_known_figure_of_another_kind_is_refused(tmp_path: Path, extra: dict[str, object], said: str) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", [factory.record(extra=extra)])
    with pytest.raises(ResultsError, match=said):
        read([path])


def test_samples_that_are_not_those_of_its_workers_are_refused(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", [factory.record(count=14, worker_samples=(0, 7, 6))])
    with pytest.raises(ResultsError, match="worker_samples"):
        read([path])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples_s": []}, "status = 'ok' with 0 samples"),
        ({"status": "error"}, "status = 'error' with 21 samples"),
        ({"worker_samples": [21, 0]}, "a worker without samples"),
    ],
)
def test_a_row_whose_status_and_samples_disagree_is_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    row = factory.record("unfold").to_dict()
    (tmp_path / "a.jsonl").write_text(json.dumps(row | changes) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ResultsError, match=re.escape(said)):
        read([tmp_path / "a.jsonl"])


def test_two_runs_do_not_write_one_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Writer(path) as writer:
        writer.machine(factory.machine())
        with pytest.raises(ResultsError, match=r"another process writes to .*a\.jsonl: wait until it ends"):
            Writer(path)
        with Writer(path, locked=True) as other:
            other.rows([factory.record()])
    with Writer(path) as writer:
        writer.rows([factory.record("conv3x3")])
    assert len(read([path]).rows) == 2
