"""The commands as a user types them: exit status, one clear line, nothing lost."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import factory
import pytest
from fake_nvml import FakeNvml

from sasa_bench.cli import main
from sasa_bench.impls import get, names
from sasa_bench.results.file import read

SUITE = """
title = "A test?"
impls = ["unfold", "blocked", "conv3x3"]
[axes]
kernel_size = [3, 5]
[fixed]
channels = 8
heads = 2
resolution = 6
threads = 1
"""
QUICK = ["--budget", "0.01"]


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


def sasa_bench(*arguments: object) -> Ran:
    """The command line in this process: its exit status and what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out.flush()
    assert isinstance(out.buffer, io.BytesIO)
    return Ran(int(stop.value.code or 0), out.buffer.getvalue().decode(), err.getvalue())


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    return path


def test_run_table_and_report_work_in_turn(tmp_path: Path, suite: Path) -> None:
    out = tmp_path / "a.jsonl"
    ran = sasa_bench("run", suite, "--out", out, *QUICK)
    assert ran.returncode == 0, ran.stderr
    assert "6 rows (6 ok)" in ran.stdout
    assert re.search(r"^\d:\d\d:\d\d in all: .*\bcheck \d+%", ran.stdout, re.MULTILINE)
    table = sasa_bench("table", out, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [(r["impl"], r["kernel_size"], r["status"]) for r in rows] == [
        (impl, k, "ok") for k in ("3", "5") for impl in ("unfold", "blocked", "conv3x3")
    ]
    assert all(float(r["time_median_s"]) > 0 for r in rows)
    page = tmp_path / "a.html"
    assert sasa_bench("report", out, "--out", page).returncode == 0
    assert "unfold" in page.read_text()


def test_a_killed_run_is_finished_by_resume_with_every_row_once(tmp_path: Path, suite: Path) -> None:
    killed = tmp_path / "killed.jsonl"
    cases = ["-c", "kernel_size=1,3,5,7"]
    command = [sys.executable, "-m", "sasa_bench", "run", str(suite), *cases, "--out", str(killed), "--budget", "0.3"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for_rows(killed, 3)
    process.kill()
    process.wait()
    kept = read([killed]).rows
    assert 3 <= len(kept) < 12
    resumed = sasa_bench("run", suite, *cases, "--out", killed, "--resume", *QUICK)
    assert resumed.returncode == 0, resumed.stderr
    rows = read([killed]).rows
    assert rows[: len(kept)] == kept
    whole = [(impl, size) for size in (1, 3, 5, 7) for impl in ("unfold", "blocked", "conv3x3")]
    assert sorted((row.impl, row.case.kernel_size) for row in rows) == sorted(whole)
    again = sasa_bench("run", suite, *cases, "--out", killed, "--resume", *QUICK)
    assert "nothing left to measure" in again.stdout
    assert len(read([killed]).rows) == 12


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b'"kind": "row"') >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"{path} never had {count} rows")


