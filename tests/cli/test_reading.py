"""The verbs that read results files, as a user types them: exit status, one clear line, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import factory
import pytest
from command import sasa_bench

from sasa_bench import load
from sasa_bench.impls import names


def test_unlike_machines_are_not_put_in_one_report(tmp_path: Path) -> None:
    other = factory.machine(cpu="Other CPU")
    first = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    second = factory.results_file(tmp_path / "b.jsonl", [factory.record(machine=other.id)], other)
    ran = sasa_bench("report", first, second, "--out", tmp_path / "c.html")
    assert ran.returncode == 1
    assert "Test-CPU" in ran.stderr
    assert "Other-CPU" in ran.stderr


def test_list_prints_the_size_of_the_product_and_every_implementation(suite: Path) -> None:
    ran = sasa_bench("list", suite)
    assert ran.returncode == 0
    assert "2 cases × 3 implementations = 6 rows" in ran.stdout
    for name in names():
        assert name in ran.stdout


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
    for words in (["report", path], ["figure", path, "--out", tmp_path / "a.svg"]):
        assert "cut off" in sasa_bench(*words).stderr
    with pytest.warns(UserWarning, match="cut off"):
        assert len(load(path)) == 11


def test_a_table_has_the_format_that_its_file_is_named_after(tmp_path: Path) -> None:
    results = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    for name, begins in (("t.csv", b"suite,impl,"), ("t.md", b"| ")):
        assert sasa_bench("table", results, "--out", tmp_path / name).returncode == 0
        assert (tmp_path / name).read_bytes().startswith(begins), name


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


def test_a_report_of_many_files_has_a_name_that_file_systems_take(tmp_path: Path) -> None:
    names = [f"kernel_size-20260101-1200{number:02d}" for number in range(12)]
    files = [factory.results_file(tmp_path / f"{name}.jsonl", factory.sweep()) for name in names]
    ran = sasa_bench("report", *files)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / f"{names[0]}-and-11-more.html").exists()
    long = factory.results_file(tmp_path / f"{'a' * 230}.jsonl", factory.sweep())
    assert sasa_bench("report", long).returncode == 0
    assert long.with_suffix(".html").exists()
