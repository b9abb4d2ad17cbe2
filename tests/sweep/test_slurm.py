"""What a submitter and a task do, without a cluster: Slurm's commands are played by functions."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from factory import machine, record
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_bench.case import Case
from sasa_bench.cli import cli
from sasa_bench.results.file import Writer, read
from sasa_bench.results.record import ImplInfo, Results
from sasa_bench.suite import Suite
from sasa_bench.sweep import slurm
from sasa_bench.sweep.slurm import Measure, Options, Progress, SlurmError, Sweep, drive, load, open_sweep, parse_options

INFOS = {"unfold": ImplInfo("unfold", "local_attention", "", 0), "conv3x3": ImplInfo("conv3x3", "convolution", "", 1)}
CASES = tuple(Case(batch=b, threads=2) for b in range(1, 6))
SUITE = Suite("five", "A question?", tuple(INFOS), CASES, ("batch",))


def opened(
    out: Path, resume: bool = False, suite: Suite = SUITE, tasks: int | None = 2, budget_s: float = 0.6
) -> Sweep:
    return open_sweep(out, resume, [suite], (), INFOS, Options(tasks=tasks), budget_s, 120.0)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], Options({"exclusive": True})),
        (["array=100"], Options({"exclusive": True}, tasks=100)),
        (["array=%8"], Options({"exclusive": True}, at_once=8)),
        (["array=100%8", "exclusive=no", "cpus_per_task=4"], Options({"cpus-per-task": "4"}, tasks=100, at_once=8)),
        (
            ["--partition=gpu", "gres=gpu:1", "constraint=a100|h100"],
            Options({"exclusive": True, "partition": "gpu", "gres": "gpu:1", "constraint": "a100|h100"}),
        ),
        (["exclusive=user", "mem=0"], Options({"exclusive": "user", "mem": "0"})),
    ],
)
def test_words_are_options_of_sbatch_and_nodes_are_asked_for_alone(words: list[str], wanted: Options) -> None:
    assert parse_options(words) == wanted


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("2-0", 2880), ("1-2:30", 1590), ("1-2:30:00", 1590), ("0:10", 1)],
)
def test_a_time_limit_may_have_any_of_the_forms_of_slurm(text: str, minutes: int) -> None:
    assert parse_options([f"time={text}"]).minutes == minutes


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("time=soon", "give minutes (90), hours:minutes:seconds"),
        ("array=0", "give the number of tasks (100), those at once (%8)"),
        ("array=1-4", "give the number of tasks"),
        ("output=x", "sasa-bench sets output itself"),
        ("job_name=x", "sasa-bench sets job-name itself"),
        ("partition=", "give NAME=VALUE"),
    ],
)
def test_a_word_that_cannot_be_used_is_named_with_what_to_give(word: str, said: str) -> None:
    with pytest.raises(SlurmError, match="--slurm") as refused:
        parse_options([word])
    assert word in str(refused.value)
    assert said in str(refused.value)


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
    with pytest.raises(SlurmError, match="is there already: --resume goes on with its sweep"):
        opened(out)
    with pytest.raises(SlurmError, match="was begun with other suites or options"):
        opened(out, resume=True, budget_s=0.1)
    other = tmp_path / "other.jsonl"
    other.write_text("{}")
    with pytest.raises(SlurmError, match="was not made by --slurm"):
        opened(other, resume=True)


def fill(sweep: Sweep, index: int, most: int | None = None) -> None:
    """Write what a task would, or the first `most` rows of it."""
    (suite,) = sweep.shards[index]
    rows = [record(impl, suite=suite.name, case=case) for case in suite.cases for impl in suite.impls]
    with Writer(sweep.file(index)) as writer:
        writer.machine(machine())
        writer.rows(rows[:most])


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


def test_a_case_measured_on_a_node_with_other_cores_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "available_cores", lambda: 64)
    every_core, fixed = (
        Suite("s", "?", ("unfold",), (Case(),), ()),
        Suite("t", "?", ("unfold",), (Case(threads=8),), ()),
    )
    known = Results([record(suite=name, case=Case(threads=8)) for name in ("s", "t")])
    rows = slurm._as_of_here(known, [every_core, fixed]).rows
    assert [row.case.threads for row in rows] == [64, 8]


def test_a_finished_task_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    fill(sweep, 1)
    monkeypatch.setattr(slurm, "_measure_rest", lambda sweep, index: pytest.fail("measured again"))
    Measure(sweep.folder)(1)


def _hold(path: Path, ready: Any, seconds: float) -> None:
    with slurm.locked(path):
        ready.set()
        time.sleep(seconds)


def test_a_second_start_of_a_task_waits_until_the_first_has_gone(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    ready = processes.Event()
    first = processes.Process(target=_hold, args=(tmp_path / "rows", ready, 60))
    first.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError), slurm.locked(tmp_path / "rows", wait=False):
        pass
    first.kill()
    with slurm.locked(tmp_path / "rows"):
        pass


class Cluster:
    """Plays Slurm: what is queued ends with the next question, as `fate` says of each submission of a task."""

    def __init__(self, sweep: Sweep, fate: dict[int, list[int | str | None]]) -> None:
        self.sweep, self.fate = sweep, fate
        self.queued: dict[str, int] = {}
        self.submissions: list[list[int]] = []
        self.cancelled: list[str] = []
        self.clock = 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Cluster:
        for name, played in {"queue": self.queue, "submit": self.submit, "_cancel": self.cancelled.extend}.items():
            monkeypatch.setattr(slurm, name, played)
        monkeypatch.setattr(slurm, "require_slurm", lambda: None)
        monkeypatch.setattr(slurm.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(slurm.time, "sleep", self.sleep)
        return self

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    def queue(self, name: str) -> dict[str, tuple[str, str]] | None:
        if self.clock == 0:
            return dict.fromkeys(self.queued, ("RUNNING", "None"))
        for key, index in list(self.queued.items()):
            becomes = self.fate[index].pop(0) if self.fate.get(index) else None
            if becomes == "waits":
                continue
            if becomes == "no answer":
                return None
            slurm.cut_off_unfinished_case(self.sweep.file(index), {"five": 2}) if self.sweep.file(
                index
            ).exists() else None
            self.sweep.file(index).unlink(missing_ok=True)
            fill(self.sweep, index, becomes if isinstance(becomes, int) else None)
            del self.queued[key]
        return dict.fromkeys(self.queued, ("PENDING", "Resources"))

    def submit(self, folder: Path, name: str, work: Any, indexes: list[int], options: Options) -> dict[str, int]:
        self.submissions.append(list(indexes))
        new = {f"{len(self.submissions)}_{place}": index for place, index in enumerate(indexes)}
        self.queued |= new
        return new

    def drive(self) -> tuple[list[int], list[Progress]]:
        seen: list[Progress] = []
        lost = drive(
            self.sweep.folder, self.sweep.name, Measure(self.sweep.folder), self.sweep.missing, Options(), seen.append
        )
        return lost, seen


def test_a_task_that_failed_is_submitted_again_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    cluster = Cluster(sweep, {0: ["waits", 2], 1: ["no answer"]}).install(monkeypatch)
    lost, seen = cluster.drive()
    assert lost == []
    assert cluster.submissions == [[0, 1], [0]]
    assert sweep.missing() == {}
    assert seen[0] == Progress(10, "")
    assert "no answer from Slurm" in {now.queue for now in seen}
    assert len(sweep.merged().results.rows) == 10


def test_a_task_that_never_adds_a_row_is_given_up_and_one_that_adds_some_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = opened(tmp_path / "out.jsonl", tasks=5)
    cluster = Cluster(sweep, {2: [0] * 9}).install(monkeypatch)
    lost, _ = cluster.drive()
    assert lost == [2]
    assert sweep.missing() == {2: 2}
    assert cluster.submissions == [[0, 1, 2, 3, 4], *[[2]] * (slurm.STRIKES - 1)]


def test_a_new_submitter_waits_for_the_tasks_of_the_old_one_and_ends_those_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    cluster = Cluster(sweep, {0: ["waits"]}).install(monkeypatch)
    (sweep.folder / "jobs.jsonl").write_text('{"7_0": 0, "7_1": 1}\n{"8": ')
    cluster.queued = {"7_0": 0, "9": 1}
    fill(sweep, 1)
    lost, _ = cluster.drive()
    assert lost == []
    assert cluster.submissions == []
    assert cluster.cancelled == ["9"]


def test_a_refusal_is_raised_at_first_and_reported_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> dict[str, int]:
        if cluster.submissions and len(cluster.submissions) != 2:
            return cluster.submit(*arguments)
        cluster.submissions += [[]] * bool(cluster.submissions)
        raise SlurmError("sbatch refused the job: no such partition")

    sweep = opened(tmp_path / "out.jsonl")
    cluster = Cluster(sweep, {0: [2]}).install(monkeypatch)
    monkeypatch.setattr(slurm, "submit", refuse)
    with pytest.raises(SlurmError, match="no such partition"):
        cluster.drive()
    cluster.submit(sweep.folder, "", None, [], Options())
    lost, seen = cluster.drive()
    assert (lost, sweep.missing()) == ([], {})
    assert "sbatch refused the job: no such partition" in {now.queue for now in seen}


def test_only_one_submitter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = opened(tmp_path / "out.jsonl")
    cluster = Cluster(sweep, {}).install(monkeypatch)
    with (
        slurm.locked(sweep.folder / "jobs.jsonl"),
        pytest.raises(SlurmError, match="another process sees to the sweep"),
    ):
        cluster.drive()


def test_the_log_of_a_task_that_was_given_up_is_named_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "jobs.jsonl").write_text('\n{"1_0": 0}\n\n{"2": 0}\n')
    log = tmp_path / "logs" / "2_0_log.err"
    log.write_text("Traceback\nModuleNotFoundError: No module named 'torch'\n")
    assert slurm.last_words(tmp_path, 0) == f"{log}: ModuleNotFoundError: No module named 'torch'"
    assert slurm.last_words(tmp_path, 1) == ""


def test_without_slurm_the_command_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))
    words = ["run", "suites/smoke.toml", "--slurm", "partition=gpu", "--out", str(tmp_path / "x.jsonl")]
    said = CliRunner().invoke(cli, words)
    assert isinstance(said.exception, SlurmError)
    assert "there is no sbatch here: run it on a login node" in str(said.exception)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'sasa-bench[slurm]'" in str(CliRunner().invoke(cli, words).exception)


def test_shards_and_slurm_exclude_each_other(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["run", "suites/smoke.toml", "--slurm", "--shard", "1/2"])
    assert said.exit_code
    assert "leave --shard out" in said.output
