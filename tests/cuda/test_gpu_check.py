"""`make gpu-check` without a GPU: its limits, resuming and archive; host_checks.py runs a step on the fake driver."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from factory import failed, record, results_file
from gpu_check import Step

from sasa_bench.case import Case
from sasa_bench.results.file import read
from sasa_bench.suite import load
from sasa_bench.timing import probe
from sasa_bench.timing.probe import available_cores


def step(name: str, code: str, limit_s: int = 30) -> Step:
    return Step(name, limit_s, (sys.executable, "-c", code))


def runs(words: str) -> bool:
    """Whether some process was started with these words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                return True
    return False


def test_it_takes_nine_minutes_at_most(tmp_path):
    assert sum(each.limit_s for each in gpu_check.steps(tmp_path)) <= 9 * 60


def test_a_step_that_fails_hangs_or_is_absent_costs_only_itself(tmp_path):
    wanted = [
        step("fails", "import sys; print('why'); sys.exit(3)"),
        step("hangs", "import time; time.sleep(60)", limit_s=1),
        Step("absent", 5, ("no-such-program",)),
        step("fine", "print('fine')"),
    ]
    found = gpu_check.run(tmp_path / "out", wanted)
    assert [each["status"] for each in found] == [
        "exit status 3",
        "stopped after 1 s",
        "no-such-program is not installed",
        "ok",
    ]
    assert (tmp_path / "out" / "fails.txt").read_text() == "why\n"


def test_a_step_that_is_stopped_leaves_no_process_behind(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
    gpu_check.run(tmp_path / "out", [step("hangs", code, limit_s=2)])
    deadline = time.monotonic() + 20
    while runs("time.sleep(61.5)") and time.monotonic() < deadline:  # a killed process ends when it next runs
        time.sleep(0.1)
    assert not runs("time.sleep(61.5)")


def test_what_succeeded_is_not_run_again(tmp_path):
    counter = tmp_path / "count"
    counting = f"open({str(counter)!r}, 'a').write('x')"
    failing = f"open({str(counter)!r}, 'a').write('y'); raise SystemExit(1)"
    for _ in range(2):
        found = gpu_check.run(tmp_path / "out", [step("first", counting), step("second", failing)])
    assert counter.read_text() == "xyy"
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == found


def test_every_module_that_the_steps_need_is_found_with_its_version_or_named_with_the_remedy(capsys, monkeypatch):
    here = {name: package for name, package in gpu_check.NEEDED.items() if importlib.util.find_spec(name.split(".")[0])}
    monkeypatch.setattr(gpu_check, "NEEDED", here | {"no_such_module": "no-such-package"})
    with pytest.raises(SystemExit) as ended:
        gpu_check.versions()
    said = str(ended.value)
    assert "pip install --target carried no-such-package; then PYTHONPATH=carried make gpu-check" in said
    assert said.count("\n") == 2, "nothing else is missing"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(here)
    assert f"pytest {importlib.metadata.version('pytest')}" in printed


def test_the_archive_holds_what_the_steps_wrote(tmp_path):
    gpu_check.run(tmp_path / "out", [step("says", "print('hello')")])
    with tarfile.open(gpu_check.pack(tmp_path / "out")) as archive:
        assert {Path(name).name for name in archive.getnames()} == {"out", "says.txt", "steps.json"}


def test_its_cases_are_five_by_dtype_and_batch():
    suite = load(Path(gpu_check.__file__).with_suffix(".toml"))
    assert len(suite.cases) == 5 * 3 * 2
    assert {case.batch for case in suite.cases} == {2, 64}


def test_the_command_of_each_step_exists(tmp_path):
    for each in gpu_check.steps(tmp_path):
        files = [Path(part) for part in each.command if part.startswith(str(gpu_check.ROOT))]
        assert all(file.exists() for file in files)


def test_a_step_that_succeeded_on_another_device_or_with_other_kernels_is_run_again(tmp_path):
    wanted = [step("says", f"open({str(tmp_path / 'count')!r}, 'a').write('x')")]
    for of in ("one", "one", "other"):
        gpu_check.run(tmp_path / "out", wanted, of)
    assert (tmp_path / "count").read_text() == "xx"
    assert gpu_check.subject() == gpu_check.subject()


@pytest.mark.parametrize(
    ("test", "status"),
    [
        ("def test_it(): pass", "ok"),
        ("import pytest\n@pytest.mark.skip\ndef test_it(): pass", "no test ran"),
        ("import pytest\npytest.skip('nothing here', allow_module_level=True)", "no test ran"),
    ],
)
def test_tests_that_were_all_skipped_are_no_success(tmp_path, test, status):
    (tmp_path / "test_it.py").write_text(test)
    junit = tmp_path / "found.xml"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path))
    (found,) = gpu_check.run(tmp_path / "out", [Step("numerics", 60, command, {"SASA_BENCH_TUNE": "0"}, junit)])
    # pytest ends with 5 where it collected nothing
    assert found["status"] in (status, "exit status 5")
    assert (found["status"] == "ok") == (status == "ok")


def test_a_package_that_is_missing_ends_the_check_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "subject", lambda: "s")
    monkeypatch.setattr(
        gpu_check, "steps", lambda folder, of: [step("versions", "raise SystemExit('missing: x')"), step("other", "")]
    )
    with pytest.raises(SystemExit, match="missing: x"):
        gpu_check.main([str(tmp_path / "out")])
    assert [each["name"] for each in json.loads((tmp_path / "out" / "steps.json").read_text())] == ["versions"]


