"""Sets the gate beside pytest-benchmark, asv continuous and pyperf: false alarms and power, same cases, same minutes.

Each repeat compares identical code and, after that, code in which some cases are slowed on purpose. The gate goes
first; the others get the wall time that it has taken in the median so far, by scaling their rounds, but never less than
the least that lets them work. Every comparison is a line of OUT.jsonl, from which OUT.csv and OUT.md are made anew each
time; stopped, the same command goes on where it was.

    python tests/studies/gate_validation.py --repeats 20 --out reports/reference/gate/validation
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy import stats
from tabulate import tabulate

from sasa_bench import impls as registry
from sasa_bench.gate import run as gate
from sasa_bench.gate.arms import PACKAGE, set_up
from sasa_bench.gate.pairs import ENVIRONMENT, Counts, Point
from sasa_bench.gate.verdicts import REGRESSION, Rules
from sasa_bench.suite import load
from sasa_bench.timing.probe import available_cores

ROOT = Path(__file__).parents[2]
TOOLS = ("gate", "pytest-benchmark", "asv", "pyperf")
THRESHOLD = 10
"""Per cent that pytest-benchmark and asv let pass; pyperf tells what is significant."""


@dataclass(frozen=True)
class Comparison:
    """One comparison of base with head by one tool.

    slowed: cases slowed on purpose in head by `ratio`; flagged: cases that the tool called slower.
    effort: what is scaled to fill the time, in the unit of the tool; settings: in words.
    """

    tool: str
    settings: str
    ratio: float
    repeat: int
    cases: list[str]
    slowed: list[str]
    flagged: list[str]
    seconds: float
    effort: float
    at: str


@dataclass(frozen=True)
class Job:
    """What a tool is asked: names of cases -> points, those slowed in head, the time to fill, a folder of its own."""

    points: Mapping[str, Point]
    slowed: Sequence[str]
    ratio: float
    seconds: float
    effort: float | None
    folder: Path


class ValidationError(Exception):
    """A tool that did not compare; the message holds its last words."""


# What the tools run. Every tool builds the same steps from cases.json; slowed.json names those to slow in this arm.
STEPS = '''
import json
import os
import time
from pathlib import Path

import torch

from sasa_bench.case import from_dict
from sasa_bench.gate.pairs import SEED
from sasa_bench.timing.prepared import prepare

HERE = Path(__file__).parent
CASES = json.loads((HERE / "cases.json").read_text())
ready = {}


def step(name, arm):
    """The call of a case; in an arm that names it in slowed.json, each call is followed by a busy wait."""
    if name not in ready:
        impl, fields = CASES[name]
        case = from_dict(fields)
        torch.set_num_threads(case.threads)
        prepared = prepare(impl, case, SEED, lambda what: None, {}, check=False)
        if prepared.step is None:
            raise RuntimeError(f"{name}: {prepared.row['reason']}")
        slowed = json.loads((Path(arm) / "slowed.json").read_text())
        ready[name] = longer(prepared.step, slowed[name]) if name in slowed else prepared.step
    return ready[name]


def longer(call, ratio):
    def slowed():
        start = time.perf_counter()
        call()
        end = start + ratio * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass

    return slowed
'''
PYTEST = """
import os

import pytest
from steps import CASES, step


@pytest.mark.parametrize("name", list(CASES))
def test_step(benchmark, name):
    benchmark(step(name, os.environ["ARM"]))
"""
PYPERF = """
import os
import time

import pyperf
from steps import CASES, step


def timed(loops, name):
    call = step(name, os.environ["ARM"])
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return time.perf_counter() - start


runner = pyperf.Runner()
for name in CASES:
    runner.bench_time_func(name, timed, name)
"""
ASV_BENCHMARK = """
import os
import sys

sys.path[:0] = [os.environ["STEPS"], os.environ["ROOT"]]
from steps import CASES, step


class Suite:
    params = list(CASES)
    param_names = ["case"]
    timeout = 600

    def setup(self, name):
        self.call = step(name, os.path.join(os.environ["ASV_ENV_DIR"], "project"))

    def time_step(self, name):
        self.call()
"""
# asv takes two revisions in turns only in environments that it installs them into; here a checkout is all it takes.
ASV_ENVIRONMENT = """
import os
import sys

from asv.environment import Environment


