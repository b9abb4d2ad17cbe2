"""The verb run, as a user types it: exit status, one clear line, nothing lost."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import factory
import pytest
from command import QUICK, SUITE, sasa_bench, wait_for_rows

from sasa_bench.cli.measuring import Asked, _stopped
from sasa_bench.cli.options import stamped
from sasa_bench.impls import get
from sasa_bench.results.file import read
from sasa_bench.sweep.run import Summary


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
        (["run", "{suite}", "-c", "batch=1", "-c", "batch=2"], ["batch=2", "given twice", "-c batch=VALUE,VALUE"]),
        (["run", "{suite}", "-c", "channels=1000000000000"], ["channels = 1e+12", "at most"]),
        (["run", "{suite}", "--out", "/dev/null"], ["/dev/null is a device"]),
        (["run", "{suite}", "--out", "{results}/a.jsonl"], ["a.jsonl is a file"]),
        (["table", "{results}", "--out", "{results}"], ["holds measured results"]),
        (["report", "{results}", "--out", "a.pdf"], ["a.pdf", ".html"]),
        (["report", "{results}", "--figures", "{results}"], ["is a file", "name a folder"]),
        (["history", "{results}", "--repository", "."], ["--repository .", "git finds no repository"]),
        (["profile", "{suite}", "--impl", "unfold", "--timeout", "nan"], ["--timeout nan", "more than 0"]),
        (["profile", "{suite}", "--impl", "unfold", "--out", "{results}"], ["a.jsonl is a file", "name a folder"]),
        (["profile", "--trace", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["gate", "--base", "a", "--head", "b", "--out", "{results}"], ["a.jsonl is a file", "name a folder"]),
        (["aa", "{suite}", "--runs", "1", "--journal", "{results}"], ["a.jsonl", "not a journal", "--journal"]),
        (["aa", "{suite}", "--runs", "1", "--inject", "nan"], ["--inject nan", "1.05"]),
        (["export", "{suite}", "--out", "a.onnx"], ["mine.toml", "--trust", "module:factory"]),
        (["paper", "--impl", "unfold"], ["--impl", "--time"]),
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
    assert f"sasa-bench run smoke --impl {mine}" in made.stdout
    assert get(str(mine)).name == "swift"
    again = sasa_bench("new", mine)
    assert (again.returncode, "already exists" in again.stderr) == (1, True)


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
    told = sasa_bench(*command, "--resume")
    assert (told.returncode, "1 row (1 wrong)" in told.stdout) == (0, True)
    assert re.search(r"mine, wrong_one, kernel_size=3 .*: wrong: y is off by", told.stderr), told.stderr
    kernel.write_text(WRONG.replace("call() * 1.01", "call().view(3, 5)"))
    line = next(n for n, text in enumerate(kernel.read_text().splitlines(), 1) if "view(3, 5)" in text)
    told = sasa_bench(*command, "--resume")
    assert re.search(rf"kernel_size=3 .*: error: RuntimeError: shape .* \(line {line}\)", told.stderr), told.stderr


@pytest.mark.parametrize("budget", ["nan", "inf", "0", "-1"])
def test_a_budget_is_a_number_of_seconds(suite: Path, budget: str) -> None:
    ran = sasa_bench("run", suite, "--budget", budget)
    assert (ran.returncode, "give seconds, more than 0" in ran.stderr) == (1, True)
    gated = sasa_bench("gate", "--base", "a", "--head", "b", "--budget", budget)
    assert (gated.returncode, "is not a duration" in gated.stderr) == (1, True)


def test_resume_says_what_it_leaves_and_when_there_is_nothing_to_resume(tmp_path: Path, suite: Path) -> None:
    out = tmp_path / "a.jsonl"
    hold = ["-c", "kernel_size=3", "--impl", "conv3x3", "--out", out, "--resume", *QUICK]
    assert "does not exist yet" in sasa_bench("run", suite, *hold).stderr
    other = tmp_path / "other.toml"
    other.write_text(SUITE)
    assert "also holds suites that this command does not name and leaves as they are: mine" in (
        sasa_bench("run", other, *hold).stderr
    )
    assert {row.suite for row in read([out]).rows} == {"mine", "other"}


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


def test_the_command_that_resumes_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suites, out = (tmp_path / "my suites" / "a.toml",), tmp_path / "my results.jsonl"
    asked = Asked(suites, None, (), (), out, False, 1.0, 1.0, None, (), False, False, None)
    assert _stopped(asked, out, Summary(4, 0)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    command = said.removeprefix("resume with: ").partition(" (and")[0]
    assert shlex.split(command) == ["sasa-bench", "run", str(suites[0]), "--out", str(out), "--resume"]


def test_a_suite_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = stamped("k{a}{1}-", ".jsonl")
    assert re.fullmatch(r"reports/k\{a\}\{1\}-\d{8}-\d{6}\.jsonl", str(first))
