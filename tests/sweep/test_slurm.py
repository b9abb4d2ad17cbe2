"""Sweeps in tasks: what a task measures, and what goes on after it died."""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from factory import failed, machine, record
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import INFOS, fill, opened

from sasa_bench.case import Case
from sasa_bench.cli import cli, main
from sasa_bench.results.file import ResultsError, Writer, read
from sasa_bench.results.record import Results
from sasa_bench.suite import Suite
from sasa_bench.sweep import cluster, slurm
from sasa_bench.sweep.cluster import SlurmError
from sasa_bench.sweep.slurm import Measure, load
from sasa_bench.timing.settings import Settings


@given(batches=st.sets(st.integers(1, 200), min_size=1, max_size=30), tasks=st.integers(1, 8))
@settings(max_examples=25)
def test_a_sweep_reads_back_as_it_was_cut(
    batches: set[int], tasks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    suite = Suite("many", "A question?", tuple(INFOS), tuple(Case(batch=b) for b in sorted(batches)), ("batch",))
    sweep = opened(folder / "out.jsonl", suite=suite, tasks=tasks)
    assert load(folder / "out.tasks") == sweep == opened(folder / "out.jsonl", resume=True, suite=suite)
    assert sum(sweep.missing().values()) == suite.size
    assert all(sweep.size(index) for index in range(len(sweep.shards)))


def test_a_sweep_that_is_there_goes_on_only_when_asked_and_only_as_it_was_begun(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    opened(out)
    with pytest.raises(SlurmError, match="already exists: pass --resume to continue its sweep"):
        opened(out)
    with pytest.raises(SlurmError, match="was started with other suites or options"):
        opened(out, resume=True, budget_s=0.1)
    other = tmp_path / "other.jsonl"
    other.write_text("{}")
    with pytest.raises(SlurmError, match="was not written by --slurm"):
        opened(other, resume=True)


@pytest.mark.parametrize(("most", "kept"), [(4, 4), (3, 2), (1, 0), (0, 0)])
def test_a_case_that_was_being_written_when_its_task_died_is_measured_anew(
    tmp_path: Path, most: int, kept: int
) -> None:
    sweep = opened(tmp_path / "out.jsonl", tasks=1)
    fill(sweep, 0, most)
    with sweep.file(0).open("ab") as file:
        file.write(b'{"kind": "row", "suite": "fi')
    assert slurm.count_rows(sweep.file(0)) == most
    slurm.cut_off_unfinished_case(sweep.file(0), {"five": 2})
    assert slurm.count_rows(sweep.file(0)) == kept
    assert len(read([sweep.file(0)]).rows) == kept


def test_a_task_is_done_when_every_worker_has_measured_its_rows(tmp_path: Path) -> None:
    sweep = opened(tmp_path / "out.jsonl", tasks=1)
    fill(sweep, 0, sweep.size(0))
    rows = read([sweep.file(0)]).rows
    assert sweep.done(0) == len(rows) == sweep.size(0)

    def write(workers: int) -> None:
        with Writer(sweep.file(0)) as writer:
            writer.rows(replace(row, worker_samples=(len(row.samples_s) // workers,) * workers) for row in rows)

    write(1)
    assert slurm.count_rows(sweep.file(0)) == len(rows)
    assert sweep.done(0) == Fraction(len(rows), Settings().rounds)
    first = sweep.missing()[0]
    assert 0 < first < len(rows), "what one worker has measured is progress"
    rows = [replace(row, samples_s=row.samples_s[:20]) for row in rows]
    write(2)
    assert 0 < sweep.missing()[0] < first
    rows = [replace(row, samples_s=row.samples_s[:18]) for row in rows]
    write(Settings().rounds)
    assert sweep.missing() == {}


def test_rows_that_a_task_began_on_another_node_are_left_out(tmp_path: Path) -> None:
    suite = Suite("every", "?", ("unfold",), (Case(), Case(batch=2)), ("batch",))
    sweep = opened(tmp_path / "out.jsonl", suite=suite, tasks=1)
    here, there = machine(), machine(cores=8, cpu="Another CPU")
    begun = [record(suite="every", case=Case(threads=2), worker_samples=(21,))]
    whole = [record(suite="every", case=Case(threads=8, batch=b), machine=there.id) for b in (1, 2)]
    with Writer(sweep.file(0)) as writer:
        writer.machine(here)
        writer.rows(begun)
        writer.machine(there)
        writer.rows(whole)
    assert [row.machine for row in sweep.merged().results.rows] == [there.id] * 2
    assert sweep.done(0) == 2, "what was begun elsewhere counts no more"


def test_a_kernel_file_that_changed_since_the_sweep_began_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INFOS, "unfold", replace(INFOS["unfold"], digest="aaa"))
    opened(tmp_path / "out.jsonl")
    assert opened(tmp_path / "out.jsonl", resume=True).digests == {"unfold": "aaa"}
    monkeypatch.setitem(INFOS, "unfold", replace(INFOS["unfold"], digest="bbb"))
    with pytest.raises(SlurmError, match="unfold changed since the sweep"):
        opened(tmp_path / "out.jsonl", resume=True)


def test_a_sweep_is_not_finished_by_another_sasa_bench(tmp_path: Path) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    fill(sweep, 0)
    with pytest.raises(ResultsError, match="was measured by another sasa-bench"):
        opened(tmp_path / "out.jsonl", resume=True)
    fill(sweep, 1)
    assert opened(tmp_path / "out.jsonl", resume=True).missing() == {}


def test_a_case_measured_on_a_node_with_other_cores_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "available_cores", lambda: 64)
    every_core, fixed = (
        Suite("s", "?", ("unfold",), (Case(),), ()),
        Suite("t", "?", ("unfold",), (Case(threads=8),), ()),
    )
    known = Results([record(suite=name, case=Case(threads=8)) for name in ("s", "t")])
    rows = slurm._as_of_here(known, [every_core, fixed]).rows
    assert [row.case.threads for row in rows] == [64, 8]


def test_a_task_does_not_go_on_with_rows_of_another_sasa_bench(tmp_path: Path) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    fill(sweep, 0, 2)
    before = sweep.file(0).read_bytes()
    with pytest.raises(ResultsError, match=r"0000.jsonl was measured by another sasa-bench \(0123456789ab;"):
        Measure(sweep.folder)(0)
    assert sweep.file(0).read_bytes() == before


def test_a_finished_task_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    fill(sweep, 1)
    monkeypatch.setattr(slurm, "_measure_rest", lambda sweep, index: pytest.fail("measured again"))
    Measure(sweep.folder)(1)


def test_without_slurm_the_command_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))
    words = ["run", "suites/smoke.toml", "--slurm", "partition=gpu", "--slurm", "time=5", "--out", str(tmp_path / "x")]
    said = CliRunner().invoke(cli, words)
    assert isinstance(said.exception, SlurmError)
    assert "there is no sbatch here: run it on a login node" in str(said.exception)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'sasa-bench[slurm]'" in str(CliRunner().invoke(cli, words).exception)


@pytest.mark.parametrize(("strict", "status"), [((), 0), (("--strict",), 2)])
def test_reasons_of_failed_rows_are_told(
    strict: tuple[str, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail_all(folder: Path, *rest: object) -> list[int]:
        sweep = load(folder)
        (suite,) = sweep.shards[0]
        with Writer(sweep.file(0)) as writer:
            writer.machine(machine())
            writer.rows(failed("unfold", "error", "no luck", suite=suite.name, case=case) for case in suite.cases)
        return []

    monkeypatch.setattr(cluster, "require_slurm", lambda: None)
    monkeypatch.setattr(cluster, "drive", fail_all)
    words = ["run", "suites/smoke.toml", "-c", "threads=1", "--impl", "unfold", "--slurm", "array=1", *strict]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "x.jsonl")])
    assert ended.value.code == status
    assert "error: no luck" in capsys.readouterr().err


def test_shards_and_slurm_exclude_each_other(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["run", "suites/smoke.toml", "--slurm", "exclusive", "--shard", "1/2"])
    assert said.exit_code
    assert "drop --shard" in said.output


@pytest.mark.parametrize("words", [["run", "suites/smoke.toml"], ["gate", "--base", "a", "--head", "b"]])
def test_a_value_that_is_no_option_of_slurm_is_refused_before_slurm_is_looked_for(words: list[str]) -> None:
    said = CliRunner().invoke(cli, [*words, "--slurm", "partition=gpu", "--slurm", "time=soon"])
    assert isinstance(said.exception, SlurmError)
    assert "--slurm time=soon: give minutes" in str(said.exception)