class Checkout(Environment):
    tool_name = "checkout"

    def __init__(self, conf, python, requirements, tagged_env_vars):
        self._python, self._requirements = python, requirements
        super().__init__(conf, python, requirements, tagged_env_vars)

    @classmethod
    def matches(cls, python):
        return True

    def check_presence(self):
        return os.path.isdir(self._path)

    def _setup(self):
        os.makedirs(self._path)

    def find_executable(self, executable):
        return sys.executable

    def run(self, args, **kwargs):
        return self.run_executable("python", args, **kwargs)
"""


def by_gate(job: Job) -> tuple[list[str], str, float]:
    """This package in every arm; what is slowed waits for a share of its calibrated time, in every call."""
    source = job.folder / "source"
    shutil.copytree(ROOT / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    arms = set_up(str(ROOT), str(source), job.folder / "gate")
    keys = [job.points[name].key for name in job.slowed]

    def spin(counts: Counts) -> dict[str, float]:
        return {key: (job.ratio - 1) * counts.seconds[key] for key in keys if key in counts.seconds}

    rules = Rules()
    result = gate.Gate(arms, list(job.points.values()), rules, job.seconds, 120.0, spin=spin).run()
    flagged = {case.key for case in result.cases if case.verdict == REGRESSION}
    settings = f"{rules.screen_pairs} + {rules.confirm_pairs} pairs, margin {rules.margin:.1%}, level {rules.alpha:.0%}"
    return [name for name, point in job.points.items() if point.key in flagged], settings, 1.0


def by_pytest_benchmark(job: Job) -> tuple[list[str], str, float]:
    """Base saved, then head compared; effort: --benchmark-max-time."""
    effort = max(0.05, job.effort or (job.seconds / 2 - 8) / len(job.points))
    arms = _write(job, "bench_steps.py", PYTEST)
    (job.folder / "pytest.ini").write_text("[pytest]\n")
    common = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "bench_steps.py"),
        *("--benchmark-storage=saved", f"--benchmark-max-time={effort:.3f}", "--benchmark-min-rounds=5"),
    ]
    _call([*common, "--benchmark-save=base"], job.folder, {"ARM": str(arms["base"])})
    fail = f"median:{THRESHOLD}%"
    said = _call(
        [*common, "--benchmark-compare=0001", f"--benchmark-compare-fail={fail}"],
        job.folder,
        {"ARM": str(arms["head"])},
        allowed=(0, 1),
    )
    return regressed(said), f"--benchmark-compare-fail={fail}, max time {effort:.2g} s", effort


def regressed(said: str) -> list[str]:
    """The names that pytest-benchmark says have regressed. Raises ValidationError where it compared nothing."""
    found = re.findall(r"test_step\[(\w+)\].* - Field '\w+' has failed", said)
    if not found and not re.search(r"\b\d+ passed", said):
        raise ValidationError(f"pytest-benchmark compared nothing: {said[-2000:]}")
    if bool(found) != ("Performance has regressed" in said):
        raise ValidationError(f"cannot tell what pytest-benchmark found: {said[-2000:]}")
    return sorted(set(found))


def by_asv(job: Job) -> tuple[list[str], str, float]:
    """`asv continuous` over two commits with interleaved rounds; effort: seconds of samples a case, round and arm."""
    rounds = 4
    effort = max(0.02, job.effort or (job.seconds - 20) / 2 / rounds / len(job.points) - 0.5)
    arms = _write(job, "steps_only.py", "")
    (job.folder / "benchmarks").mkdir()
    (job.folder / "benchmarks" / "__init__.py").write_text("")
    (job.folder / "benchmarks" / "bench.py").write_text(ASV_BENCHMARK)
    (job.folder / "checkout.py").write_text(ASV_ENVIRONMENT)
    project = job.folder / "repository"
    git = ["git", "-C", str(project), "-c", "user.name=validation", "-c", "user.email=validation@example.org"]
    project.mkdir()
    _call([*git, "init", "-q", "-b", "main"], job.folder, {})
    commits = []
    for arm in ("base", "head"):
        shutil.copy(arms[arm] / "slowed.json", project)
        (project / "arm").write_text(arm)
        _call([*git, "add", "."], job.folder, {})
        _call([*git, "commit", "-qm", arm], job.folder, {})
        commits.append(_call([*git, "rev-parse", "HEAD"], job.folder, {}).strip())
    settings: dict[str, Any] = {
        "version": 1,
        "project": "steps",
        "repo": str(project),
        "branches": ["main"],
        "environment_type": "checkout",
        "plugins": [".checkout"],
        "pythons": [f"{sys.version_info.major}.{sys.version_info.minor}"],
        "build_command": [],
        "install_command": [],
        "uninstall_command": [],
    }
    (job.folder / "asv.conf.json").write_text(json.dumps(settings))
    environment = {"STEPS": str(job.folder), "ROOT": str(ROOT), "HOME": str(job.folder)}
    _call([sys.executable, "-m", "asv", "machine", "--yes"], job.folder, environment)
    repeat = f"(3, 100000, {effort:.3f})"  # at least, at most, seconds
    command = [
        *(sys.executable, "-m", "asv", "continuous", *commits, "--interleave-rounds", "-f", f"{1 + THRESHOLD / 100:g}"),
        *("-a", f"rounds={rounds}", "-a", f"repeat={repeat}", "-a", "sample_time=0.01", "-a", "warmup_time=0.05"),
        "--show-stderr",
        "--no-only-changed",
    ]
    said = _call(command, job.folder, environment, allowed=(0, 1))
    words = f"continuous --interleave-rounds -f {1 + THRESHOLD / 100:g}, {rounds} rounds of {effort:.2g} s"
    return worsened(said, list(job.points)), words, effort


def worsened(said: str, names: Sequence[str]) -> list[str]:
    """The names marked + in the table of asv. Raises ValidationError where the table misses a case."""
    marks = {name: mark for mark, name in re.findall(r"^\|\s*(\S?)\s*\|.*time_step\('(\w+)'\)", said, re.MULTILINE)}
    missing = [name for name in names if name not in marks]
    if missing:
        raise ValidationError(f"asv compared nothing for {', '.join(missing)}: {said[-2000:]}")
    return sorted(name for name in names if marks[name] == "+")


def by_pyperf(job: Job) -> tuple[list[str], str, float]:
    """Base, then head, then compare_to; effort: seconds of values a process, of two processes or more a case."""
    start_up = 3.5
    room = job.seconds / 2 / len(job.points)
    processes = max(2, min(20, int(room / (2 * start_up))))
    effort = max(0.4, job.effort or room / (processes + 1) - start_up)
    arms = _write(job, "bench_steps.py", PYPERF)
    inherited = ",".join(["ARM", "PYTHONPATH", *ENVIRONMENT])
    values = 3
    for arm in ("base", "head"):
        command = [
            *(sys.executable, "bench_steps.py", "-q", "-o", f"{arm}.json", f"--inherit-environ={inherited}"),
            *(
                f"--processes={processes}",
                f"--values={values}",
                "--warmups=1",
                f"--min-time={effort / (values + 1):.4f}",
            ),
        ]
        _call(command, job.folder, {"ARM": str(arms[arm])})
    said = _call([sys.executable, "-m", "pyperf", "compare_to", "base.json", "head.json"], job.folder, {})
    words = f"compare_to, {processes} processes of {values} values of {effort / (values + 1):.2g} s"
    return slower(said, list(job.points)), words, effort


def slower(said: str, names: Sequence[str]) -> list[str]:
    """The names that pyperf calls slower. Raises ValidationError where it names a case in no way."""
    found = re.findall(r"^(?:Mean \+- std dev|(\w+)): .*: [\d.]+x slower", said, re.MULTILINE)
    unknown = [name for name in names if not re.search(rf"\b{name}\b", said)] if len(names) > 1 else []
    if unknown:
        raise ValidationError(f"pyperf compared nothing for {', '.join(unknown)}: {said[-2000:]}")
    return sorted(name or names[0] for name in found)


COMPARE: dict[str, Callable[[Job], tuple[list[str], str, float]]] = {
    "gate": by_gate,
    "pytest-benchmark": by_pytest_benchmark,
    "asv": by_asv,
    "pyperf": by_pyperf,
}


def _write(job: Job, name: str, content: str) -> dict[str, Path]:
    """The generated files of a tool; returns the folders of the arms."""
    cases = {name: [point.impl, point.case.to_dict()] for name, point in job.points.items()}
    (job.folder / "cases.json").write_text(json.dumps(cases))
    (job.folder / "steps.py").write_text(STEPS)
    (job.folder / name).write_text(content)
    arms = {}
    for arm, slowed in (("base", {}), ("head", dict.fromkeys(job.slowed, job.ratio - 1))):
        arms[arm] = job.folder / arm
        arms[arm].mkdir()
        (arms[arm] / "slowed.json").write_text(json.dumps(slowed))
    return arms


def _call(command: Sequence[str], folder: Path, environment: Mapping[str, str], allowed: Sequence[int] = (0,)) -> str:
    """Standard output and error of a command, in the environment of the gate's workers. Raises ValidationError."""
    # Under xdist pytest-benchmark measures nothing, and it knows xdist by these variables.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    known = inherited | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | dict(environment)
    done = subprocess.run(
        command, cwd=folder, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode not in allowed:
        raise ValidationError(f"{' '.join(command[:4])} … ended with status {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def compare(tool: str, points: Mapping[str, Point], slowed: Sequence[str], ratio: float, repeat: int,
            seconds: float, effort: float | None) -> Comparison:  # fmt: skip
    """Let one tool compare base with head in a folder of its own, which is removed."""
    with tempfile.TemporaryDirectory(prefix="gate-validation-") as folder:
        job = Job(points, slowed, ratio, seconds, effort, Path(folder))
        begun = time.monotonic()
        flagged, settings, used = COMPARE[tool](job)
        spent = time.monotonic() - begun
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Comparison(tool, settings, ratio, repeat, list(points), list(slowed), flagged, spent, used, at)


def next_effort(tool: str, done: Sequence[Comparison], seconds: float, cases: int) -> float | None:
    """The effort that would fill `seconds`, from what the last comparison took; None before the first one.

    A comparison takes a fixed time and, for a unit of effort, as much as the tool repeats it.
    """
    earlier = [c for c in done if c.tool == tool and len(c.cases) == cases]
    if not earlier or tool == "gate":
        return None
    times = {"pytest-benchmark": 2 * cases, "asv": 8 * cases, "pyperf": 6 * cases}[tool]
    return max(earlier[-1].effort + (seconds - earlier[-1].seconds) / times, 1e-3)


@dataclass(frozen=True)
class Rates:
    """What one tool did: alarms among comparisons of identical code, and what it found of the slow-downs."""

    tool: str
    settings: str
    minutes: float
    runs: int
    false: int
    slowed: int
    found: int

    def to_dict(self) -> dict[str, Any]:
        """A row of the table, with exact (Clopper-Pearson) 95 % intervals; empty where nothing was measured."""
        row: dict[str, Any] = {
            "tool": self.tool,
            "settings": self.settings,
            "minutes_per_comparison": round(self.minutes, 2),
        }
        for name, hits, count in (("false", self.false, self.runs), ("found", self.found, self.slowed)):
            bounds = stats.binomtest(hits, count).proportion_ci(0.95, method="exact") if count else None
            row |= {
                {"false": "runs_false", "found": "slow_downs_found"}[name]: hits,
                {"false": "runs", "found": "slow_downs"}[name]: count,
                f"{name}_low": round(bounds.low, 4) if bounds else "",
                f"{name}_high": round(bounds.high, 4) if bounds else "",
            }
        return row


def rates(done: Sequence[Comparison]) -> list[Rates]:
    """A line for each tool, in the order of TOOLS."""
    found = []
    for tool in TOOLS:
        own = [c for c in done if c.tool == tool]
        if not own:
            continue
        alike, slowed = [c for c in own if not c.slowed], [c for c in own if c.slowed]
        found.append(
            Rates(
                tool,
                own[-1].settings,
                statistics.median(c.seconds for c in own) / 60,
                len(alike),
                sum(bool(c.flagged) for c in alike),
                sum(len(c.slowed) for c in slowed),
                sum(len(set(c.slowed) & set(c.flagged)) for c in slowed),
            )
        )
    return found


def write(done: Sequence[Comparison], out: Path) -> None:
    """OUT.csv and OUT.md from all comparisons."""
    table = [one.to_dict() for one in rates(done)]
    if not table:
        return
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    shown = [
        {
            "tool": row["tool"],
            "settings": row["settings"],
            "minutes a comparison": row["minutes_per_comparison"],
            "false alarms": _share(row["runs_false"], row["runs"], row["false_low"], row["false_high"]),
            "slow-downs found": _share(row["slow_downs_found"], row["slow_downs"], row["found_low"], row["found_high"]),
        }
        for row in table
    ]
    text = tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def _share(hits: int, count: int, low: float, high: float) -> str:
    return f"{hits} of {count} ({low:.1%} to {high:.1%})" if count else "not measured"


def read(path: Path) -> list[Comparison]:
    """The comparisons of a journal; a last line that was cut off is left out."""
    done = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            done.append(Comparison(**json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValidationError(f"{path}, line {number}, is no comparison: move the file away") from None
    return done


def choose(path: Path, count: int, impls: Sequence[str] = ()) -> dict[str, Point]:
    """`count` points spread evenly over those of a suite that can run, named c00, c01, …"""
    suite = load(path, {})
    cores = available_cores()
    cases = [case if case.threads else case.with_(threads=cores) for case in suite.cases]
    points = [
        Point(impl, case)
        for impl in impls or suite.impls
        for case in cases
        if registry.get(impl).supports(case) is None
    ]
    if not 1 <= count <= len(points):
        raise ValidationError(f"--cases {count}: {path} has {len(points)}")
    return {f"c{i:02d}": points[i * len(points) // count] for i in range(count)}


def plan(done: Sequence[Comparison], tools: Sequence[str], repeats: int, ratio: float) -> list[tuple[int, float, str]]:
    """(repeat, ratio, tool) of the comparisons that are missing, the gate before the others of a repeat."""
    had = {(c.repeat, c.ratio, c.tool) for c in done}
    wanted = []
    for repeat in range(repeats):
        for one in (1.0, ratio):
            others = [tool for tool in TOOLS[1:] if tool in tools]
            random.Random(f"{repeat} {one}").shuffle(others)
            wanted += [(repeat, one, tool) for tool in (["gate"] if "gate" in tools else []) + others]
    return [item for item in wanted if item not in had]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, append, and write the table after each comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/reference/gate/validation"))
    parser.add_argument("--repeats", type=int, default=20, help="comparisons of identical and of slowed code, per tool")
    parser.add_argument("--suite", type=Path, default=ROOT / "suites" / "gate.toml")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--impl", action="append", default=[], help="only this implementation; repeatable")
    parser.add_argument("--slowed", type=int, default=2, help="cases slowed in each comparison of slowed code")
    parser.add_argument("--ratio", type=float, default=1.10, help="how much longer a slowed case takes")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds the gate may take")
    parser.add_argument("--seconds", type=float, help="give the other tools this time instead of the gate's")
    given = parser.parse_args(arguments)
    points = choose(given.suite, given.cases, given.impl)
    if not 0 < given.slowed <= len(points) or given.ratio <= 1:
        parser.error(f"--slowed: 1 to {len(points)}; --ratio: more than 1")
    journal = given.out.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = read(journal)
    failed = 0
    for repeat, ratio, tool in plan(done, given.tool or TOOLS, given.repeats, given.ratio):
        by_the_gate = [c.seconds for c in done if c.tool == "gate" and len(c.cases) == len(points)]
        seconds = given.seconds or (statistics.median(by_the_gate) if by_the_gate else given.budget)
        # The same cases are slowed for every tool.
        slowed = random.Random(repeat).sample(list(points), given.slowed) if ratio > 1 else []
        effort = next_effort(tool, done, seconds, len(points))
        try:
            one = compare(tool, points, slowed, ratio, repeat, given.budget if tool == "gate" else seconds, effort)
        except ValidationError as error:
            failed += 1
            print(f"{tool}, repeat {repeat + 1}: {error}", file=sys.stderr)
            continue
        one = replace(one, seconds=round(one.seconds, 1))
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        done.append(one)
        write(done, given.out)
        words = f"slowed {', '.join(slowed)}" if slowed else "identical code"
        print(
            f"{tool}, repeat {repeat + 1}, {words}: flagged {', '.join(one.flagged) or 'none'} in {one.seconds:.0f} s"
        )
        sys.stdout.flush()
    if given.out.with_suffix(".md").exists():
        print(given.out.with_suffix(".md").read_text(), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
