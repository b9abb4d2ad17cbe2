"""`make gpu-check` without a GPU: its limits, resuming and archive; host_checks.py runs a step on the fake driver."""

from __future__ import annotations

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


def test_what_succeeded_is_not_run_again(tmp_path):
    counter = tmp_path / "count"
    counting = f"open({str(counter)!r}, 'a').write('x')"
    failing = f"open({str(counter)!r}, 'a').write('y'); raise SystemExit(1)"
    for _ in range(2):
        found = gpu_check.run(tmp_path / "out", [step("first", counting), step("second", failing)])
    assert counter.read_text() == "xyy"
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == found


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


def test_what_is_compiled_ahead_is_what_the_other_steps_launch():
    found = gpu_check.kernels_wanted()
    assert len(found) > 300
    for name in ("forward<", "backward_queries<", "backward_keys<"):
        assert any(expression.startswith(name) for _, expression in found)
