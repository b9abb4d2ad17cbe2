"""What --resume measures again, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import factory
import pytest
from tasks import INFOS, SUITE

from sasa_bench.results.file import ResultsError, Writer
from sasa_bench.results.record import Results
from sasa_bench.sweep.plan import PlanError, open_results, plan, require_distinct

ROWS = [factory.record(impl, suite=SUITE.name, case=case) for case in SUITE.cases for impl in INFOS]


def test_a_case_without_one_of_its_rows_is_measured_whole() -> None:
    work = plan([SUITE], (), INFOS, Results(ROWS[:-1]))
    assert [(task.case, task.impls) for task in work.tasks] == [(SUITE.cases[-1], tuple(INFOS))]
    assert (work.done, work.rows) == (len(ROWS) - 2, 2)


def test_nothing_is_left_of_a_whole_file() -> None:
    work = plan([SUITE], (), INFOS, Results(ROWS))
    assert (work.tasks, work.done) == ([], len(ROWS))


def test_a_kernel_file_that_has_changed_is_measured_again_with_its_rivals() -> None:
    was, now = (INFOS | {"unfold": replace(INFOS["unfold"], digest=digest)} for digest in ("aaa", "bbb"))
    rows = [replace(row, extra=was[row.impl].source) for row in ROWS]
    assert plan([SUITE], (), was, Results(rows)).tasks == []
    assert plan([SUITE], (), now, Results(rows)).rows == len(ROWS)


def test_rows_of_other_library_versions_are_not_gone_on_with(tmp_path: Path) -> None:
    out = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    with pytest.raises(ResultsError, match=r"torch 2\.13\.0, now 2\.14\.0.*give another --out"):
        open_results(out, True, factory.machine(libraries={"torch": "2.14.0"}))
    assert open_results(out, True, factory.machine(libraries={"torch": "2.13.0", "timm": "1"})) is not None


@pytest.mark.parametrize("code", ["", "aaa"])
@pytest.mark.parametrize("here", [{"commit": "f" * 12, "code": "bbb"}, {"dirty": True, "code": "bbb"}])
def test_rows_of_another_sasa_bench_are_not_gone_on_with(code: str, here: dict[str, Any], tmp_path: Path) -> None:
    then = factory.machine(code=code)
    rows = [factory.record(machine=then.id)]
    out = factory.results_file(tmp_path / "a.jsonl", rows, then)
    now = factory.machine(**here)
    with pytest.raises(
        ResultsError, match=rf"another sasa-bench \(0123456789ab; this is {re.escape(now.revision)}.*--out"
    ):
        open_results(out, True, now)


def test_a_file_from_before_digests_is_gone_on_with_at_its_revision(tmp_path: Path) -> None:
    out = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    assert open_results(out, True, factory.machine(code="bbb")) is not None


def test_another_revision_of_the_same_code_and_another_environment_are_named(tmp_path: Path) -> None:
    then = factory.machine(code="aaa")
    out = factory.results_file(tmp_path / "a.jsonl", [factory.record(machine=then.id)], then)
    here = factory.machine(commit="f" * 12, code="aaa", python="3.12.1", environment={"LD_PRELOAD": "libjemalloc.so"})
    known = open_results(out, True, here)
    assert known is not None
    said = " ".join(known.warnings)
    for words in (
        f"rows of sasa-bench 0123456789ab, and this is {'f' * 12}",
        "rows of Python 3.11.7, and this is 3.12.1",
        "GOMP_SPINCOUNT 20000, now unset",
        "LD_PRELOAD unset, now libjemalloc.so",
    ):
        assert words in said


def test_a_folder_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is a folder: name a results file"):
        open_results(tmp_path, True, factory.machine())


@pytest.mark.parametrize("resume", [True, False])
def test_a_device_and_a_path_below_a_file_are_no_results_files(resume: bool, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="/dev/null is a device or a pipe: name a results file"):
        open_results(Path("/dev/null"), resume, factory.machine())
    (tmp_path / "a").write_text("")
    with pytest.raises(ResultsError, match=r"/a is a file, so there can be no .*/a/b\.jsonl: give --out another path"):
        open_results(tmp_path / "a" / "b.jsonl", resume, factory.machine())


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(PlanError, match=r"v1/k.py and v2/k.py are both called 'mine'.*name of its own"):
        require_distinct({"v1/k.py": "mine", "unfold": "unfold", "v2/k.py": "mine"})


def test_cases_that_also_have_rows_of_others_measured_earlier_are_counted() -> None:
    case = SUITE.cases[0].with_(threads=2)
    had = Results(rows=[factory.record("conv1x1", suite=SUITE.name, case=case)])
    names = list(INFOS)
    assert plan([replace(SUITE, cases=(case,))], names, INFOS, had).beside == ("conv1x1" not in names)
    assert plan([replace(SUITE, cases=(case,))], names, INFOS).beside == 0


def test_rows_that_were_skipped_are_tried_again_once_a_package_was_added(tmp_path: Path) -> None:
    rows = [*factory.sweep(), factory.failed("onnx", "skipped", "onnxruntime is not installed")]
    out = factory.results_file(tmp_path / "a.jsonl", rows)
    libraries = factory.machine().libraries | {"onnxruntime": "1.32"}
    known = open_results(out, True, factory.machine(libraries=libraries))
    assert known is not None
    assert "skipped" not in {row.status for row in known.rows}
    assert len(known.rows) == len(known.files) == len(rows) - 1
    assert any("was measured without onnxruntime: skipped rows are tried again" in said for said in known.warnings)
    unchanged = open_results(out, True, factory.machine())
    assert unchanged is not None
    assert len(unchanged.rows) == len(rows)


def test_rows_that_were_skipped_stay_to_be_tried_when_a_run_that_tried_others_was_stopped(tmp_path: Path) -> None:
    case = SUITE.cases[0]
    skipped = [factory.failed("onnx", "skipped", "onnxruntime is not installed", case=each) for each in SUITE.cases]
    out = factory.results_file(tmp_path / "a.jsonl", skipped)
    now = factory.machine(libraries=factory.machine().libraries | {"onnxruntime": "1.32"})
    with Writer(out) as writer:
        writer.machine(now)
        writer.rows([factory.record("onnx", case=case, machine=now.id)])
    known = open_results(out, True, now)
    assert known is not None
    assert [row.case for row in known.rows] == [case]
    assert any("measured without onnxruntime" in said for said in known.warnings)


def test_a_file_that_holds_no_row_yet_was_not_measured_without_anything(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with Writer(out) as writer:
        writer.machine(factory.machine())
    known = open_results(out, True, factory.machine(libraries={"torch": "2.13.0", "onnx": "1"}))
    assert known is not None
    assert known.warnings == []


def test_a_file_of_pytest_benchmark_is_not_appended_to(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    out.write_text('{\n  "machine_info": {},\n  "benchmarks": []\n}\n')
    with pytest.raises(ResultsError, match="to which no rows can be added"):
        open_results(out, True, factory.machine())


def test_two_words_for_one_number_of_threads_are_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sasa_bench.sweep.plan.available_cores", lambda: 2)
    suite = replace(SUITE, cases=tuple(SUITE.cases[0].with_(threads=threads) for threads in (0, 2, 1)))
    assert [task.case.threads for task in plan([suite], (), INFOS).tasks] == [2, 1]
