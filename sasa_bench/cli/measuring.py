"""Verbs that measure and what leads up to it: run, list, new."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sasa_bench.cli.options import (
    CASE,
    DEVICE,
    ERROR,
    REGRESSION,
    SLURM,
    SUITES,
    load_suites,
    overrides,
    part,
    require_cuda,
    seconds,
    stamped,
    warn,
)
from sasa_bench.cli.progress import Shown, progress

if TYPE_CHECKING:
    from sasa_bench.results.record import Record
    from sasa_bench.suite import Suite
    from sasa_bench.sweep.run import Summary

MOST_FAILURES = 3
"""Rows that are wrong or failed whose reasons are printed without --strict."""

ENERGY_S = 2.0
"""Seconds of calls whose energy is read with --energy."""


@dataclass(frozen=True)
class Asked:
    """The options of `run`."""

    suites: tuple[Path, ...]
    device: str | None
    impls: tuple[str, ...]
    pairs: tuple[str, ...]
    out: Path | None
    resume: bool
    budget_s: float
    timeout_s: float
    shard: tuple[int, int] | None
    slurm: tuple[str, ...]
    energy: bool
    strict: bool
    keep_models: Path | None


@click.command()
@SUITES
@DEVICE
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="Only this implementation; repeatable.")
@CASE
@click.option("--out", type=click.Path(path_type=Path), help="Results file; under reports/ by default.")
@click.option("--resume", is_flag=True, help="Continue the file of --out; complete cases in it are not measured again.")
@click.option(
    "--budget", "budget_s", callback=seconds, default=0.6, show_default=True, help="Seconds of samples for each row."
)
@click.option(
    "--timeout",
    "timeout_s",
    callback=seconds,
    default=120.0,
    show_default=True,
    help="Seconds a stage of a row may take; building, at least 900.",
)
@click.option(
    "--shard", callback=part, metavar="I/N", help="Measure part I of N, split by cost; `merge` joins the parts."
)
@SLURM
@click.option("--energy", is_flag=True, help="On CUDA, also read the joules of a call; two seconds more for each row.")
@click.option("--strict", is_flag=True, help="Exit with status 2 if a row is wrong or failed, for CI.")
@click.option("--keep-models", type=click.Path(file_okay=False, path_type=Path), help="Keep exported models here.")
def run(**given: Any) -> int:
    """Measure suites: one row for each case and implementation, appended to a results file as it is made."""
    asked = Asked(**given)
    if asked.resume and asked.out is None:
        raise click.UsageError("--resume needs --out FILE, the results file to finish")
    if asked.slurm and asked.shard:
        raise click.UsageError("--slurm splits suites itself: drop --shard")
    if asked.slurm and asked.keep_models:
        raise click.UsageError("--keep-models keeps files of this machine: drop it, or --slurm")
    suites = load_suites(asked.suites, asked.pairs, asked.device)
    on_gpu = any(case.device == "cuda" for suite in suites for case in suite.cases)
    if asked.energy and (asked.slurm or not on_gpu):
        raise click.UsageError("--energy reads a counter of the local GPU: give --device cuda, without --slurm")
    shard = "-{}of{}".format(*asked.shard) if asked.shard else ""
    path = asked.out or stamped(f"{suites[0].name}-", f"{shard}.jsonl")
    if asked.slurm:
        return _run_on_slurm(asked, suites, path)
    if on_gpu:
        require_cuda()
    return _run_here(asked, suites, path, on_gpu)


def _run_here(asked: Asked, suites: Sequence[Suite], path: Path, on_gpu: bool) -> int:
    from sasa_bench.results.environment import KEEP_MODELS
    from sasa_bench.results.statistics import NOISY
    from sasa_bench.sweep.plan import open_results
    from sasa_bench.sweep.run import run as measure
    from sasa_bench.timing import nvml, probe
    from sasa_bench.timing.settings import Settings

    machine = probe.detect()
    known = open_results(path, asked.resume, machine)
    warn(known.warnings if known else ())
    if asked.resume and known is None:
        state = "is empty" if path.exists() else "does not exist yet"
        warn([f"{path} {state}: the run starts from the beginning"])
    elif known and (others := {row.suite for row in known.rows} - {suite.name for suite in suites}):
        warn([f"{path} also holds suites that this command does not name and leaves as they are: {', '.join(others)}"])
    if on_gpu and (reason := nvml.absent()):
        warn([f"clocks and power are not recorded, and throttled samples are kept: {reason}"])
    started = time.monotonic()
    seen: list[Summary] = []
    with progress() as shown:
        show = watching(shown)

        def watch(summary: Summary, rows: Sequence[Record]) -> None:
            seen[:] = [summary]
            show(summary, rows)

        try:
            summary = measure(
                suites,
                asked.impls,
                path,
                known=known,
                machine=machine,
                part=asked.shard or (1, 1),
                settings=Settings(budget_s=asked.budget_s, energy_s=ENERGY_S if asked.energy else 0.0),
                timeout_s=asked.timeout_s,
                environment={KEEP_MODELS: str(asked.keep_models.resolve())} if asked.keep_models else {},
                watch=watch,
            )
        except KeyboardInterrupt:
            if not seen:
                raise
            shown.stop()
            return _stopped(asked, path, seen[0])
    said = ", ".join(f"{count} {status}" for status, count in summary.counts.items()) or "nothing left to measure"
    if summary.had:
        said += f"; {summary.had} measured before"
    click.echo(f"{path}: {summary.total} row{'s' * (summary.total != 1)} ({said})")
    if summary.beside:
        cases = "1 case has" if summary.beside == 1 else f"{summary.beside} cases have"
        warn([f"{cases} rows of other implementations that were measured earlier: ratios to them are not interleaved"])
    if summary.noisy:
        rows = "1 row is" if summary.noisy == 1 else f"{summary.noisy} rows are"
        noise = f"{rows} too noisy to rank, p80 above {NOISY:g} x p20"
        warn([f"{noise}: `sasa-bench doctor --check` looks for what disturbs them"])
    elapsed = time.monotonic() - started
    shares = ", ".join(f"{stage} {spent / elapsed:.0%}" for stage, spent in summary.spent_s.most_common())
    click.echo(f"{timedelta(seconds=round(elapsed))} in all: {shares}")
    failed = summary.counts.keys() - {"ok", "skipped"}
    return _tell_failures(path, asked.strict) if asked.strict or failed else 0


def _tell_failures(path: Path, strict: bool) -> int:
    """A line for each row that is wrong or failed, or for the first ones; the exit status, which --strict changes."""
    from sasa_bench.results.file import read

    bad = [row for row in read([path]).rows if row.status not in ("ok", "skipped")]
    shown = bad if strict else bad[:MOST_FAILURES]
    warn([f"{row.suite}, {row.impl}, {row.case.describe()}: {row.status}: {row.reason}" for row in shown])
    if len(bad) > len(shown):
        warn([f"{len(bad) - len(shown)} more are wrong or failed: `sasa-bench table {path}` has the reasons"])
    return REGRESSION if bad and strict else 0


def watching(shown: Shown) -> Callable[[Summary, Sequence[Record]], None]:
    """What shows how far a run is: pass it to sweep.run as `watch`."""

    def watch(summary: Summary, rows: Sequence[Record]) -> None:
        suite, case = (rows[0].suite, rows[0].case.describe()) if rows else (summary.phase, summary.detail)
        shown.show(summary.done, summary.total, suite, case)

    return watch


def _stopped(asked: Asked, path: Path, summary: Summary) -> int:
    cut = f", {summary.phase}: --resume measures the cases that it had not reached" if summary.phase else ""
    click.echo(f"stopped: {summary.done} of {summary.total} rows are in {path}{cut}", err=True)
    command = shlex.join(["sasa-bench", "run", *map(str, asked.suites), "--out", str(path), "--resume"])
    click.echo(f"resume with: {command} (and the same options)", err=True)
    return ERROR


def _run_on_slurm(asked: Asked, suites: Sequence[Suite], out: Path) -> int:
    from sasa_bench.sweep.cluster import drive, parse_options, require_slurm
    from sasa_bench.sweep.plan import specs_of
    from sasa_bench.sweep.run import describe
    from sasa_bench.sweep.slurm import Measure, open_sweep
    from sasa_bench.sweep.workers import Workers

    options = parse_options(asked.slurm)
    require_slurm()
    impls = tuple(dict.fromkeys(asked.impls))
    with Workers(asked.timeout_s) as workers:
        infos = describe(workers, specs_of(suites, impls))
    sweep = open_sweep(out, asked.resume, suites, impls, infos, options, asked.budget_s, asked.timeout_s)
    total = sum(sweep.size(index) for index in range(len(sweep.shards)))
    click.echo(f"{total} rows in {len(sweep.shards)} tasks, job {sweep.name}, files in {sweep.folder}", err=True)
    try:
        with progress() as shown:
            lost = drive(
                sweep.folder,
                sweep.name,
                Measure(sweep.folder),
                sweep.missing,
                options,
                lambda now: shown.show(total - now.missing, total, now.queue),
            )
            shown.show(total - sum(sweep.missing().values()), total, "")
    except KeyboardInterrupt:
        click.echo("stopped watching: the tasks go on; `scancel --name " + sweep.name + "` ends them", err=True)
        click.echo(f"resume with: the same command, with --out {out} --resume", err=True)
        return ERROR
    _write_merged(sweep, out, total, lost)
    return _tell_failures(out, asked.strict)


def _write_merged(sweep: Any, out: Path, total: int, lost: Sequence[int]) -> None:
    """Join the rows of all tasks in `out`. Raises SlurmError where some are missing; `lost` are the tasks given up."""
    from sasa_bench.cli.reading import warn_of_revisions
    from sasa_bench.results.merge import write
    from sasa_bench.sweep.cluster import SlurmError, last_words

    merged = sweep.merged()
    warn(merged.results.warnings)
    warn_of_revisions(merged.results)
    write(merged.results, out)
    click.echo(f"{out}: {len(merged.results.rows)} of {total} rows from {len(sweep.shards)} tasks")
    if missing := sum(sweep.missing().values()):
        ended = "task {} ended repeatedly without a new row; {}"
        warn([ended.format(index, last_words(sweep.folder, index)) for index in lost])
        raise SlurmError(
            f"{missing} rows are missing: fix the cause, then repeat the command with --out {out} --resume"
        )


@click.command(name="list")
@click.argument("suites", nargs=-1, type=click.Path(path_type=Path))
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="Only this implementation; repeatable.")
@CASE
@click.option("--markdown", is_flag=True, help="As the tables of the documentation: suites, axes, implementations.")
def list_(suites: tuple[Path, ...], impls: tuple[str, ...], pairs: tuple[str, ...], markdown: bool) -> None:
    """Show suites and the rows each will give, axes, implementations and whether they run here."""
    from sasa_bench.suite import load, shipped

    chosen = [load(path, overrides(pairs)) for path in suites or shipped().values()]
    if markdown:
        from sasa_bench.cli import listing

        click.echo("\n\n".join((listing.suites(chosen), listing.axes(), listing.implementations(impls))))
        return
    for suite in chosen:
        names = impls or suite.impls
        swept = ", ".join(suite.axes) or "nothing"
        rows = len(suite.cases) * len(names)
        click.echo(f"{suite.name}: {suite.title}")
        click.echo(f"  {len(suite.cases)} cases × {len(names)} implementations = {rows} rows; sweeps {swept}")
        click.echo(f"  {', '.join(names)}")
    _list_axes_and_implementations(impls)


def _list_axes_and_implementations(impls: Sequence[str]) -> None:
    from sasa_bench.case import AXES, CHOICES, Case
    from sasa_bench.cli.doctor import implementations

    click.echo("\naxes (FIELD of -c) and their defaults")
    for axis in AXES:
        allowed = f"   one of {', '.join(CHOICES[axis])}" if axis in CHOICES else ""
        click.echo(f"  {axis:17} {getattr(Case(), axis)}{allowed}")
    click.echo("\nimplementations")
    for info, missing in implementations(impls):
        state = f"   not on this machine: {missing}" if missing and missing != info.summary else ""
        click.echo(f"  {info.label:17} {info.summary}{state}")


@click.command()
@click.argument("path", metavar="FILE.py", type=click.Path(path_type=Path))
def new(path: Path) -> None:
    """Write a commented file to start a kernel of your own from; it runs as it is."""
    from sasa_bench.cli.starter import write

    write(path)
    out = path.with_suffix(".jsonl").name
    click.echo(f"{path}: measure it with")
    click.echo(f"  sasa-bench run smoke --impl {shlex.quote(str(path))} --impl unfold --out {shlex.quote(out)}")
    click.echo(f"  sasa-bench table {shlex.quote(out)}")
