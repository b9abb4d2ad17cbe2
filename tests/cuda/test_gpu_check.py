"""`make gpu-check` without a GPU: its limits, resuming and archive; host_checks.py runs a step on the fake driver."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Step

from sasa_bench.suite import load


def step(name: str, code: str, limit_s: int = 30) -> Step:
    return Step(name, limit_s, (sys.executable, "-c", code))


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
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"time.sleep(61.5)" in command for command in commands)


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
    assert f"lazy-loader {importlib.metadata.version('lazy-loader')}" in printed


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
    assert len({str(problem) for problem, every in found if every}) == 10
    assert any(not every for _, every in found)


def test_what_is_compiled_ahead_is_what_the_other_steps_launch():
    found = gpu_check.kernels_wanted()
    assert any(expression.startswith("sum_positions<") for _, expression in found)
    assert len(found) > 300
    for name in ("forward<", "backward_queries<", "backward_keys<"):
        assert any(expression.startswith(name) for _, expression in found)
