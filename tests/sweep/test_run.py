"""What the loop of a run makes of what a worker reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import factory
import pytest
from tasks import INFOS, SUITE

from sasa_bench.results.file import read
from sasa_bench.results.record import Record, Results
from sasa_bench.suite import SuiteError
from sasa_bench.sweep.plan import LONG_BUILD_S, Plan, Task, open_results, plan
from sasa_bench.sweep.run import Summary, _of_plan, _record, run
from sasa_bench.timing.process import Request

TASK = Task(SUITE.name, SUITE.cases[0], tuple(INFOS))


def row(values: dict[str, Any]) -> Record:
    return _record(Plan([TASK], 0, INFOS), TASK, "unfold", factory.machine(), values)


def test_a_row_reads_back_as_it_is() -> None:
    found = row({"status": "ok", "samples_s": [0.25, 0.5], "extra": {"gain": 2.0}})
    assert (found.worker_samples, found.extra, found.machine) == ((2,), {"gain": 2.0}, factory.machine().id)
    assert Record.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"status": "skipped", "reason": 7}, "reason = 7 is no str"),
        ({"status": "ok", "samples_s": [0.0]}, "a time of 0 s"),
        ({"status": "ok", "flops": 1 << 70}, "flops = a huge number is out of range"),
        ({"status": "ok", "extra": {"gain": float("nan")}}, "not JSON compliant"),
        ({"status": "perfect"}, "'perfect' is not one of"),
        ({"status": "ok", "bogus": 1}, "bogus"),
    ],
)
def test_what_no_reader_takes_is_a_row_with_that_reason(values: dict[str, Any], words: str) -> None:
    found = row(values)
    assert (found.status, found.samples_s) == ("error", ())
    assert found.reason.startswith("its figures cannot be stored: ")
    assert words in found.reason
    assert Record.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_a_later_worker_finds_replaces_what_the_first_one_counted() -> None:
    summary = Summary(2, 0)
    first = [factory.record("unfold"), factory.record("conv3x3")]
    summary.take(first)
    assert (dict(summary.counts), summary.done) == ({"ok": 2}, 2)
    failed = first[0].joined({"status": "wrong", "reason": "another answer"})
    summary.take([failed, replace(first[1], samples_s=(0.1, 1.0, 9.0) * 7)])
    assert (dict(summary.counts), summary.done, summary.noisy) == ({"ok": 1, "wrong": 1}, 2, 1)


class Played:
    """Workers that answer at once: the samples of the n-th take n seconds. `digest`: of the file they measured.
    build_s: of each implementation."""

    digest = ""
    build_s = 0.0

    def __init__(self, *arguments: object) -> None:
        self.number, self.checked, self.spent_s = 1, [], Counter()

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def get(self) -> Played:
        return self

    def drop(self) -> None:
        self.number += 1

    def ask(self, do: str, **values: Any) -> Any:
        return [asdict(INFOS[name]) for name in values["impls"]] if do == "describe" else [1e11, 1e10]

    def measure(self, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in request.impls:
            extra = {"build_s": self.build_s} | ({"source_digest": self.digest} if self.digest else {})
            yield name, {"status": "ok", "samples_s": [float(self.number)] * 7, "inner_count": 1, "extra": extra}


def stop_in_the_second_round(summary: Summary, rows: Sequence[Record]) -> None:
    if summary.phase.startswith("again"):
        raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_with_the_worker_that_each_case_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_bench.sweep.run.Workers", Played)
    out, here = tmp_path / "a.jsonl", factory.machine()
    with pytest.raises(KeyboardInterrupt):
        run([SUITE], (), out, machine=here, watch=stop_in_the_second_round)
    assert read([out]).stopped
    begun = read([out]).rows
    assert {len(row.worker_samples) for row in begun if row.case == SUITE.cases[0]} == {2}
    assert {len(row.worker_samples) for row in begun if row.case != SUITE.cases[0]} == {1}
    seen: list[Record] = []
    summary = run(
        [SUITE], (), out, machine=here, known=open_results(out, True, here), watch=lambda _, rows: seen.extend(rows)
    )
    rows = read([out]).rows
    assert {row.worker_samples for row in rows} == {(7, 7, 7)}
    assert {row.samples_s for row in rows} == {(1.0,) * 7 + (2.0,) * 7 + (3.0,) * 7}
    assert Counter(row.key for row in seen) == Counter(row.key for row in rows), "each once"
    assert summary.done == summary.total == len(rows)
    assert not read([out]).stopped


def test_a_run_that_was_stopped_behind_its_last_row_has_an_end_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_bench.sweep.run.Workers", Played)
    out, here = tmp_path / "a.jsonl", factory.machine()
    run([SUITE], (), out, machine=here)
    out.write_text("".join(line for line in out.read_text().splitlines(True) if '"after"' not in line))
    known = open_results(out, True, here)
    assert known is not None
    assert known.stopped
    run([SUITE], (), out, machine=here, known=known)
    assert not read([out]).stopped
    assert read([out]).rows == known.rows


@pytest.mark.parametrize("change", [{"machine": "another"}, {"worker_samples": (3, 4)}, {"worker_samples": (2, 2, 3)}])
def test_rows_that_were_not_begun_alike_are_measured_whole(change: dict[str, Any]) -> None:
    rows = [factory.record(impl, suite=SUITE.name, case=SUITE.cases[0], count=7) for impl in INFOS]
    begun = [replace(row, worker_samples=(7,)) for row in rows]
    whole = plan([SUITE], (), INFOS, Results(begun), 3, factory.machine().id).tasks[0]
    assert whole.begun == tuple(begun)
    begun[1] = replace(begun[1], **change)
    assert plan([SUITE], (), INFOS, Results(begun), 3, factory.machine().id).tasks[0].begun == ()


def test_what_takes_long_to_build_is_measured_by_one_worker_but_for_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_bench.sweep.run.Workers", Played)
    monkeypatch.setattr(Played, "build_s", 2 * LONG_BUILD_S)
    run([SUITE], (), tmp_path / "a.jsonl", machine=factory.machine())
    found = {(row.impl, row.worker_samples) for row in read([tmp_path / "a.jsonl"]).rows}
    assert found == {("unfold", (7,)), ("conv3x3", (7, 7, 7))}


def test_a_kernel_file_that_changes_while_the_run_goes_on_gives_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_bench.sweep.run.Workers", Played)
    monkeypatch.setattr(Played, "digest", "bbb")
    monkeypatch.setitem(INFOS, "unfold", replace(INFOS["unfold"], digest="aaa"))
    monkeypatch.setitem(INFOS, "conv3x3", replace(INFOS["conv3x3"], digest="bbb"))
    run([SUITE], (), tmp_path / "a.jsonl", machine=factory.machine())
    known = read([tmp_path / "a.jsonl"])
    for found in known.rows:
        assert found.status == ("error" if found.impl == "unfold" else "ok")
        assert (found.impl != "unfold") or "unfold changed while the run went on" in found.reason
    assert len(plan([SUITE], (), INFOS, known, 3).tasks) == len(SUITE.cases), (
        "measured again, whatever the file is then"
    )


def test_a_kernel_file_may_write_sources_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("")
    monkeypatch.setitem(INFOS, str(mine), replace(INFOS["unfold"], name="mine", digest="aaa"))
    work = plan([SUITE], [str(mine)], INFOS)
    (tmp_path / "generated.cpp").write_text("")
    values = {"extra": {"source_digest": "bbb"}}
    assert _of_plan(work, str(mine), values)
    assert values["extra"]["source_digest"] == "aaa"
    mine.write_text("import torch")
    assert not _of_plan(work, str(mine), {"extra": {"source_digest": "ccc"}})


@pytest.mark.parametrize("bad", [[0.0] * 7, [float("nan")] * 7, []])
def test_a_later_worker_whose_samples_no_reader_takes_costs_its_row_alone(
    bad: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Played.measure

    def measure(played: Played, request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, values in real(played, request):
            yield name, values | ({"samples_s": bad} if played.number == 2 and name == "unfold" else {})

    monkeypatch.setattr("sasa_bench.sweep.run.Workers", Played)
    monkeypatch.setattr(Played, "measure", measure)
    run([SUITE], (), tmp_path / "a.jsonl", machine=factory.machine())
    found = {row.impl: row for row in read([tmp_path / "a.jsonl"]).rows}
    assert found["conv3x3"].status == "ok"
    assert found["unfold"].status == "error"
    assert found["unfold"].reason.startswith("its figures cannot be stored: ")


def test_shards_do_not_cut_what_may_be_one_case(tmp_path: Path) -> None:
    suite = replace(SUITE, cases=tuple(SUITE.cases[0].with_(threads=threads) for threads in (0, 2)))
    with pytest.raises(SuiteError, match="on another machine these may be the same"):
        run([suite], (), tmp_path / "a.jsonl", part=(1, 2))
    assert not (tmp_path / "a.jsonl").exists()
