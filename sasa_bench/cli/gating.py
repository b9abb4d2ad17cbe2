"""Verbs that compare revisions: gate, and aa, which measures the gate itself."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sasa_bench.cli.options import CASE, SLURM, duration, folder, overrides, seconds, stamped
from sasa_bench.cli.progress import progress
from sasa_bench.gate.neighbours import IDLE, NEIGHBOURS
from sasa_bench.gate.relink import BUILT, LAYOUTS, PAIR
from sasa_bench.results.environment import require_free_threads

if TYPE_CHECKING:
    from sasa_bench.gate.arms import Arm
    from sasa_bench.gate.cluster import Plan
    from sasa_bench.gate.decision import Result
    from sasa_bench.gate.pairs import Point
    from sasa_bench.gate.verdicts import Rules
    from sasa_bench.sweep.cluster import Options

SUITE = click.argument("suite", default="gate", type=click.Path(path_type=Path))
IMPLS = click.option(
    "--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="Only this implementation; repeatable."
)
TIMEOUT = click.option(
    "--timeout", "timeout_s", callback=seconds, default=120.0, show_default=True, help="Seconds one request may take."
)


def _points(suite: Path, impls: Sequence[str], pairs: Sequence[str]) -> list[Point]:
    from sasa_bench.gate.points import points

    return points(suite, (), impls, overrides(pairs))


@dataclass(frozen=True)
class Asked:
    """The options of `gate`."""

    base: str
    head: str
    merge_base: bool
    allow_not_run: bool
    memory_growth: float
    suite: Path
    impls: tuple[str, ...]
    pairs: tuple[str, ...]
    budget: str
    timeout_s: float
    slurm: tuple[str, ...]
    out: Path | None
    relink: bool
    base_python: str | None
    head_python: str | None


@click.command()
@click.option("--base", required=True, metavar="REV|DIR", help="The revision or folder to compare with.")
@click.option("--head", required=True, metavar="REV|DIR", help="The revision or folder to check for slow-downs.")
@SUITE
@IMPLS
@CASE
@click.option("--merge-base", is_flag=True, help="Compare with the newest common ancestor of --base and --head.")
@click.option("--allow-not-run", is_flag=True, help="Pass although some cases ran in neither arm.")
@click.option(
    "--memory-growth",
    type=click.FloatRange(0),
    metavar="PERCENT",
    default=1.0,
    show_default=True,
    help="Let the peak of allocated bytes grow by so much.",
)
@click.option(
    "--budget",
    default="10m",
    show_default=True,
    help="Wall time, with --slurm of each task; cases undecided then are INCONCLUSIVE.",
)
@TIMEOUT
@SLURM
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=folder,
    help="Folder for arms and reports; under reports/ by default.",
)
@click.option("--base-python", metavar="EXE", help="Python of the base arm, to gate a library upgrade.")
@click.option("--head-python", metavar="EXE", help="Python of the head arm.")
@click.option(
    "--relink/--no-relink", default=True, show_default=True, help="Link native code in another order for each pair."
)
def gate(**given: Any) -> int:
    """Compare two revisions in one job: exit status 0 pass, 2 regression, 3 inconclusive or contaminated.

    In a repository of kernels of your own, --impl FILE.py compares two revisions of that file under one sasa-bench.
    With --slurm the cases are spread over tasks, never the arms of a pair; Ctrl-C cancels the job.
    """
    from sasa_bench.gate.outputs import text, write_all
    from sasa_bench.gate.sources import untracked

    require_free_threads(os.environ)
    asked = Asked(**given)
    folder = asked.out or stamped("gate-")
    if not folder.exists() or not any(folder.iterdir()):
        untracked(folder)  # else a later gate would take it for a part of head
    with interrupted_by_sigterm():
        result = (_gate_on_slurm if asked.slurm else _gate_here)(asked, folder, duration(asked.budget))
    write_all(result, folder)
    click.echo(text(result), nl=False)
    click.echo(f"{folder}/gate.html, .md, .xml, .json")
    return result.exit_status


def _rules(asked: Asked) -> Rules:
    from sasa_bench.gate.verdicts import Rules

    return Rules(allow_not_run=asked.allow_not_run, memory=asked.memory_growth / 100)


def _prepared(asked: Asked, folder: Path) -> tuple[list[Arm], list[Point]]:
    from sasa_bench.gate.arms import set_up
    from sasa_bench.gate.points import points
    from sasa_bench.gate.sources import merge_base, sources

    base = merge_base(asked.base, asked.head) if asked.merge_base else asked.base
    both = sources(base, asked.head)
    found = points(asked.suite, both, asked.impls, overrides(asked.pairs), elsewhere=bool(asked.slurm))
    impls = list(dict.fromkeys(point.impl for point in found))
    return set_up(base, asked.head, folder, asked.base_python, asked.head_python, impls), found


def _gate_here(asked: Asked, folder: Path, budget_s: float) -> Result:
    from sasa_bench.gate.outputs import write_all
    from sasa_bench.gate.profiles import profile, to_profile
    from sasa_bench.gate.run import Gate
    from sasa_bench.gate.sources import untracked

    arms, points = _prepared(asked, folder)
    rules = _rules(asked)
    journal = folder / "journal.jsonl"
    layout = PAIR if asked.relink else BUILT
    with phases() as say:
        result = Gate(arms, points, rules, budget_s, asked.timeout_s, say, journal, layout=layout).run()
        by_key = {point.key: point for point in points}
        if looked_at := [by_key[key] for key in to_profile(result.cases)]:
            write_all(result, folder)  # the verdict stands whatever becomes of the profiles
            try:
                result.profiles = profile(arms, looked_at, untracked(folder / "profiles"), asked.timeout_s, say)
            except KeyboardInterrupt:
                click.echo("stopped: the verdict is complete, profiles are missing", err=True)
    return result


@contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """Shows the phase of a gate and the pairs done: a bar on a terminal, else a line now and then."""
    with progress() as bar:
        yield lambda phase, done, total: bar.show(done, total, phase)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which CI ends a job, ends the block as Ctrl-C does: processes and layouts are cleared away."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _gate_on_slurm(asked: Asked, folder: Path, budget_s: float) -> Result:
    from sasa_bench.gate.cluster import prepare, require_room
    from sasa_bench.sweep.cluster import parse_options, require_slurm

    options = parse_options(asked.slurm)
    folder = folder.absolute()
    require_room(folder, options, budget_s)
    require_slurm()
    arms, points = _prepared(asked, folder)
    rules = _rules(asked)
    layout = PAIR if asked.relink else BUILT
    return _watch_tasks(prepare(folder, arms, points, rules, options, budget_s, asked.timeout_s, layout), options)


def _watch_tasks(plan: Plan, options: Options) -> Result:
    from sasa_bench.gate.cluster import run

    total = sum(map(len, plan.shards))
    click.echo(f"{total} cases in {len(plan.shards)} tasks, job {plan.name}, files in {plan.folder}", err=True)
    try:
        with progress() as shown:
            result = run(plan, options, lambda now: shown.show(total - now.missing, total, now.queue))
            shown.show(total - sum(plan.missing().values()), total, "")
    except KeyboardInterrupt:
        click.echo(f"stopped: job {plan.name} was cancelled", err=True)
        raise
    return result


@dataclass(frozen=True)
class AskedOfAA:
    """The options of `aa`."""

    suite: Path
    runs: int
    record: bool
    replay: bool
    ratio: float
    inject_cases: int
    journal: Path | None
    beside: str
    relink: str
    impls: tuple[str, ...]
    pairs: tuple[str, ...]
    budget: str
    timeout_s: float


@click.command()
@SUITE
@click.option("--runs", type=click.IntRange(0), default=0, help="Live gate runs on identical code.")
@click.option("--record", is_flag=True, help="Record all fresh pairs of every case without a decision, for --replay.")
@click.option("--replay", is_flag=True, help="Decide recorded runs again, slowing one case at a time.")
@click.option("--inject", "ratio", default=1.0, help="Slow cases of head on purpose: 1.05 makes them take 5 % more.")
@click.option(
    "--inject-cases", type=click.IntRange(1), default=1, show_default=True, help="How many random cases each run slows."
)
@click.option("--journal", type=click.Path(path_type=Path), help="Where pairs are kept; under reports/ by default.")
@click.option(
    "--beside",
    default=IDLE,
    show_default=True,
    type=click.Choice([IDLE, *NEIGHBOURS]),
    help="Load one core beside the live runs: always, in bursts, or by copying memory.",
)
@click.option(
    "--relink",
    default=PAIR,
    show_default=True,
    type=click.Choice(LAYOUTS),
    help="Native code: as built; linked once per run, head in another order; or linked again for each pair.",
)
@IMPLS
@CASE
@click.option("--budget", default="10m", show_default=True, help="Wall time of one run.")
@TIMEOUT
def aa(**given: Any) -> None:
    """Measure the gate itself on this machine: false alarms on identical code, power on slow-downs made on purpose."""
    from sasa_bench.gate.aa import whole_pairs
    from sasa_bench.gate.aa_page import write_page
    from sasa_bench.gate.verdicts import Rules

    require_free_threads(os.environ)
    asked = AskedOfAA(**given)
    if asked.runs < 1 and not asked.replay:
        raise click.UsageError(
            "nothing to do: give --runs N for live runs, --replay for the recorded ones of a journal"
        )
    if asked.replay and not asked.runs and asked.journal is None:
        raise click.UsageError("--replay needs --journal FILE with recorded runs; --runs 1 --record makes one")
    if not 1 <= asked.ratio < math.inf:
        raise click.UsageError(f"--inject {asked.ratio}: give a ratio of 1 or more, such as 1.05")
    if asked.record and asked.ratio > 1:
        raise click.UsageError("--record runs identical code: drop --inject; --replay slows each case")
    points = _points(asked.suite, asked.impls, asked.pairs)
    if not 1 <= asked.inject_cases <= len(points):
        raise click.UsageError(f"--inject-cases {asked.inject_cases}: give a number from 1 to {len(points)}")
    path = asked.journal or stamped("aa-", ".jsonl")
    if path.exists():
        whole_pairs(path)
    if asked.runs:
        _live(asked, points, path)
    click.echo(f"journal: {path}, its tables: {write_page(path, Rules(), asked.replay)}")


def _live(asked: AskedOfAA, points: Sequence[Point], path: Path) -> None:
    from sasa_bench.gate.aa import Rates, live
    from sasa_bench.gate.verdicts import Rules

    with interrupted_by_sigterm(), phases() as show:
        done = live(
            points,
            asked.runs,
            Rules(),
            duration(asked.budget),
            asked.timeout_s,
            path.with_suffix(".arms"),
            path,
            asked.ratio,
            asked.inject_cases,
            asked.beside,
            asked.relink,
            asked.record,
            lambda line: click.echo(line),
            show,
        )
    for line in Rates.of(done).lines() if done else ():
        click.echo(line)
