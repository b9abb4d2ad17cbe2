"""`pytest suites/` as a user runs it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sasa_bench import Case, load
from sasa_bench.cli import starter
from sasa_bench.results.file import read
from sasa_bench.timing.probe import detect

ROOT = Path(__file__).parent.parent
SUITE = """
title = "A test?"
impls = ["unfold", "wrong.py", "forward.py", "conv3x3"]
[axes]
mode = ["forward", "training"]
[fixed]
channels = 8
heads = 2
resolution = 5
threads = 1
"""
OTHER = "def test_other(benchmark):\n    benchmark(sum, [1, 2])\n"
QUICK = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=3", "-p", "no:cacheprovider")


def run_pytest(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Pytest in `folder`, away from the settings of this repository, with what is installed in `path`."""
    # Under xdist pytest-benchmark measures nothing, and it knows xdist by these variables.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(path or ROOT)]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def changed_kernel(path: Path, old: str, new: str) -> None:
    starter.write(path)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with suites/ as in the repository, and kernels one of which is wrong and one forward only."""
    made = tmp_path_factory.mktemp("project")
    changed_kernel(made / "wrong.py", 'if case.border == "mask"', "if False")
    one_way = '    return None if case.mode == "forward" else "one way"\n\n\ndef missing'
    changed_kernel(made / "forward.py", "    return None\n\n\ndef missing", one_way)
    suites = made / "suites"
    suites.mkdir()
    (suites / "conftest.py").write_text((ROOT / "suites" / "conftest.py").read_text())
    (suites / "mine.toml").write_text(SUITE)
    (suites / "settings.toml").write_text("[tool.other]\nkey = 1\n")
    (suites / "test_other.py").write_text(OTHER)
    return made


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[str, str]]:
    """Name of each test of `pytest suites` -> (passed, failed or skipped; why)."""
    run_pytest(folder, "suites", "--junitxml=ran.xml", *QUICK, "--benchmark-json=b.json", "--benchmark-save=one")
    found = {}
    for test in ElementTree.parse(folder / "ran.xml").iter("testcase"):
        ended = test.find("failure") if test.find("failure") is not None else test.find("skipped")
        state = "passed" if ended is None else {"failure": "failed", "skipped": "skipped"}[ended.tag]
        found[test.attrib["name"]] = (state, "" if ended is None else ended.attrib["message"])
    return found


def test_each_case_and_implementation_is_one_test(outcomes: dict[str, tuple[str, str]]) -> None:
    assert {name: state for name, (state, _) in outcomes.items()} == {
        "test_other": "passed",
        "unfold[mode=forward]": "passed",
        "unfold[mode=training]": "passed",
        "wrong[mode=forward]": "failed",
        "wrong[mode=training]": "failed",
        "forward[mode=forward]": "passed",
        "forward[mode=training]": "skipped",
        "conv3x3[mode=forward]": "passed",
        "conv3x3[mode=training]": "passed",
    }


def test_a_wrong_kernel_fails_and_a_case_it_cannot_do_is_skipped_each_with_its_reason(
    outcomes: dict[str, tuple[str, str]],
) -> None:
    assert "times its budget" in outcomes["wrong[mode=forward]"][1]
    assert "one way" in outcomes["forward[mode=training]"][1]


def test_its_file_is_read_like_any_results_file(folder: Path, outcomes: dict[str, tuple[str, str]]) -> None:
    results = read([folder / "b.json"])
    assert "1 benchmarks that are no cases" in results.warnings[0]
    table = load(folder / "b.json")
    assert set(table["impl"]) == {"unfold", "forward", "conv3x3"}
    assert len(table) == 5
    assert (table["status"] == "ok").all()
    assert (table["sample_count"] >= 3).all()
    assert (table["time_median_s"] > 0).all()
    assert (table["max_abs_err"] <= table["err_budget"]).all()
    assert (table["peak_memory_bytes"] >= 0).all()
    assert (table["flops"] > 0).all()
    assert (table["params"] > 0).all()
    assert table["time_vs_conv3x3"].notna().all()
    assert {row.case for row in results.rows} == {
        Case(channels=8, heads=2, resolution=5, threads=1, mode=mode) for mode in ("forward", "training")
    }
    here = detect().hardware_id
    assert set(table["machine"]) == {here}


def test_a_later_run_is_compared_with_a_saved_one_and_k_selects(
    folder: Path, outcomes: dict[str, tuple[str, str]]
) -> None:
    words = "unfold and mode and forward"
    ran = run_pytest(folder, "suites", "-k", words, "--benchmark-only", "--benchmark-compare", *QUICK)
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout
    assert "unfold[mode=forward] (NOW)" in ran.stdout
    assert "unfold[mode=forward] (0001_one)" in ran.stdout


def test_another_implementation_is_measured_in_place_of_those_of_the_suite(folder: Path) -> None:
    chosen = ("--impl", "forward.py", "--impl", "blocked")
    ran = run_pytest(folder, "suites/mine.toml", "--collect-only", "-q", *chosen)
    assert ran.stdout.split("\n\n")[0].splitlines() == [
        f"suites/mine.toml::{name}[mode={mode}]" for mode in ("forward", "training") for name in ("forward", "blocked")
    ]


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ('title = "?"\nimpls = ["unfold"]\n[axes]\nwindow = [3]\n', (), "unknown axis 'window'"),
        ("title = \n", (), "does not parse"),
        ('title = "?"\nimpls = ["unfold"]\n', ("-p", "no:benchmark"), "pip install pytest-benchmark"),
    ],
    ids=["unknown axis", "no TOML", "no fixture"],
)
def test_a_suite_that_cannot_be_collected_says_why(
    tmp_path: Path, content: str, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "bad.toml").write_text(content)
    ran = run_pytest(tmp_path, "-p", "sasa_bench.pytest_plugin", *arguments, "-p", "no:cacheprovider")
    assert ran.returncode == 2
    assert words in ran.stdout


def test_binding_is_refused_before_a_suite_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0-3")
    ran = run_pytest(folder, "suites/mine.toml", *QUICK)
    assert (ran.returncode, "unset GOMP_CPU_AFFINITY" in ran.stdout) == (2, True)


def test_two_folders_of_suites_go_together(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("conftest.py", "mine.toml"):
            (tmp_path / name / file).write_text((folder / "suites" / file).read_text())
    ran = run_pytest(tmp_path, "one", "two", "--collect-only", "-q", "-p", "no:cacheprovider", "--impl", "unfold")
    assert "4 tests collected" in ran.stdout


def test_suites_are_left_alone_where_nobody_asked(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SUITE)
    ran = run_pytest(tmp_path, "-p", "no:cacheprovider")
    assert "no tests ran" in ran.stdout


INSTALLED = {
    "METADATA": "Metadata-Version: 2.1\nName: sasa-entry\nVersion: 0\n",
    "entry_points.txt": "[pytest11]\nsasa_bench.pytest_plugin = sasa_bench.pytest_plugin\n",
}


def test_where_it_is_installed_a_named_suite_runs_and_others_are_left_alone(tmp_path: Path) -> None:
    info = tmp_path / "installed" / "sasa_entry-0.dist-info"
    info.mkdir(parents=True)
    for name, text in INSTALLED.items():
        (info / name).write_text(text)
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.toml").write_text(SUITE.replace('"wrong.py", "forward.py", ', '"kernels/k.py", '))
    (work / "kernels").mkdir()
    (work / "kernels" / "k.py").write_text("IMPL = replace(other, name='swift')\n")
    beside = {"path": info.parent}
    named = run_pytest(work, "mine.toml", "--collect-only", "-q", **beside)
    assert named.stdout.splitlines()[:3] == [f"mine.toml::{n}[mode=forward]" for n in ("unfold", "swift", "conv3x3")]
    assert "no tests" in run_pytest(work, "--collect-only", "-q", **beside).stdout
    (work / "conftest.py").write_text((ROOT / "suites" / "conftest.py").read_text())
    assert "6 tests collected" in run_pytest(work, "--collect-only", "-q", **beside).stdout
    assert "6 tests collected" in run_pytest(work, "mine.toml", "--collect-only", "-q", **beside).stdout
    both = run_pytest(work, "-p", "sasa_bench.pytest_plugin", "--collect-only", "-q", **beside)
    assert "6 tests collected" in both.stdout


def test_collecting_does_not_import_torch(folder: Path) -> None:
    code = (
        "import sys, pytest; pytest.main(['-c', '/dev/null', '--rootdir', '.', 'suites', '--collect-only', '-q', "
        "'-p', 'no:cacheprovider']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_two_kernel_files_of_one_name_are_refused_and_one_is_known_by_its_digest(folder: Path) -> None:
    for name in ("v1", "v2"):
        (folder / name).mkdir()
        starter.write(folder / name / "k.py")
    both = run_pytest(folder, "--impl", "v1/k.py", "--impl", "v2/k.py")
    assert both.returncode != 0
    assert "are both called" in both.stdout
    done = run_pytest(folder, "--impl", "v1/k.py", "--benchmark-json=digest.json", "--benchmark-max-time=0.01")
    assert done.returncode == 0, done.stdout
    rows = read([folder / "digest.json"]).rows
    assert {len(row.extra["source_digest"]) for row in rows} == {12}
