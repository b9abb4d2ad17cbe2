"""The package as a library: measuring and reading from a script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import factory
import pandas as pd
import pytest

import sasa_bench
from sasa_bench import Case, Settings, UserError
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.record import STATUSES, Record
from sasa_bench.suite import from_data

ROOT = Path(__file__).parent.parent
QUICK = Settings(warmup_s=0.001, sample_s=0.001, budget_s=0.01, least=3, most=7)
SMALL = Case(channels=8, heads=2, resolution=5, threads=1)
SUITE = (
    'title = "A test?"\nimpls = ["unfold", "conv3x3"]\n[fixed]\nchannels = 8\nheads = 2\nresolution = 5\nthreads = 1\n'
)
BAD = """
import os
from dataclasses import replace
from sasa_bench.impls import get
def build(case, tensors):
    call = get("unfold").build(case, tensors)
    return lambda: {body}
IMPL = replace(get("unfold"), name="{name}", build=build)
"""


def test_cases_are_measured_with_each_implementation_whatever_one_of_them_does(tmp_path: Path) -> None:
    specs = []
    for name, body in {"wrong": "1.01 * call()", "aborting": "os.abort()"}.items():
        specs.append(tmp_path / f"{name}.py")
        specs[-1].write_text(BAD.format(name=name, body=body))
    told: list[Record] = []
    table = sasa_bench.run(SMALL, impls=["unfold", *specs, "conv3x3"], settings=QUICK, each=told.append)
    rows = table.set_index("impl")
    assert rows.status.to_dict() == {"unfold": "ok", "wrong": "wrong", "aborting": "error", "conv3x3": "ok"}
    assert rows.time_median_s.notna().to_dict() == {"unfold": True, "wrong": False, "aborting": False, "conv3x3": True}
    assert "SIGABRT" in rows.reason["aborting"]
    assert rows.max_abs_err["wrong"] > rows.err_budget["wrong"] > 0
    assert rows.time_vs_conv3x3["conv3x3"] == 1
    assert [(row.impl, row.status) for row in told] == list(zip(table.impl, table.status, strict=True))


def test_suite_files_and_suites_keep_their_name_and_their_file_is_resumed(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.toml", tmp_path / "out.jsonl"
    path.write_text(SUITE)
    other = from_data("other", {"title": "t", "impls": ["conv1x1"], "fixed": SMALL.to_dict()})
    table = sasa_bench.run([path, other], out=out, settings=QUICK)
    assert list(zip(table.suite, table.impl, strict=True)) == [
        ("mine", "unfold"),
        ("mine", "conv3x3"),
        ("other", "conv1x1"),
    ]
    pd.testing.assert_frame_equal(sasa_bench.load(out), table)
    with pytest.raises(UserError, match="--resume"):
        sasa_bench.run(path, out=out)
    told: list[Record] = []
    resumed = sasa_bench.run([path, SMALL], impls=["unfold"], out=out, resume=True, settings=QUICK, each=told.append)
    assert [(row.suite, row.impl) for row in told] == [("cases", "unfold")]
    assert len(resumed) == 4


@pytest.mark.parametrize(
    ("cases", "impls", "words"),
    [
        (SMALL, [], "name no implementations"),
        (SMALL, [print], "worker process"),
        (SMALL, ["magic"], "unknown implementation 'magic'"),
        (7, ["unfold"], "give a Case"),
        ([7], ["unfold"], "give a Case"),
        ([], ["unfold"], "no cases"),
        ("nowhere.toml", [], "no such suite file"),
        ([from_data("s", {"title": "t", "impls": ["unfold"]})] * 2, [], "two suites are called 's'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_refused_in_words(cases: object, impls: list[object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sasa_bench.run(cases, impls=impls, settings=QUICK)  # type: ignore[arg-type]


def test_a_loaded_table_has_typed_columns(tmp_path: Path) -> None:
    rows = [
        *factory.sweep(),
        factory.failed("naive", "error", "RuntimeError: boom", case=Case(resolution="6x10", threads=1)),
    ]
    rows.append(factory.record("blocked", case=Case(resolution=7, mode="training"), extra={"node_count": 7}))
    table = sasa_bench.load(factory.results_file(tmp_path / "a.jsonl", rows))
    assert list(table)[: len(COLUMNS)] == list(COLUMNS)
    assert list(table.impl.cat.categories) == ["unfold", "blocked", "conv3x3", "naive"]
    assert list(table.status.cat.categories) == list(STATUSES)
    assert list(table.resolution.cat.categories) == ["7", "6x10", "28"]
    assert list(table["mode"].cat.categories) == ["forward", "backward", "training"]
    assert table.kernel_size.dtype == "int64"
    for name in ("flops", "peak_memory_bytes", "sample_count", "node_count"):
        assert table[name].dtype == "Int64", name
    assert table.time_median_s.dtype == "float64"
    assert table.started_at[0] == pd.Timestamp("2026-11-22T10:00:00Z")
    failed = table[table.status == "error"].iloc[0]
    assert failed.reason == "RuntimeError: boom"
    assert pd.isna(failed.time_median_s)
    assert pd.isna(failed.peak_memory_bytes)
    medians = table.groupby("impl", observed=True).time_median_s.median()
    assert medians["conv3x3"] == pytest.approx(0.0022, rel=0.05)


def test_a_function_is_measured_in_this_process() -> None:
    found = sasa_bench.measure(time.sleep, 0.002, settings=QUICK)
    assert 0.002 <= min(found.samples_s) < 0.02
    assert found.inner_count == 1


def test_reading_results_does_not_import_torch(tmp_path: Path) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", factory.sweep())
    use = f"assert len(sasa_bench.load({str(path)!r})) == 12; sasa_bench.Case()"
    code = f"import sys, sasa_bench; {use}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_listed_and_there() -> None:
    assert set(sasa_bench.__all__) <= set(dir(sasa_bench))
    for name in sasa_bench.__all__:
        assert getattr(sasa_bench, name) is getattr(sasa_bench, name)
    with pytest.raises(AttributeError, match="attribute 'magic'"):
        sasa_bench.magic  # noqa: B018


def test_the_wheel_holds_every_file_of_the_package_and_the_suites(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("sasa_bench", "suites"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, check=True, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(source)) for path in (source / "sasa_bench").rglob("*") if path.is_file()}
    suites = {f"sasa_bench/suites/{path.name}" for path in (source / "suites").glob("*.toml")}
    assert len(suites) > 10
    assert package | suites <= files
    assert any(name.endswith("/LICENSE") for name in files)
