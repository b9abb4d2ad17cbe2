"""What kills the worker costs one row, not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from sasa_bench.case import Case
from sasa_bench.results.file import read
from sasa_bench.results.record import Record
from sasa_bench.suite import from_data
from sasa_bench.sweep.run import describe
from sasa_bench.sweep.run import run as run_suites
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing.process import Request, Worker, WorkerDied, WorkerRefused
from sasa_bench.timing.settings import Settings

QUICK = Settings(warmup_s=0.001, sample_s=0.001, budget_s=0.01, least=3, most=7)
FILE = """
import os, time, torch
from dataclasses import replace
from sasa_bench.impls import get
def build(case, tensors):
    call = get("unfold").build(case, tensors)
    state = {{"calls": 0}}
    def wrapped():
        state["calls"] += 1
        {body}
    return wrapped
IMPL = replace(get("unfold"), name="{name}", build=build)
"""
BODIES = {
    "crashing": "os.kill(os.getpid(), 11)",
    "crashing_later": "os.kill(os.getpid(), 11) if state['calls'] > 3 else None; return call()",
    "killed": "os.kill(os.getpid(), 9)",
    "exiting": "os._exit(7)",
    "raising": "raise ValueError('no such luck')",
    "raising_later": "1 / (state['calls'] < 4); return call()",
    "hanging": "time.sleep(60)",
    "wrong": "return call() * 1.01",
    "lazy": "return torch.empty_like(call())",
    "greedy": "return torch.empty(1 << 50)",
    "closing_input": "__import__('sys').stdin.close(); return call()",
    "closing_pipes": "os.closerange(3, 200); return call()",
    "talkative": "print('{' * 100); return call()",
}


SMALL = {"channels": 8, "heads": 2, "resolution": 5}


def run(tmp_path: Path, names: list[str], timeout_s: float = 20.0, **fixed: object) -> dict[str, Record]:
    specs = []
    for name in names:
        if name in BODIES:
            path = tmp_path / f"{name}.py"
            path.write_text(FILE.format(name=name, body=BODIES[name]))
            specs.append(str(path))
        else:
            specs.append(name)
    suite = from_data("s", {"title": "t", "impls": specs, "fixed": SMALL | fixed})
    rows: list[Record] = []
    run_suites(
        [suite],
        (),
        tmp_path / "out.jsonl",
        settings=QUICK,
        timeout_s=timeout_s,
        watch=lambda summary, found: rows.extend(found),
    )
    assert [row.impl for row in read([tmp_path / "out.jsonl"]).rows] == [row.impl for row in rows]
    assert sorted(row.impl for row in rows) == sorted(names)
    return {row.impl: row for row in rows}


@pytest.mark.slow
def test_every_case_and_implementation_gives_one_row_whatever_happens(tmp_path: Path) -> None:
    rows = run(tmp_path, ["unfold", *[n for n in BODIES if n != "hanging"], "conv3x3"])
    status = {name: row.status for name, row in rows.items()}
    assert status == {
        "unfold": "ok",
        "conv3x3": "ok",
        "talkative": "ok",
        "closing_input": "ok",
        "closing_pipes": "error",
        "crashing": "error",
        "crashing_later": "error",
        "killed": "error",
        "exiting": "error",
        "raising": "error",
        "raising_later": "error",
        "greedy": "error",
        "wrong": "wrong",
        "lazy": "wrong",
    }
    assert "SIGSEGV" in rows["crashing"].reason
    assert "out of memory" in rows["killed"].reason
    assert "exit status 7" in rows["exiting"].reason
    line = 1 + FILE.splitlines().index("        {body}")
    assert rows["raising"].reason == f"ValueError: no such luck (line {line})"
    for row in rows.values():
        assert bool(row.samples_s) == (row.status == "ok")
        assert bool(row.reason) == (row.status != "ok")
    assert rows["wrong"].max_abs_err > rows["wrong"].err_budget > 0


def test_a_hang_becomes_a_timeout_and_the_sweep_goes_on(tmp_path: Path) -> None:
    rows = run(tmp_path, ["hanging", "conv3x3"], timeout_s=10.0)
    assert rows["hanging"].status == "timeout"
    assert "--timeout" in rows["hanging"].reason
    assert rows["conv3x3"].status == "ok"


def test_the_time_of_each_stage_is_counted_over_all_workers(tmp_path: Path) -> None:
    sleepy = tmp_path / "sleepy.py"
    sleepy.write_text(FILE.format(name="sleepy", body="time.sleep(0.05); return call()"))
    crashing = tmp_path / "crashing.py"
    crashing.write_text(FILE.format(name="crashing", body=BODIES["crashing"]))
    suite = from_data("s", {"title": "t", "impls": [str(sleepy), str(crashing)], "fixed": SMALL})
    summary = run_suites([suite], (), tmp_path / "out.jsonl", settings=QUICK)
    rows = read([tmp_path / "out.jsonl"]).rows
    calls = 1 + sum(len(row.samples_s) * row.inner_count for row in rows)
    assert sorted(row.status for row in rows) == ["error", "ok"]
    assert summary.spent_s["time"] > 0.05 * calls
    assert summary.spent_s["check"] > 0.05
    assert summary.spent_s["start"] > 0.1


def test_an_ok_row_is_complete(tmp_path: Path) -> None:
    modes = ["forward", "backward", "training"]
    suite = from_data("s", {"title": "t", "impls": ["unfold"], "axes": {"mode": modes}, "fixed": SMALL})
    run_suites([suite], (), tmp_path / "out.jsonl", settings=QUICK)
    rows = read([tmp_path / "out.jsonl"]).rows
    assert sorted(row.case.mode for row in rows) == sorted(modes)
    for row in rows:
        assert row.status == "ok"
        assert len(row.samples_s) >= 3
        assert row.inner_count >= 1
        assert row.flops
        assert row.params
        assert row.min_bytes
        assert row.peak_memory_bytes is not None
        assert row.max_abs_err <= row.err_budget
        assert row.case.threads >= 1


def test_cuda_without_a_device_is_skipped_with_the_reason(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    row = run(tmp_path, ["unfold"], device="cuda")["unfold"]
    assert (row.status, "no CUDA device" in row.reason) == ("skipped", True)


def test_unknown_implementations_are_refused_one_by_one_before_anything_runs() -> None:
    with Workers(20.0) as workers:
        for name in ("magic", "wonder"):
            with pytest.raises(WorkerRefused, match=f"unknown implementation '{name}'"):
                workers.get().ask("describe", impls=[name])
        assert list(describe(workers, ["unfold"])) == ["unfold"]


def test_a_worker_that_cannot_start_says_why() -> None:
    worker = Worker(5.0, command=[sys.executable, "-c", "raise SystemExit('no luck today')"])
    request = Request(Case(threads=1), ("unfold",), 0, asdict(QUICK))
    with pytest.raises(WorkerDied, match=r"exit status 1.*no luck today"):
        list(worker.measure(request))
    worker.close()


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("random", "numpy", "natten", "sasa_bench"):
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module}.py of the folder ran')")
    monkeypatch.chdir(tmp_path)
    with Workers(timeout_s=60) as workers:
        assert set(describe(workers, ["naive", "natten"])) == {"naive", "natten"}


def test_a_request_to_end_the_group_is_for_the_parent() -> None:
    with Workers(20.0) as workers:
        worker = workers.get()
        worker.ask("describe", impls=["unfold"])
        worker.process.send_signal(signal.SIGTERM)
        assert worker.ask("describe", impls=["unfold"])[0]["name"] == "unfold"


def test_the_worker_dies_with_its_parent() -> None:
    code = (
        "import time; from sasa_bench.timing.process import Worker; w = Worker(60.0); "
        "w.ask('describe', impls=['unfold']); print(w.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_a_question_to_a_worker_that_is_gone_raises_where_its_answer_is_asked_for() -> None:
    """So that the answers of other workers that were asked with it are not lost."""
    worker = Worker(60.0)
    try:
        worker.process.kill()
        worker.process.wait()
        answer = worker.send("describe", impls=["unfold"])
        with pytest.raises(WorkerDied):
            answer()
    finally:
        worker.close()


def test_a_question_may_have_a_shorter_limit_than_a_build() -> None:
    worker = Worker(60.0, (sys.executable, "-c", "import time; time.sleep(60)"))
    try:
        with pytest.raises(WorkerDied, match=r"request 'block' took longer than 0\.2 s") as died:
            worker.ask("block", limit_s=0.2)
        assert died.value.status == "timeout"
    finally:
        worker.close()