def test_times_of_other_code_do_not_stand_in_the_way(tmp_path):
    first, second = (gpu_check.times_file(tmp_path, of) for of in ("a", "b"))
    assert first != second
    (times,) = [each for each in gpu_check.steps(tmp_path, "b") if each.name == "times"]
    assert str(second) in times.command


def test_what_the_searches_chose_goes_into_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/tunables-H100.json").write_text("{}")
    (tmp_path / "out").mkdir()
    gpu_check.keep_tunables(tmp_path / "out")
    assert (tmp_path / "out/tunables-H100.json").exists()


def test_every_problem_of_triton_is_compiled_ahead():
    found = gpu_check.triton_problems()
    assert len({str(each.problem) for each in found if each.search}) == 10
    assert [each.search for each in found] == sorted((each.search for each in found), reverse=True), "the longest first"
    of_float32 = [each for each in found if each.dtype == torch.float32]
    assert {each.tf32 for each in of_float32} == {True, False}


def test_what_is_compiled_ahead_is_what_the_other_steps_launch():
    found = gpu_check.kernels_wanted()
    assert any(expression.startswith("sum_positions<") for _, expression in found)
    assert len(found) > 300
    for name in ("forward<", "backward_queries<", "backward_keys<"):
        assert any(expression.startswith(name) for _, expression in found)


def test_times_that_failed_or_were_skipped_for_want_of_a_package_are_measured_again(tmp_path):
    suite, out = tmp_path / "few.toml", tmp_path / "times.jsonl"
    suite.write_text('title = "Few"\nimpls = ["conv3x3", "triton"]\n[axes]\nresolution = [7]\n')
    here, case = probe.detect(), Case(resolution=7, threads=available_cores())
    failing = failed("conv3x3", "error", "the GPU lowered its clocks", suite="few", case=case, machine=here.id)
    absent = failed("triton", "skipped", "triton 3.4 does not compile", suite="few", case=case, machine=here.id)
    results_file(out, [failing, absent], here)
    with pytest.raises(SystemExit, match="triton has no time in 1 case"):
        gpu_check.times(str(out), str(suite), "cpu")
    assert {row.impl: row.status for row in read([out]).rows} == {"conv3x3": "ok", "triton": "skipped"}


def test_other_versions_are_another_subject(monkeypatch):
    monkeypatch.setattr(gpu_check, "ask_torch", lambda: ("H100", "2.14 13000"))
    before = gpu_check.subject()
    assert gpu_check.subject() == before
    monkeypatch.setattr(gpu_check, "version_of", lambda package: "9.9")
    assert gpu_check.subject() != before
    changed = gpu_check.subject()
    monkeypatch.setattr(gpu_check, "ask_torch", lambda: ("H100", "2.14 13010"))
    assert gpu_check.subject() != changed


CHECK = """
import sys
from pathlib import Path
import gpu_check
gpu_check.subject = lambda: "s"
long = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(62.5)")
steps = [gpu_check.Step("versions", 30, (sys.executable, "-c", "")), gpu_check.Step("times", 60, long)]
gpu_check.steps = lambda folder, of: steps
gpu_check.check(Path(sys.argv[1]))
"""


def test_a_check_that_is_ended_ends_its_step_and_packs_what_there_is(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(gpu_check.ROOT), str(Path(__file__).parent)])}
    out = tmp_path / "out"
    checking = subprocess.Popen([sys.executable, "-c", CHECK, str(out)], env=environment, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (out / "times.txt").exists() or "begun" not in (out / "times.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        checking.terminate()
        said, _ = checking.communicate(timeout=60)
    finally:
        checking.kill()
    assert b"send back" in said
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert "out/times.txt" in archive.getnames()
    while runs("time.sleep(62.5)") and time.monotonic() < deadline + 20:
        time.sleep(0.1)
    assert not runs("time.sleep(62.5)")


def test_a_time_that_is_no_replay_is_marked_with_the_reason():
    case = Case(device="cuda", dtype="float16")
    rows = [
        record("conv3x3", 1e-4, noise=0, case=case, extra={"replayed": 1}),
        record("triton", 2e-4, noise=0, case=case, extra={"replayed": 0, "not_replayed": "RuntimeError: why"}),
    ]
    _, line, mark, reason = gpu_check.table(rows).splitlines()
    assert "conv3x3 100.0 (1.00), triton 200.0* (2.00)" in line
    assert "queued by the host" in mark
    assert reason == "triton: RuntimeError: why"


def test_a_program_that_is_not_there_is_no_failure_of_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "subject", lambda: "s")
    absent = Step("sanitizer", 5, ("no-such-program",))
    monkeypatch.setattr(gpu_check, "steps", lambda folder, of: [step("versions", ""), absent])
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *given: None)
    with pytest.raises(SystemExit) as ended:
        gpu_check.check(tmp_path / "out")
    assert not ended.value.code


def test_caches_that_cannot_be_written_are_kept_beside_the_results(tmp_path, monkeypatch):
    for name in ("SASA_BENCH_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(gpu_check.os, "access", lambda path, mode: False)
    gpu_check.keep_caches(tmp_path / "out")
    assert os.environ["SASA_BENCH_CACHE"] == str(tmp_path / "out-cache" / "sasa_bench_cache")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "out-cache" / "triton_cache_dir")
