"""Work of any kind through Slurm: array jobs whose tasks a submitter sees through to their last row.

Slurm places, limits and requeues; submitit writes the batch scripts. What was submitted lies in jobs.jsonl, in a folder
that submitter and nodes share. A task may be started any number of times, by Slurm or by a submitter, and does only
what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_bench.case import UserError
from sasa_bench.results.file import append_line, replace_text

MOST_TASKS = 1000
"""Slurm's MaxArraySize is 1001 unless a cluster sets it otherwise."""
TIME_MIN = 60
"""Time limit of a task in minutes where none is given: what is expected may be several times too low."""
STRIKES = 3
"""Submissions of a task in a row that added no row before it is given up."""
LOOK_S, ASK_S = 2.0, 15.0
"""Seconds between looks at the tasks' files, and between questions to Slurm's controller."""
OURS = ("job-name", "nodes", "ntasks", "output", "error", "open-mode", "signal", "requeue", "wrap")


class SlurmError(UserError):
    """Slurm cannot be used as asked; the message states why and what to do."""


@dataclass(frozen=True)
class Options:
    """What is asked of Slurm.

    flags      long options of sbatch and their values; True for an option without a value
    minutes    time limit of a task
    tasks      how many tasks to cut into; None: as many as give each TASK_S seconds
    at_once    tasks that may run at the same time; None: as many as Slurm finds room for
    """

    flags: Mapping[str, str | bool] = field(default_factory=dict)
    minutes: int = TIME_MIN
    tasks: int | None = None
    at_once: int | None = None


def parse_options(words: Sequence[str]) -> Options:
    """Options from words such as partition=gpu, gres=gpu:1, time=2:00:00, array=100%8 and contiguous.

    Every long option of sbatch is passed on. A task gets nodes for itself (--exclusive) unless `exclusive` says `no`,
    `user` or `mcs`. Raises SlurmError.
    """
    flags: dict[str, str | bool] = {"exclusive": True}
    minutes, tasks, at_once = TIME_MIN, None, None
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if not name or (not value and (equals or name in ("time", "array"))):
            raise SlurmError(f"--slurm {word}: give NAME=VALUE with a long option of sbatch, such as partition=gpu")
        if name in OURS:
            raise SlurmError(f"--slurm {word}: sasa-bench sets {name} itself; leave it out")
        if name == "time":
            minutes = _minutes(value)
        elif name == "array":
            tasks, at_once = _array(value)
        elif name == "exclusive" and value in ("no", "yes"):
            flags["exclusive"] = value == "yes"
        else:
            flags[name] = value or True
    return Options({name: value for name, value in flags.items() if value is not False}, minutes, tasks, at_once)


def _array(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d*)(?:%(\d+))?", text)
    numbers = [int(part) if part else None for part in match.groups()] if match else []
    if not any(numbers) or 0 in numbers:
        raise SlurmError(f"--slurm array={text}: give the number of tasks (100), those at once (%8), or both (100%8)")
    return numbers[0], numbers[1]


def _minutes(text: str) -> int:
    """Minutes of a time limit in any of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise SlurmError(
            f"--slurm time={text}: give minutes (90), hours:minutes:seconds (1:30:00) or days-hours (2-12)"
        )
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1]:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match[4]:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    if not seconds:
        raise SlurmError(f"--slurm time={text}: give a limit of a minute or more")
    return math.ceil(seconds / 60)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold `path`, made where missing, against every other process on every node; the lock goes with the process.

    The library filelock would not do: where a file system has no flock it falls back, after a warning, to a lock file
    that outlives a killed process, and its older releases truncate the file that they lock.

    Raises BlockingIOError when it is held and `wait` is False, SlurmError where the file system has no locks.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise SlurmError(
                f"{path} cannot be locked ({error.strerror}), and without locks a row may be measured twice: "
                "put --out on a file system with flock (NFS has it; Lustre when mounted with -o flock)"
            ) from None
        yield


@dataclass(frozen=True)
class Progress:
    """missing: rows still to be measured; queue: tasks by Slurm's state, with the reason of the first that waits."""

    missing: int
    queue: str


def drive(
    folder: Path,
    name: str,
    work: Callable[[int], None],
    missing: Callable[[], dict[int, int]],
    options: Options,
    report: Callable[[Progress], None],
) -> list[int]:
    """Submit tasks until nothing is missing; returns those given up, after STRIKES submissions without a new row.

    `work(index)` runs on a node, may be started again at any time, and must pickle. `missing()` gives the number of
    rows that each unfinished task lacks. `name` is the job's, and no other sweep may have it. Tasks that a submitter
    before this one left in Slurm's queue are waited for.

    Raises SlurmError when Slurm cannot be used or refuses the first job, or when another submitter is at work; once it
    has accepted one, a refusal is reported and tried again.
    """
    require_slurm()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "jobs.jsonl", wait=False))
        except BlockingIOError:
            raise SlurmError(
                f"another process runs the sweep or gate in {folder}: wait for it, or stop it first"
            ) from None
        return _drive(folder, name, work, missing, options, report)


