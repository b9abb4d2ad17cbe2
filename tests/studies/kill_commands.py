"""Commands that write results, ended at random instants: what is lost, what can be read, what the next start gives.

`python tests/studies/kill_commands.py --kills 100` ends `run`, `run --resume`, `merge`, `gate` and `run --slurm` by
SIGKILL, by SIGTERM and by a full disk (a small tmpfs; needs root), and writes reports/reference/kills.csv. What is
ended is the real command in a process of its own; the worker is played, so that a case takes milliseconds and the
instants fall everywhere. The disk, the files, the plan and the command line are the real ones.

Counts are kept in kills.csv.begun after each kill: the same command continues there while the package is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kill_counts import Count, as_csv, begun_in, digest
from played import play

from sasa_bench import cli
from sasa_bench.gate import outputs as _outputs  # noqa: F401 (loaded once, before the processes part)
from sasa_bench.report.page import chart_script
from sasa_bench.report.table import frame
from sasa_bench.results.file import read, replace_text
from sasa_bench.sweep.plan import cut_short
from sasa_bench.timing.settings import Settings

REPORT = Path(__file__).parents[2] / "reports" / "reference" / "kills.csv"
IMPLS = ("unfold", "blocked", "conv3x3")
SUITE = f"""
title = "A question?"
impls = {list(IMPLS)}
[axes]
batch = {list(range(1, 25))}
[fixed]
channels = 8
heads = 2
resolution = 6
threads = 1
"""
DIFFERS = ("started_at", "build_s", "source_commit")
"""Columns that differ from run to run, besides times."""
WAYS = ("SIGKILL", "SIGTERM", "full disk")
DISK_KIB = 8192
ROUNDS = Settings().rounds


def start(words: Sequence[object], log: Path) -> int:
    """The command in a process of its own; its id. What it prints goes to `log`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the new process has its own answer to it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        play()
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def finish(words: Sequence[object], log: Path) -> tuple[int, float]:
    """(exit status, seconds) of the whole command."""
    started = time.monotonic()
    _, status = os.waitpid(start(words, log), 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def end_at(words: Sequence[object], log: Path, instant_s: float, number: signal.Signals) -> bool:
    """Start the command and send it a signal after some seconds; whether it was still running then."""
    pid = start(words, log)
    time.sleep(instant_s)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def table(path: Path) -> Any:
    """What a results file says, without times."""
    found = frame(read([path]))
    kept = [name for name in found.columns if not name.startswith("time_") and name not in DIFFERS]
    return found[kept].sort_values(["batch", "impl"]).reset_index(drop=True)


def _rows(path: Path, count: Count, whole: bool = False) -> set[tuple[Any, ...]]:
    """The rows of a file that may not exist yet, only those of `whole` cases if asked; what is wrong is counted."""
    if not path.exists() or not path.stat().st_size:
        return set()
    try:
        rows = read([path]).rows
    except ValueError as error:
        if "is empty" not in str(error):
            count.unreadable += 1
            count.remarks.append(str(error))
        return set()
    by_case: dict[Any, int] = {}
    for row in rows:
        by_case[row.case] = by_case.get(row.case, 0) + 1
    # The last case may be cut by a kill in the middle of its write; --resume measures it whole.
    count.split += sum(found < len(IMPLS) for found in by_case.values()) > 1
    kept = [row for row in rows if not whole or by_case[row.case] == len(IMPLS)]
    # A case with a row that is cut short is the one in progress: --resume measures it whole again.
    again = {row.case for row in rows if cut_short(row, ROUNDS)}
    return {(row.key, *(() if row.case in again else (row.samples_s, row.started_at))) for row in kept}


class Study:
    """The commands on a folder, and what they should leave."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.suite = folder / "mine.toml"
        self.suite.write_text(SUITE)
        self.whole = folder / "whole.jsonl"
        self.log = folder / "log"
        status, self.run_s = finish(["run", self.suite, "--out", self.whole], self.log)
        assert status == 0, self.log.read_text()
        self.expected = table(self.whole)
        for number in range(1, 5):
            shard = ["run", self.suite, "--shard", f"{number}/4", "--out", self.part(number)]
            assert finish(shard, self.log)[0] == 0

    def part(self, number: int) -> Path:
        return self.folder / f"part{number}.jsonl"

    def words(self, command: str, out: Path) -> list[object]:
        """The command line that is ended and, afterwards, repeated until it is done."""
        if command == "merge":
            return ["merge", *(self.part(number) for number in range(1, 5)), "--out", out]
        if command == "gate":
            return ["gate", "--base", "a", "--head", "b", "--no-relink", "--out", out]
        slurm_options = ["--slurm", "array=4"] if command == "run --slurm" else []
        return ["run", self.suite, "--out", out, "--resume", *slurm_options]

    def try_once(self, command: str, way: str, count: Count, disk: Path | None) -> None:
        """End the command once and look at what it left; then let it be done and look at the result."""
        place = (disk or self.folder) / "one"
        place.mkdir()
        out = place / ("gate" if command == "gate" else "out.jsonl")
        log = self.folder / "one.log"
        log.unlink(missing_ok=True)
        words = self.words(command, out)
        before: set[tuple[Any, ...]] = set()
        if command == "run --resume":
            lines = self.whole.read_bytes().splitlines(keepends=True)
            out.write_bytes(b"".join(lines[: self.random.randrange(5, len(lines))]))
            before = _rows(out, Count("", ""), whole=True)
        duration_s = self.length(command, words, out)
        count.kills += 1
        if way == "full disk":
            assert disk is not None
            ballast = disk / "ballast"
            room = shutil.disk_usage(disk).free
            ballast.write_bytes(b"x" * max(0, room - self.random.randrange(1, 64) * 1024))
            status, _ = finish(words, log)
            count.running += status != 0
            ballast.unlink()
        else:
            number = getattr(signal, way)
            count.running += end_at(words, log, self.random.uniform(0, duration_s), number)
        self.look(command, out, before, count)
        # A merge that is done refuses to be done again over its own result.
        status, _ = (0, 0.0) if command == "merge" and out.exists() else finish(words, log)
        self.judge(command, out, status, log, count)
        shutil.rmtree(place)

    def length(self, command: str, words: Sequence[object], out: Path) -> float:
        """Seconds that the command takes undisturbed, measured once."""
        if command not in self.lengths:
            spare = self.folder / "spare"
            spare.mkdir()
            target = spare / out.name
            status, seconds = finish([target if word == out else word for word in words], self.log)
            assert status == 0, self.log.read_text()
            self.lengths[command] = seconds
            shutil.rmtree(spare)
        return self.lengths[command]

    lengths: dict[str, float] = {}  # noqa: RUF012 (one study a process)

    def look(self, command: str, out: Path, before: set[tuple[Any, ...]], count: Count) -> None:
        """Count what is wrong with the files after the command was ended."""
        if command == "gate":
            count.unreadable += sum(not _whole(path) for path in out.glob("gate.*"))
            journal = out / "journal.jsonl"
            lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
            count.unreadable += sum(not _parses(line) for line in lines)
            return
        after = _rows(out, count)
        count.lost += len(before - after - {(row[0],) for row in after})
        if command == "run --slurm":
            for path in sorted(out.with_suffix(".tasks").glob("[0-9]*.jsonl")):
                _rows(path, count)
        if command == "merge":
            for number in range(1, 5):
                _rows(self.part(number), count)

    def judge(self, command: str, out: Path, status: int, log: Path, count: Count) -> None:
        """Count what is wrong after the command was repeated and is done."""
        said = log.read_text(errors="replace")
        count.tracebacks += "Traceback" in said
        if command == "gate":
            same = status == 0 and json.loads((out / "gate.json").read_text())["verdict"] == "PASS"
        else:
            same = status == 0 and table(out).equals(self.expected)
        if not same or "Traceback" in said:
            count.unequal += not same
            count.remarks.append(f"exit status {status}: {said[-300:]}")


def _whole(path: Path) -> bool:
    """Whether a page or document was written to its end."""
    text = path.read_text()
    if path.suffix == ".json":
        return _parses(text)
    if path.suffix == ".xml":
        try:
            ElementTree.fromstring(text)
        except ElementTree.ParseError:
            return False
    return bool(text) and (path.suffix != ".html" or text.rstrip().endswith("</html>"))


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


COMMANDS = ("run", "run --resume", "merge", "gate", "run --slurm")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of DISK_KIB, or None where this user may not mount one."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def study(
    folder: Path,
    kills: int,
    seed: int,
    commands: Sequence[str] = COMMANDS,
    begun: Sequence[Count] = (),
    say: Callable[[Count], None] = lambda count: None,
    keep: Callable[[Sequence[Count]], None] = lambda counts: None,
) -> list[Count]:
    """Every command in every way `kills` times, those of `begun` included; a full disk only where one can be mounted.

    `keep` is called with all counts after each kill, `say` with each count once it is complete.
    """
    Study.lengths = {}
    chart_script()  # made once, before the processes part: it takes most of the time of a page
    found = {(count.command, count.way): count for count in begun}
    with small_disk(folder) as disk:
        doing = Study(folder, seed)
        for command in commands:
            for way in WAYS:
                if way == "full disk" and disk is None:
                    continue
                count = found.setdefault((command, way), Count(command, way))
                while count.kills < kills:
                    doing.try_once(command, way, count, disk if way == "full disk" else None)
                    keep(list(found.values()))
                say(count)
    return list(found.values())


def main() -> None:
    """Run the study and write its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=REPORT)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the small disk is unmounted
    print(f"seed {asked.seed}", flush=True)
    kept, made_of = asked.out.with_name(f"{asked.out.name}.begun"), digest()
    with tempfile.TemporaryDirectory() as folder:
        counts = study(
            Path(folder),
            asked.kills,
            asked.seed,
            asked.commands,
            begun_in(kept),
            lambda count: print(count, flush=True),
            lambda counts: replace_text(kept, f"{made_of}\n{as_csv(counts)}"),
        )
    replace_text(asked.out, as_csv(counts))
    kept.unlink()
    sys.exit(0 if all(count.flawless for count in counts) else 1)


if __name__ == "__main__":
    main()
