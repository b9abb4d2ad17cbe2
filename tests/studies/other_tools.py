"""How one tool compares base with head: the gate, pytest-benchmark, benchmatrix, asv continuous and pyperf."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_bench.gate import run as gate
from sasa_bench.gate.arms import set_up
from sasa_bench.gate.pairs import ENVIRONMENT, Counts, Point
from sasa_bench.gate.relink import PAIR
from sasa_bench.gate.sources import PACKAGE
from sasa_bench.gate.verdicts import PASS, REGRESSION, Rules

ROOT = Path(__file__).parents[2]
THRESHOLD = 5
"""Per cent that the other tools let pass: half of the slow-down that they have to find."""


@dataclass(frozen=True)
class Job:
    """What a tool is asked: names of cases -> points, those slowed in head, the time to fill, a folder of its own."""

    points: Mapping[str, Point]
    slowed: Sequence[str]
    ratio: float
    seconds: float
    effort: float | None
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a tool found: the cases it calls slower, and whether a CI job with it would have failed.

    settings   in words
    effort     what is scaled to fill the time, in the unit of the tool
    repeated   how often a comparison spends a unit of effort
    """

    flagged: list[str]
    red: bool
    settings: str
    effort: float = 1.0
    repeated: int = 0


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


def longer(call, share):
    def slowed():
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        end = now + share * (now - start)
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
BENCHMATRIX = """
from pathlib import Path

from benchmatrix import BenchmarkCase, make_benchmark_test
from steps import CASES, step

ARM = Path.cwd()
cases = [BenchmarkCase(name, make_args=lambda name=name: (step(name, ARM),)) for name in CASES]
test_step = make_benchmark_test({"step": lambda call: call()}, cases, metrics=["single_call_latency"])
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


def by_gate(job: Job) -> Outcome:
    """This package in every arm; what is slowed waits for a share of its calibrated time, in every call."""
    source = job.folder / "source"
    shutil.copytree(ROOT / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    arms = set_up(str(ROOT), str(source), job.folder / "gate")
    keys = [job.points[name].key for name in job.slowed]

    def spin(counts: Counts) -> dict[str, float]:
        return {key: (job.ratio - 1) * counts.seconds[key] for key in keys if key in counts.seconds}

    rules = Rules()
    points = list(job.points.values())
    result = gate.Gate(arms, points, rules, job.seconds, 120.0, spin=spin, layout=PAIR, time_unchanged=True).run()
    # A contaminated run flags nothing.
    flagged = {case.key for case in result.cases if case.verdict == REGRESSION and not result.contaminated}
    settings = f"{rules.screen_pairs} + {rules.confirm_pairs} pairs, margin {rules.margin:.1%}, level {rules.alpha:.0%}"
    return Outcome(
        [name for name, point in job.points.items() if point.key in flagged], result.verdict != PASS, settings
    )


def by_pytest_benchmark(job: Job) -> Outcome:
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
    flagged = regressed(said)
    settings = f"--benchmark-compare-fail={fail}, max time {effort:.2g} s"
    return Outcome(flagged, bool(flagged), settings, effort, 2 * len(job.points))


def regressed(said: str) -> list[str]:
    """The names that pytest-benchmark says have regressed. Raises ValidationError where it compared nothing."""
    found = re.findall(r"test_step\[(\w+)\].* - Field '\w+' has failed", said)
    if not found and not re.search(r"\b\d+ passed", said):
        raise ValidationError(f"pytest-benchmark compared nothing: {said[-2000:]}")
    if bool(found) != ("Performance has regressed" in said):
        raise ValidationError(f"cannot tell what pytest-benchmark found: {said[-2000:]}")
    return sorted(set(found))


def by_benchmatrix(job: Job) -> Outcome:
    """`benchmatrix collect-paired`, a fresh process an arm, base or head first; effort: --benchmark-max-time."""
    pairs = planned_pairs(len(job.points))
    effort = max(0.05, job.effort or (job.seconds / 2 / pairs - 4) / len(job.points))
    arms = _write(job, "steps_only.py", "")
    for folder in arms.values():
        (folder / "bench_steps.py").write_text(BENCHMATRIX)
        (folder / "pytest.ini").write_text("[pytest]\n")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only"),
        *("bench_steps.py", f"--benchmark-max-time={effort:.3f}", "--benchmark-min-rounds=5"),
    ]
    tool = [sys.executable, "-m", "benchmatrix"]
    collect = ["collect-paired", "--output=pairs", f"--baseline-cwd={arms['base']}", f"--candidate-cwd={arms['head']}"]
    known = {"PYTHONPATH": os.pathsep.join([str(job.folder), str(ROOT)])}
    _call([*tool, *collect, "--", *command, ":::", *command], job.folder, known)
    compare = ["compare", "pairs", "--paired", "--no-config", f"--threshold={THRESHOLD}%", "--format=json"]
    said = _call([*tool, *compare], job.folder, known)
    words = f"collect-paired, {pairs} pairs, compare --threshold={THRESHOLD}%, max time {effort:.2g} s"
    # --fail-on-regression fails what is inconclusive too.
    return Outcome(
        paired(said, list(job.points)), not json.loads(said)["passed"], words, effort, 2 * pairs * len(job.points)
    )


def planned_pairs(cases: int) -> int:
    """How many pairs benchmatrix takes: five or more, every order of the cases as often as every other."""
    cycle = 2 if cases == 1 else 2 * cases * (1 if cases % 2 == 0 else 2)
    return cycle * -(-5 // cycle)


def paired(said: str, names: Sequence[str]) -> list[str]:
    """The names that benchmatrix says have regressed. Raises ValidationError where it did not compare a case."""
    try:
        cells = {cell["case_name"]: cell["regression"] for cell in json.loads(said)["comparisons"]}
    except (ValueError, KeyError):
        raise ValidationError(f"benchmatrix compared nothing: {said[-2000:]}") from None
    missing = [name for name in names if cells.get(name, "not_comparable") == "not_comparable"]
    if missing:
        raise ValidationError(f"benchmatrix compared nothing for {', '.join(missing)}: {said[-2000:]}")
    return sorted(name for name in names if cells[name] == "regressed")


def by_asv(job: Job) -> Outcome:
    """`asv continuous`, two rounds interleaved over two commits; effort: seconds of samples a case, round and arm."""
    rounds = 2
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
    flagged = worsened(said, list(job.points))
    return Outcome(flagged, bool(flagged), words, effort, 2 * rounds * len(job.points))


def worsened(said: str, names: Sequence[str]) -> list[str]:
    """The names marked + in the table of asv. Raises ValidationError where the table misses a case."""
    marks = {name: mark for mark, name in re.findall(r"^\|\s*(\S?)\s*\|.*time_step\('(\w+)'\)", said, re.MULTILINE)}
    missing = [name for name in names if name not in marks]
    if missing:
        raise ValidationError(f"asv compared nothing for {', '.join(missing)}: {said[-2000:]}")
    return sorted(name for name in names if marks[name] == "+")


def by_pyperf(job: Job) -> Outcome:
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
    compare = ["compare_to", f"--min-speed={THRESHOLD}", "base.json", "head.json"]
    said = _call([sys.executable, "-m", "pyperf", *compare], job.folder, {})
    length = effort / (values + 1)
    words = f"compare_to --min-speed={THRESHOLD}, {processes} processes of {values} values of {length:.2g} s"
    flagged = slower(said, list(job.points))
    # One process more calibrates.
    return Outcome(flagged, bool(flagged), words, effort, 2 * (processes + 1) * len(job.points))


def slower(said: str, names: Sequence[str]) -> list[str]:
    """The names that pyperf calls slower. Raises ValidationError where it names a case in no way."""
    found = re.findall(r"^(?:Mean \+- std dev|(\w+)): .*: [\d.]+x slower", said, re.MULTILINE)
    unknown = [name for name in names if not re.search(rf"\b{name}\b", said)] if len(names) > 1 else []
    if unknown:
        raise ValidationError(f"pyperf compared nothing for {', '.join(unknown)}: {said[-2000:]}")
    return sorted(name or names[0] for name in found)


COMPARE: dict[str, Callable[[Job], Outcome]] = {
    "gate": by_gate,
    "pytest-benchmark": by_pytest_benchmark,
    "benchmatrix": by_benchmatrix,
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