def test_ctrl_c_leaves_a_valid_file_and_says_how_to_go_on(tmp_path: Path, suite: Path) -> None:
    out = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "sasa_bench", "run", str(suite), "-c", "kernel_size=1,3,5,7,9,11"]
    process = subprocess.Popen(
        [*command, "--out", str(out), "--budget", "0.5"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    wait_for_rows(out, 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "of 18 rows" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(read([out]).rows) >= 3


def test_an_existing_file_is_not_overwritten(tmp_path: Path, suite: Path) -> None:
    out = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    before = out.read_bytes()
    ran = sasa_bench("run", suite, "--out", out)
    assert (ran.returncode, "--resume" in ran.stderr) == (1, True)
    assert out.read_bytes() == before


def test_a_file_of_another_machine_is_not_resumed(tmp_path: Path, suite: Path) -> None:
    out = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    ran = sasa_bench("run", suite, "--out", out, "--resume")
    assert ran.returncode == 1
    assert "unlike machines" in ran.stderr


def test_unlike_machines_are_not_put_in_one_report(tmp_path: Path) -> None:
    other = factory.machine(cpu="Other CPU")
    first = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    second = factory.results_file(tmp_path / "b.jsonl", [factory.record(machine=other.id)], other)
    ran = sasa_bench("report", first, second, "--out", tmp_path / "c.html")
    assert ran.returncode == 1
    assert "Test-CPU" in ran.stderr
    assert "Other-CPU" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{suite}", "-c", "kernel_size=4"], ["kernel_size = 4 is even", "3 or 5"]),
        (["run", "{suite}", "-c", "kernel_size=-3"], ["kernel_size = -3"]),
        (["run", "{suite}", "-c", "heads=3"], ["channels = 8", "heads = 3", "1, 2, 4, 8"]),
        (["run", "{suite}", "-c", "window=3"], ["window", "kernel_size"]),
        (["run", "{suite}", "-c", "kernel_size"], ["FIELD=VALUE"]),
        (["run", "{suite}", "--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["run", "{suite}", "--impl", "magic"], ["magic", "unfold"]),
        (["run", "{suite}", "--impl", "nowhere.py"], ["nowhere.py", "no such file"]),
        (["run", "{suite}", "--resume"], ["--out"]),
        (["run", "{suite}", "--out", "."], ["is a folder", "results.jsonl"]),
        (["run", "{suite}", "--out", ".", "--resume"], ["is a folder", "results.jsonl"]),
        (["run", "{suite}", "{suite}"], ["two suites"]),
        (["run", "nowhere.toml"], ["nowhere.toml", "no such suite"]),
        (["run"], ["SUITES"]),
        (["table", "{suite}"], ["mine.toml", "not a line of a results file"]),
        (["table", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["table", "{results}", "--format", "xls"], ["xls", "parquet", "bencher"]),
        (["new", "{suite}"], ["mine.toml", ".py"]),
        (["report", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["dance"], ["dance"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_line_and_exit_status_1(
    tmp_path: Path, suite: Path, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    ran = sasa_bench(*(a.format(suite=suite, results=results) for a in arguments))
    assert ran.returncode == 1
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ran.stderr.startswith("sasa-bench: ")
    for word in words:
        assert word in ran.stderr


def test_cuda_asked_for_where_there_is_none_is_one_sentence(suite: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    ran = sasa_bench("run", suite, "--device", "cuda")
    assert ran.returncode == 1
    assert "NVIDIA GPU" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("built_for", "words"),
    [(None, "is a build without CUDA: install a CUDA build of torch"), ("13.0", "nvidia-smi must list the device")],
)
@pytest.mark.parametrize("verb", ["run", "profile"])
def test_what_cuda_lacks_is_one_sentence(
    verb: str, built_for: str | None, words: str, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = ["--impl", "unfold", "-c", "kernel_size=3"]
    ran = sasa_bench(verb, suite, *case, "--device", "cuda", "--out", suite.parent / "never")
    assert ran.returncode == 1
    assert words in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (suite.parent / "never").exists()


def test_make_bench_gpu_ends_where_the_command_does(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    verb = f'#!/bin/sh\necho "$1" >> {log}\nexec {sys.executable} -m sasa_bench "$@"\n'
    for name, script in (("sasa-bench", verb), ("pip", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ready").touch()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["make", "bench-gpu", f"VENV={tmp_path}", f"RESULTS={tmp_path}/a.jsonl"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert log.read_text() == "run\n"
    assert not (tmp_path / "a.jsonl").exists()


def test_without_nvml_a_gpu_run_says_what_is_absent_and_goes_on(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sasa_bench.impls import _nvrtc as nvrtc
    from sasa_bench.timing import nvml

    monkeypatch.setattr(nvrtc, "no_device", lambda: None)  # in this process, not in the worker
    monkeypatch.setattr(nvml, "_pynvml", lambda: FakeNvml(unsupported={"nvmlInit"}))
    ran = sasa_bench("run", suite, "--device", "cuda", "--energy", "--out", tmp_path / "a.jsonl", *QUICK)
    assert ran.returncode == 0
    assert "throttled samples stay in: NVML tells nothing" in ran.stderr
    assert len(read([tmp_path / "a.jsonl"]).rows) == 6


def test_energy_is_read_on_a_gpu_only(suite: Path) -> None:
    ran = sasa_bench("run", suite, "--energy")
    assert (ran.returncode, "--device cuda" in ran.stderr) == (1, True)


def test_list_prints_the_size_of_the_product_and_every_implementation(suite: Path) -> None:
    ran = sasa_bench("list", suite)
    assert ran.returncode == 0
    assert "2 cases × 3 implementations = 6 rows" in ran.stdout
    for name in names():
        assert name in ran.stdout


def test_doctor_says_what_this_machine_can_run() -> None:
    ran = sasa_bench("doctor")
    assert ran.returncode == 0
    assert "processor" in ran.stdout
    assert "compiler" in ran.stdout
    assert "NVML" in ran.stdout
    for name in names():
        assert name in ran.stdout


def test_doctor_shows_builds_and_what_was_tuned_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sasa_bench.impls._nvrtc import TuningStore

    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    TuningStore("Some GPU sm_90").add("forward float32 k=7", {"pixels": 2, "lanes": 1}, 12.5e-6)
    said = sasa_bench("doctor").stdout
    assert "Some-GPU-sm-90: forward float32 k=7: lanes=1 pixels=2 (12.5 us)" in said
    assert f"cached cubins: 0 (0 KiB) in {tmp_path}" in said
    assert re.search(r"build portable: (compiled|compiled at first use)", said)


def test_doctor_goes_on_where_an_implementation_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASA_BENCH_ISA", "abacus")
    ran = sasa_bench("doctor")
    assert ran.returncode == 0
    assert "SASA_BENCH_ISA=abacus is not a build; choose one of" in ran.stdout
    assert all(name in ran.stdout for name in names())


def test_doctor_says_which_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    shown = sasa_bench("doctor").stdout
    assert "there is no C++ compiler (CXX=no-such-compiler): apt-get install g++ (or the like), or set CXX" in shown


def test_doctor_explains_itself() -> None:
    ran = sasa_bench("doctor", "--help")
    assert ran.returncode == 0
    assert "what would unlock" in ran.stdout
    assert "SASA_BENCH_CACHE" in ran.stdout


def test_a_kernel_in_a_file_is_measured_beside_the_others(tmp_path: Path, suite: Path) -> None:
    mine = tmp_path / "my_kernel.py"
    mine.write_text(
        "from dataclasses import replace\nfrom sasa_bench.impls import get\nIMPL = replace(get('naive'), name='mine')\n"
    )
    out = tmp_path / "a.jsonl"
    assert sasa_bench("run", suite, "--impl", mine, "--impl", "conv3x3", "--out", out, *QUICK).returncode == 0
    assert [(row.impl, row.status) for row in read([out]).rows][:2] == [("mine", "ok"), ("conv3x3", "ok")]
    assert json.loads(out.read_text().splitlines()[0])["kind"] == "machine"


def test_new_writes_a_kernel_and_says_how_to_run_it(tmp_path: Path) -> None:
    mine = tmp_path / "swift.py"
    made = sasa_bench("new", mine)
    assert made.returncode == 0
    assert f"sasa-bench run suites/smoke.toml --impl {mine}" in made.stdout
    assert get(str(mine)).name == "swift"
    again = sasa_bench("new", mine)
    assert (again.returncode, "there already" in again.stderr) == (1, True)


def test_an_export_says_how_many_rows_have_no_time(tmp_path: Path) -> None:
    rows = [*factory.sweep(), factory.failed("naive", "error", "boom")]
    ran = sasa_bench("table", factory.results_file(tmp_path / "a.jsonl", rows), "--format", "bencher")
    assert ran.returncode == 0
    assert len(json.loads(ran.stdout)) == 12
    assert "1 rows have no time" in ran.stderr


def test_a_truncated_file_is_reported_and_read(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    path.write_bytes(path.read_bytes()[:-100])
    ran = sasa_bench("table", path, "--format", "csv")
    assert ran.returncode == 0
    assert "cut off" in ran.stderr
    assert len(ran.stdout.splitlines()) == 12


WRONG = """
from dataclasses import replace
from sasa_bench.impls import get
def build(case, tensors):
    call = get("naive").build(case, tensors)
    return lambda: call() * 1.01
IMPL = replace(get("naive"), name="wrong_one", build=build)
"""


def test_strict_exits_with_2_and_names_the_rows(tmp_path: Path, suite: Path) -> None:
    kernel, out = tmp_path / "wrong_one.py", tmp_path / "a.jsonl"
    kernel.write_text(WRONG)
    command = ["run", suite, "-c", "kernel_size=3", "--impl", kernel, "--impl", kernel, "--out", out, *QUICK]
    ran = sasa_bench(*command, "--strict")
    assert ran.returncode == 2
    assert "mine, wrong_one, kernel_size=3" in ran.stderr
    assert len(read([out]).rows) == 1, "an implementation that is named twice is measured once"
    assert "source_digest" in read([out]).rows[0].extra
    again = sasa_bench(*command, "--resume")
    assert (again.returncode, "nothing left to measure" in again.stdout) == (0, True)
    kernel.write_text(WRONG.replace("1.01", "1.02"))
    assert "1 rows (1 wrong)" in sasa_bench(*command, "--resume").stdout


@pytest.mark.parametrize("budget", ["nan", "inf", "0", "-1"])
def test_a_budget_is_a_number_of_seconds(suite: Path, budget: str) -> None:
    ran = sasa_bench("run", suite, "--budget", budget)
    assert (ran.returncode, "give seconds, more than 0" in ran.stderr) == (1, True)
    gated = sasa_bench("gate", "--base", "a", "--head", "b", "--budget", budget)
    assert (gated.returncode, "is no duration" in gated.stderr) == (1, True)


def test_resume_says_what_it_leaves_and_when_there_is_nothing_to_resume(tmp_path: Path, suite: Path) -> None:
    out = tmp_path / "a.jsonl"
    hold = ["-c", "kernel_size=3", "--impl", "conv3x3", "--out", out, "--resume", *QUICK]
    assert "is not there yet" in sasa_bench("run", suite, *hold).stderr
    other = tmp_path / "other.toml"
    other.write_text(SUITE)
    assert "also holds suites that this command does not name and leaves as they are: mine" in (
        sasa_bench("run", other, *hold).stderr
    )
    assert {row.suite for row in read([out]).rows} == {"mine", "other"}


def test_a_report_of_several_files_is_named_after_all_of_them(tmp_path: Path) -> None:
    files = [factory.results_file(tmp_path / f"{name}.jsonl", factory.sweep()) for name in ("a", "b")]
    ran = sasa_bench("report", *files)
    assert ran.returncode == 0
    assert "of 2 files (--compare sets them side by side)" in ran.stdout
    assert (tmp_path / "a-b.html").exists()


def test_a_terminal_without_the_characters_gets_others() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sasa_bench", "list", "--markdown"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    assert b" ?" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["table", "{results}", "--out", "{folder}"], ["report", "{results}", "--out", "/proc/a/b.html"]]
)
def test_what_the_system_refuses_is_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    ran = sasa_bench(*(a.format(results=results, folder=tmp_path) for a in arguments))
    assert ran.returncode == 1
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ran.stderr.startswith("sasa-bench: /")


def test_a_broken_pipe_is_no_traceback(tmp_path: Path) -> None:
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep() * 1)
    command = f"{sys.executable} -m sasa_bench table {results} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["table", "{results}", "--format", "csv", "--out", "{out}/new/a.csv"],
        ["figure", "{results}", "--out", "{out}/new/a.svg"],
        ["merge", "{results}", "--out", "{out}/new/a.jsonl"],
        ["history", "{results}", "--out", "{out}/new/a.html"],
    ],
    ids=lambda command: command[0],
)
def test_a_full_disk_is_one_sentence_with_the_path_and_leaves_no_part_of_a_file(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    ran = sasa_bench(*(word.format(results=results, out=tmp_path) for word in command))
    (said,) = ran.stderr.strip().splitlines()[-1:]
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False)
    assert f"{tmp_path}/new/a." in said
    assert "No space left on device" in said
    assert list((tmp_path / "new").iterdir()) == []


def test_doctor_checks_only_and_exits_with_3_when_something_spoils(monkeypatch: pytest.MonkeyPatch) -> None:
    from sasa_bench.cli import doctor

    monkeypatch.setattr(doctor, "spoilers", lambda: ["turbo is on"])
    ran = sasa_bench("doctor", "--check")
    assert (ran.returncode, ran.stdout) == (3, "spoils measurements: turbo is on\n")
    monkeypatch.setattr(doctor, "spoilers", list)
    assert sasa_bench("doctor", "--check").returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ["run", "{suite}", "--out", "{out}"],
        ["gate", "--base", "a", "--head", "b", "--out", "{out}"],
        ["bisect", "--good", "a", "--bad", "b", "--out", "{out}"],
        ["aa", "{suite}", "--runs", "1", "--journal", "{out}"],
        ["profile", "{suite}", "-c", "kernel_size=3", "--impl", "unfold", "--out", "{out}"],
    ],
    ids=lambda command: command[0],
)
def test_binding_is_refused_before_anything_is_measured(
    command: list[str], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    out = tmp_path / "a.jsonl"
    ran = sasa_bench(*(word.format(suite=suite, out=out) for word in command))
    assert (ran.returncode, "unset OMP_PROC_BIND" in ran.stderr) == (1, True)
    assert not out.exists()