def _drive(
    folder: Path,
    name: str,
    work: Callable[[int], None],
    missing: Callable[[], dict[int, int]],
    options: Options,
    report: Callable[[Progress], None],
) -> list[int]:
    owners = submitted(folder)
    queued = queue(name)
    if queued is None:
        raise SlurmError("Slurm's controller does not answer: see `squeue` and `scontrol ping`")
    _cancel(key for key in queued if key not in owners)
    missing_then: dict[int, int] = {}
    strikes: Counter[int] = Counter()
    accepted, refused = False, ""
    ask_at, fresh = time.monotonic() + ASK_S, True
    while left := missing():
        if fresh and queued is not None:
            waited_for = {owners[key] for key in queued if key in owners}
            lost = [index for index in left if index not in waited_for]
            for index in lost:
                strikes[index] = strikes[index] + 1 if missing_then.get(index) == left[index] else 0
            again = [index for index in lost if strikes[index] < STRIKES]
            if not again and not waited_for:
                return lost
            if again:
                try:
                    new = submit(folder, name, work, again, options)
                except SlurmError as error:
                    if not accepted:
                        raise
                    refused = str(error)
                else:
                    append_line(folder / "jobs.jsonl", new)
                    owners |= new
                    missing_then |= {index: left[index] for index in again}
                    accepted, refused, ask_at = True, "", 0.0
        report(Progress(sum(left.values()), refused or _describe(queued)))
        time.sleep(LOOK_S)
        if fresh := time.monotonic() >= ask_at:
            ask_at = time.monotonic() + ASK_S
            queued = queue(name)
    return []


def submitted(folder: Path) -> dict[str, int]:
    """Job -> task of everything submitted for the sweep in `folder`, oldest first."""
    owners: dict[str, int] = {}
    for line in (folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            owners |= json.loads(line)
    return owners


def _describe(queued: Mapping[str, tuple[str, str]] | None) -> str:
    if queued is None:
        return "no answer from Slurm"
    states = Counter(state.lower() for state, _ in queued.values())
    waiting = [reason for state, reason in queued.values() if state == "PENDING" and reason != "None"]
    words = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), reverse=True))
    return f"{words} ({waiting[0]})" if waiting else words


def queue(name: str) -> dict[str, tuple[str, str]] | None:
    """Job -> (state, reason) of every task of that job name that waits or runs; None when Slurm does not answer.

    A task of an array is called ARRAY_INDEX, a single one by its number alone.
    """
    command = ["squeue", "--noheader", "--array", "--name", name, "--format", "%F|%K|%T|%r"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for line in answer.splitlines():
        array, index, state, reason = line.strip().split("|")
        found[f"{array}_{index}" if index.isdecimal() else array] = (state, reason)
    return found


def _cancel(jobs: Iterable[str]) -> None:
    """End tasks of a submitter that died before it noted what it had submitted; the rows they measured stay."""
    for key in jobs:
        subprocess.run(["scancel", key], check=False, capture_output=True)


def read_plan(folder: Path) -> dict[str, Any]:
    """What plan.json of a folder of tasks holds. Raises SlurmError where there is none."""
    path = folder / "plan.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlurmError(f"{folder} holds no plan.json: --slurm did not make it") from None
    except (OSError, ValueError) as error:
        raise SlurmError(f"{path} cannot be read ({error}): give another --out") from None
    if not isinstance(found, dict):
        raise SlurmError(f"{path} holds no plan: give another --out")
    return found


def write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that other nodes see the whole file or none."""
    replace_text(path, json.dumps(values))


def cancel(name: str) -> None:
    """End every task of that job name, those that wait and those that run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", "--name", name], check=False, capture_output=True, timeout=60)


def require_slurm() -> None:
    """Raise SlurmError, with what to do, where submitit or Slurm's commands are missing."""
    try:
        import submitit  # noqa: F401 (the real import is where it is used)
    except ModuleNotFoundError:
        raise SlurmError("--slurm needs submitit: pip install 'sasa-bench[slurm]'") from None
    for command in ("sbatch", "srun", "squeue", "scancel"):
        if not shutil.which(command):
            raise SlurmError(f"--slurm needs Slurm's commands, and there is no {command} here: run it on a login node")


def submit(
    folder: Path, name: str, work: Callable[[int], None], indexes: Sequence[int], options: Options
) -> dict[str, int]:
    """Submit `work(index)` for each index as one array job; job -> index. Raises SlurmError with Slurm's reason."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder / "logs")
    executor.update_parameters(
        job_name=name,
        time=options.minutes,
        nodes=1,
        ntasks_per_node=1,
        array_parallelism=options.at_once or len(indexes),
        srun_args=["--cpu-bind=none"],
        wckey=None,
        additional_parameters={"requeue": True} | dict(options.flags),
    )
    try:
        jobs = executor.map_array(work, list(indexes))
    except (FailedJobError, FailedSubmissionError, OSError, subprocess.SubprocessError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SlurmError(f"sbatch refused the job: {said[-1]}") from None
    return {job.job_id: index for job, index in zip(jobs, indexes, strict=True)}


def last_words(folder: Path, index: int) -> str:
    """The log of the last job of task `index`, and its last line, for an error message; "" where there is none."""
    for key in (key for key, owner in reversed(submitted(folder).items()) if owner == index):
        log = folder / "logs" / f"{key}_0_log.err"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"{log}: {lines[-1]}" if lines else str(log)
    return ""
