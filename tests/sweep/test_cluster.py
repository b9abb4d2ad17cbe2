"""What a submitter does, without a cluster: Slurm's commands are played by functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tasks import fill, opened

from sasa_bench.sweep import cluster as through
from sasa_bench.sweep import slurm
from sasa_bench.sweep.cluster import Options, Progress, SlurmError, drive, parse_options
from sasa_bench.sweep.slurm import Measure, Sweep


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
        (["exclusive"], Options({"exclusive": True})),
        (["contiguous"], Options({"exclusive": True, "contiguous": True})),
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
        ("time=0", "give a limit of a minute or more"),
        ("array=0", "give the number of tasks (100), those at once (%8)"),
        ("array=1-4", "give the number of tasks"),
        ("output=x", "sasa-bench sets output itself"),
        ("job_name=x", "sasa-bench sets job-name itself"),
        ("partition=", "give NAME=VALUE"),
        ("time", "give NAME=VALUE"),
    ],
)
def test_a_word_that_cannot_be_used_is_named_with_what_to_give(word: str, said: str) -> None:
    with pytest.raises(SlurmError, match="--slurm") as refused:
        parse_options([word])
    assert word in str(refused.value)
    assert said in str(refused.value)


HOLD = """
import sys, time
from pathlib import Path
from sasa_bench.sweep.cluster import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_start_of_a_task_waits_until_the_first_has_gone(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(rows)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError), through.locked(rows, wait=False):
        pass
    first.kill()
    with through.locked(rows):
        pass
    first.communicate()


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
            monkeypatch.setattr(through, name, played)
        monkeypatch.setattr(through, "require_slurm", lambda: None)
        monkeypatch.setattr(through.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(through.time, "sleep", self.sleep)
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
    assert cluster.submissions == [[0, 1, 2, 3, 4], *[[2]] * (through.STRIKES - 1)]


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
    monkeypatch.setattr(through, "submit", refuse)
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
        through.locked(sweep.folder / "jobs.jsonl"),
        pytest.raises(SlurmError, match="another process runs the sweep"),
    ):
        cluster.drive()


def test_the_log_of_a_task_that_was_given_up_is_named_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "jobs.jsonl").write_text('\n{"1_0": 0}\n\n{"2": 0}\n')
    log = tmp_path / "logs" / "2_0_log.err"
    log.write_text("Traceback\nModuleNotFoundError: No module named 'torch'\n")
    assert through.last_words(tmp_path, 0) == f"{log}: ModuleNotFoundError: No module named 'torch'"
    assert through.last_words(tmp_path, 1) == ""
