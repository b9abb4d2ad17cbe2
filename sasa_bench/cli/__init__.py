"""The verbs of the command line. Exit status: 0 fine, 1 usage or tool error, 2 regression, 3 inconclusive."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sasa_bench.case import CHOICES, UserError, parse_value
from sasa_bench.gate.neighbours import IDLE, NEIGHBOURS
from sasa_bench.results.file import read
from sasa_bench.results.record import DIFFERS, Results
from sasa_bench.suite import Suite, load

if TYPE_CHECKING:
    from sasa_bench.gate.cluster import Plan
    from sasa_bench.gate.run import Result
    from sasa_bench.sweep.slurm import Options

ERROR, REGRESSION, INCONCLUSIVE = 1, 2, 3
ENERGY_S = 2.0
"""Seconds of calls whose energy is read with --energy."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sasa-bench")
def cli() -> None:
    """What does local self-attention cost next to a convolution, and which implementation should I use?"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error that a user can cause is one line and exit status 1."""
    from sasa_bench.timing.process import WorkerDied

    try:
        sys.exit(cli.main(None if arguments is None else list(arguments), standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.UsageError as error:
        _fail(error.format_message() + (f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""))
    except click.ClickException as error:
        _fail(error.format_message())
    except (UserError, WorkerDied) as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted")
    except BrokenPipeError:
        sys.exit(ERROR)


def _fail(message: str) -> None:
    click.echo(f"sasa-bench: {message}", err=True)
    sys.exit(ERROR)


def _overrides(pairs: Sequence[str], device: str | None = None) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"device": [device]} if device else {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        if not equals or not values:
            raise click.UsageError(f"-c {pair}: give FIELD=VALUE, or FIELD=VALUE,VALUE to sweep")
        found[name] = [parse_value(name, value) for value in values.split(",")]
    return found


def _shard(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.UsageError(f"--shard {text}: give I/N, part I of N, such as 1/4 to 4/4")
    return int(number), int(count)


@cli.command()
@click.argument("path", metavar="FILE.py", type=click.Path(path_type=Path))
def new(path: Path) -> None:
    """Write a commented file to start a kernel of your own from; it runs as it is."""
    from sasa_bench.cli.starter import write

    write(path)
    out = path.with_suffix(".jsonl").name
    click.echo(f"{path}: measure it with")
    click.echo(f"  sasa-bench run suites/smoke.toml --impl {path} --impl unfold --out {out}")
    click.echo(f"  sasa-bench table {out}")


SUITES = click.argument("suites", nargs=-1, required=True, type=click.Path(path_type=Path))
CASE = click.option("-c", "pairs", multiple=True, metavar="FIELD=VALUE[,VALUE]", help="Hold or sweep an axis.")
FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))


@cli.command()
@SUITES
@click.option("--device", type=click.Choice(CHOICES["device"]), help="Where to run; the suite's own by default.")
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="Measure this one instead; repeatable.")
@CASE
@click.option("--out", type=click.Path(path_type=Path), help="Results file; under reports/ by default.")
@click.option("--resume", is_flag=True, help="Finish the file that --out names; rows it has are not measured again.")
@click.option("--budget", "budget_s", default=0.6, show_default=True, help="Seconds of samples for each row.")
@click.option("--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds a stage of a row may take.")
@click.option(
    "--shard", callback=_shard, metavar="I/N", help="Measure part I of N, cut by cost; `merge` joins the parts."
)
@click.option(
    "--slurm",
    is_flag=True,
    help="Run as an array job on Slurm; words such as partition=gpu gres=gpu:1 time=2:00:00 array=100%8 go to sbatch.",
)
@click.option("--energy", is_flag=True, help="On CUDA, also read the joules of a call; two seconds more for each row.")
@click.option("--keep-models", type=click.Path(file_okay=False, path_type=Path), help="Keep exported models here.")
def run(
    suites: tuple[Path, ...],
    device: str | None,
    impls: tuple[str, ...],
    pairs: tuple[str, ...],
    out: Path | None,
    resume: bool,
    budget_s: float,
    timeout_s: float,
    shard: tuple[int, int] | None,
    slurm: bool,
    energy: bool,
    keep_models: Path | None,
) -> int:
    """Measure suites: one row for each case and implementation, appended to a results file as it is made."""
    from sasa_bench.results.environment import KEEP_MODELS
    from sasa_bench.results.file import Writer
    from sasa_bench.sweep.run import Workers, describe, execute, open_results, plan
    from sasa_bench.sweep.shard import cut
    from sasa_bench.timing import nvml, probe
    from sasa_bench.timing.settings import Settings

    if budget_s <= 0 or timeout_s <= 0:
        raise click.UsageError("--budget and --timeout are seconds, more than 0")
    if resume and out is None:
        raise click.UsageError("--resume needs --out FILE, the results file to finish")
    wishes = _wishes(suites) if slurm else []
    suites = tuple(path for path in suites if str(path) not in wishes)
    loaded = [load(path, _overrides(pairs, device)) for path in suites]
    _distinct(loaded)
    on_gpu = any(case.device == "cuda" for suite in loaded for case in suite.cases)
    if energy and (slurm or not on_gpu):
        raise click.UsageError("--energy reads a counter of the GPU at hand: give --device cuda, without --slurm")
    if on_gpu and not slurm:
        _require_cuda()
    part = "-{}of{}".format(*shard) if shard else ""
    path = out or Path("reports") / f"{loaded[0].name}-{datetime.now():%Y%m%d-%H%M%S}{part}.jsonl"
    if slurm:
        if shard or not loaded:
            raise click.UsageError("--slurm cuts whole suites itself: name a suite, and leave --shard out")
        return _run_on_slurm(loaded, impls, wishes, path, resume, budget_s, timeout_s)
    machine = probe.detect()
    known = open_results(path, resume, machine)
    for warning in known.warnings if known else ():
        click.echo(f"sasa-bench: {warning}", err=True)
    if on_gpu and (reason := nvml.absent()):
        _say("", [f"clocks and power are not recorded, and throttled samples stay in: {reason}"])
    specs = list(impls) or list(dict.fromkeys(impl for suite in loaded for impl in suite.impls))
    counts: dict[str, int] = {}
    started = time.monotonic()
    settings = Settings(budget_s=budget_s, energy_s=ENERGY_S if energy else 0.0)
    environment = {KEEP_MODELS: str(keep_models.resolve())} if keep_models else {}
    with Workers(timeout_s, environment) as workers:
        infos = describe(workers, specs)
        if shard:
            loaded = list(cut(loaded, shard[1], impls, infos)[shard[0] - 1])
        work = plan(loaded, impls, infos, known)
        total = work.done + work.rows
        try:
            with Writer(path) as writer, _progress() as bar:
                task = bar.add_task("", total=total, completed=work.done)
                for rows in execute(work, workers, writer, machine, known, settings):
                    for row in rows:
                        counts[row.status] = counts.get(row.status, 0) + 1
                    last = rows[0]
                    bar.update(task, advance=len(rows), description=f"{last.suite} {last.case.describe()}"[:60])
        except KeyboardInterrupt:
            done = work.done + sum(counts.values())
            words = " ".join(str(suite) for suite in suites)
            click.echo(f"stopped: {done} of {total} rows are in {path}", err=True)
            click.echo(f"go on with: sasa-bench run {words} --out {path} --resume (and the same options)", err=True)
            return ERROR
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing left to measure"
    click.echo(f"{path}: {total} rows ({said})")
    elapsed = time.monotonic() - started
    shares = ", ".join(f"{stage} {spent / elapsed:.0%}" for stage, spent in workers.spent_s.most_common())
    click.echo(f"{timedelta(seconds=round(elapsed))} in all: {shares}")
    return 0


def _wishes(words: Sequence[str | Path]) -> list[str]:
    """The words that are meant for sbatch, such as time=30, and are no files."""
    return [str(word) for word in words if "=" in str(word) and not Path(word).exists()]


def _run_on_slurm(
    suites: Sequence[Suite],
    impls: Sequence[str],
    words: Sequence[str],
    out: Path,
    resume: bool,
    budget_s: float,
    timeout_s: float,
) -> int:
    from sasa_bench.results.merge import write
    from sasa_bench.sweep.run import Workers, describe
    from sasa_bench.sweep.slurm import Measure, SlurmError, drive, last_words, open_sweep, parse_options, require_slurm

    options = parse_options(words)
    require_slurm()
    specs = list(impls) or list(dict.fromkeys(impl for suite in suites for impl in suite.impls))
    with Workers(timeout_s) as workers:
        infos = describe(workers, specs)
    sweep = open_sweep(out, resume, suites, impls, infos, options, budget_s, timeout_s)
    total = sum(sweep.size(index) for index in range(len(sweep.shards)))
    click.echo(f"{total} rows in {len(sweep.shards)} tasks, job {sweep.name}, files in {sweep.folder}", err=True)
    try:
        with _progress() as bar:
            task = bar.add_task("", total=total)
            lost = drive(
                sweep.folder,
                sweep.name,
                Measure(sweep.folder),
                sweep.missing,
                options,
                lambda now: bar.update(task, completed=total - now.missing, description=now.queue),
            )
            bar.update(task, completed=total - sum(sweep.missing().values()), description="")
    except KeyboardInterrupt:
        click.echo("stopped watching: the tasks go on; `scancel --name " + sweep.name + "` ends them", err=True)
        click.echo(f"go on with: the same command, with --out {out} --resume", err=True)
        return ERROR
    merged = sweep.merged()
    _say("", merged.results.warnings)
    _say_revisions(merged.results)
    write(merged.results, out)
    missing = sum(sweep.missing().values())
    click.echo(f"{out}: {len(merged.results.rows)} of {total} rows from {len(sweep.shards)} tasks")
    if missing:
        _say(
            "",
            [
                f"task {index} ended again and again without a new row; {last_words(sweep.folder, index)}"
                for index in lost
            ],
        )
        raise SlurmError(
            f"{missing} rows are missing: see to the cause, then repeat the command with --out {out} --resume"
        )
    return 0


def _distinct(suites: Sequence[Suite]) -> None:
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two suites are called {name!r}: give each file a name of its own")


def _require_cuda() -> None:
    from sasa_bench.impls._nvrtc import no_device

    if reason := no_device():
        raise click.UsageError(f"--device cuda: {reason.rstrip('.')}, or use --device cpu")


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )


@cli.command()
@FILES
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The merged results file.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Join results files into one, the same byte for byte in whatever order they are named."""
    from sasa_bench.results.merge import MergeConflictError, write
    from sasa_bench.results.merge import merge as merge_results

    if out.exists() and out.resolve() not in (path.resolve() for path in files):
        raise click.UsageError(f"{out} is there already: name it among the files to add to it, or give another --out")
    try:
        merged = merge_results([(str(path), read([path])) for path in files])
    except MergeConflictError as error:
        _say("conflict", error.conflicts)
        raise
    _say("", merged.results.warnings)
    _say("kept once", merged.duplicates)
    _say_revisions(merged.results)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(merged.results, out)
    kinds = len(merged.results.hardware())
    click.echo(
        f"{out}: {len(merged.results.rows)} rows from {len(files)} files, {kinds} kind{'s' * (kinds != 1)} of machine"
    )


def _say_revisions(results: Results) -> None:
    used = {row.machine for row in results.rows}
    revisions = sorted({machine.revision for key, machine in results.machines.items() if key in used})
    if len(revisions) > 1:
        _say("", [f"the rows come from {len(revisions)} revisions of sasa-bench: {', '.join(revisions)}"])


def _say(what: str, sentences: Sequence[str], most: int = 20) -> None:
    for sentence in sentences[:most]:
        click.echo(f"sasa-bench: {what}{': ' if what else ''}{sentence}", err=True)
    if len(sentences) > most:
        click.echo(f"sasa-bench: {what}{': ' if what else ''}and {len(sentences) - most} more like these", err=True)


@cli.command()
@FILES
@click.option(
    "--format", "form", default="text", help="text, markdown, csv, parquet, github-action-benchmark or bencher."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write to a file instead of the terminal.")
def table(files: tuple[Path, ...], form: str, out: Path | None) -> None:
    """Print results as a tidy table; csv and parquet hold every column in base units."""
    from sasa_bench.report.services import EXPORTS
    from sasa_bench.report.table import frame, render

    results = read(files)
    for warning in results.warnings:
        click.echo(f"sasa-bench: {warning}", err=True)
    content = render(frame(results), form)
    timeless = sum(not row.samples_s for row in results.rows)
    if form in EXPORTS and timeless:
        click.echo(f"sasa-bench: {timeless} rows have no time and were left out", err=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    elif form == "parquet" and sys.stdout.isatty():
        raise click.UsageError("parquet is a binary format: give --out FILE.parquet")
    else:
        sys.stdout.buffer.write(content)


@cli.command()
@FILES
@click.option("--out", type=click.Path(path_type=Path), help="The page; beside the first results file by default.")
@click.option("--figures", type=click.Path(path_type=Path), help="Also write every figure to this folder.")
@click.option("--figure-format", "formats", multiple=True, default=("svg", "png"), help="svg, png or pdf; repeatable.")
@click.option("--compare", is_flag=True, help="Set the files side by side: machines, versions, implementations.")
def report(
    files: tuple[Path, ...], out: Path | None, figures: Path | None, formats: tuple[str, ...], compare: bool
) -> None:
    """Write one self-contained HTML file that opens offline."""
    from sasa_bench.report.figures import save_all
    from sasa_bench.report.report import write
    from sasa_bench.report.table import frame

    if compare:
        from sasa_bench.report import compare as comparison
        from sasa_bench.report import page

        path = out or files[0].with_name("-".join(file.stem for file in files) + ".html")
        page.write(comparison.html(comparison.load(files)), path)
        click.echo(f"{path}: {len(files)} files compared")
        return
    results = read(files)
    path = out or files[0].with_suffix(".html")
    write(results, path)
    if figures:
        for unknown in set(formats) - {"svg", "png", "pdf"}:
            raise click.UsageError(f"--figure-format {unknown}: there are svg, png and pdf")
        save_all(frame(results), results.impls, figures, formats)
    click.echo(f"{path}: {len(results.rows)} rows" + (f"; figures in {figures}" if figures else ""))


SECONDS = {"s": 1, "m": 60, "h": 3600}


def _duration(text: str) -> float:
    unit = SECONDS.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise click.UsageError(f"{text!r} is no duration: give seconds (300), minutes (10m) or hours (1h)")
    return value


def _points(path: Path, impls: Sequence[str], pairs: Sequence[str], elsewhere: bool = False) -> list[Any]:
    from sasa_bench.gate.pairs import Point
    from sasa_bench.timing.probe import available_cores

    loaded = load(path, _overrides(pairs))
    if len({case.threads for case in loaded.cases}) > 1:
        raise click.UsageError(f"{path} sweeps threads, and a gate has one number of them: give -c threads=1")
    cores = available_cores()
    cases = [case if case.threads or elsewhere else case.with_(threads=cores) for case in loaded.cases]
    return [Point(impl, case) for impl in dict.fromkeys(impls or loaded.impls) for case in cases]


@cli.command()
@click.option("--base", required=True, metavar="REV|DIR", help="What head is compared with.")
@click.option("--head", required=True, metavar="REV|DIR", help="What may have become slower.")
@click.argument("words", nargs=-1, metavar="[SUITE]")
@click.option("--impl", "impls", multiple=True, metavar="NAME", help="Gate only this implementation; repeatable.")
@CASE
@click.option(
    "--budget",
    default="10m",
    show_default=True,
    help="Wall time, with --slurm that of each task; what is undecided then is INCONCLUSIVE.",
)
@click.option("--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds one request may take.")
@click.option(
    "--slurm",
    is_flag=True,
    help="Spread the cases over an array job on Slurm, never the arms of a pair; words such as partition=cpu time=30 "
    "array=8 go to sbatch. Ctrl-C cancels the job.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for arms and reports; under reports/ by default.")
@click.option("--base-python", metavar="EXE", help="Python of the base arm, to gate a library upgrade.")
@click.option("--head-python", metavar="EXE", help="Python of the head arm.")
def gate(
    base: str,
    head: str,
    words: tuple[str, ...],
    impls: tuple[str, ...],
    pairs: tuple[str, ...],
    budget: str,
    timeout_s: float,
    slurm: bool,
    out: Path | None,
    base_python: str | None,
    head_python: str | None,
) -> int:
    """Compare two revisions in one job: exit status 0 pass, 2 regression, 3 inconclusive or contaminated."""
    from sasa_bench.gate.arms import set_up
    from sasa_bench.gate.outputs import text, write_all
    from sasa_bench.gate.run import run as run_gate
    from sasa_bench.gate.verdicts import Rules

    budget_s = _duration(budget)
    wishes = _wishes(words) if slurm else []
    suites = [word for word in words if word not in wishes] or ["suites/gate.toml"]
    if len(suites) > 1:
        raise click.UsageError(f"a gate takes one suite, and these are {len(suites)}: {' '.join(suites)}")
    points = _points(Path(suites[0]), impls, pairs, elsewhere=slurm)
    folder = out or Path("reports") / f"gate-{datetime.now():%Y%m%d-%H%M%S}"
    if slurm:
        from sasa_bench.gate.cluster import prepare, require_room
        from sasa_bench.sweep.slurm import parse_options, require_slurm

        options = parse_options(wishes)
        folder = folder.absolute()
        require_room(folder, options, budget_s)
        require_slurm()
        arms = set_up(base, head, folder, base_python, head_python)
        result = _gate_on_slurm(prepare(folder, arms, points, Rules(), options, budget_s, timeout_s), options)
    else:
        arms = set_up(base, head, folder, base_python, head_python)
        with _progress() as bar:
            task = bar.add_task("", total=None)

            def say(phase: str, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, description=phase)

            result = run_gate(arms, points, Rules(), budget_s, timeout_s, say, folder / "journal.jsonl")
    write_all(result, folder)
    click.echo(text(result), nl=False)
    click.echo(f"{folder}/gate.html, .md, .xml, .json")
    return result.exit_status


def _gate_on_slurm(plan: Plan, options: Options) -> Result:
    from sasa_bench.gate.cluster import run as run_tasks

    total = sum(map(len, plan.shards))
    click.echo(f"{total} cases in {len(plan.shards)} tasks, job {plan.name}, files in {plan.folder}", err=True)
    # CI ends a job by SIGTERM, and nobody would read what its tasks then still measure
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _progress() as bar:
            task = bar.add_task("", total=total)
            result = run_tasks(
                plan, options, lambda now: bar.update(task, completed=total - now.missing, description=now.queue)
            )
            bar.update(task, completed=total - sum(plan.missing().values()), description="")
    except KeyboardInterrupt:
        click.echo(f"stopped: job {plan.name} was cancelled", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return result


@cli.command()
@click.argument("suite", default="suites/gate.toml", type=click.Path(path_type=Path))
@click.option("--runs", default=0, help="Live gate runs on identical code.")
@click.option("--resample", default=0, help="Gate runs resampled from the journal, after the live ones.")
@click.option("--inject", "ratio", default=1.0, help="Slow cases of head on purpose: 1.05 makes them take 5 % more.")
@click.option("--inject-cases", default=1, show_default=True, help="How many random cases each run slows.")
@click.option("--journal", type=click.Path(path_type=Path), help="Where pairs are kept; under reports/ by default.")
@click.option(
    "--beside", default=IDLE, show_default=True, type=click.Choice([IDLE, *NEIGHBOURS]), help="Disturb the live runs."
)
@click.option("--impl", "impls", multiple=True, metavar="NAME", help="Only this implementation; repeatable.")
@CASE
@click.option("--budget", default="10m", show_default=True, help="Wall time of one run.")
@click.option("--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds one request may take.")
def aa(
    suite: Path,
    runs: int,
    resample: int,
    ratio: float,
    inject_cases: int,
    journal: Path | None,
    beside: str,
    impls: tuple[str, ...],
    pairs: tuple[str, ...],
    budget: str,
    timeout_s: float,
) -> None:
    """Measure the gate itself on this machine: false alarms on identical code, power on slow-downs made on purpose."""
    from sasa_bench.gate.aa import Rates, live, read_journal, scatter, write_page
    from sasa_bench.gate.aa import resample as resample_runs
    from sasa_bench.gate.verdicts import Rules

    if runs < 1 and resample < 1:
        raise click.UsageError("nothing to do: give --runs N for live runs, --resample N for runs drawn from a journal")
    if ratio < 1:
        raise click.UsageError(f"--inject {ratio}: give a ratio of 1 or more, such as 1.05")
    points = _points(suite, impls, pairs)
    if not 1 <= inject_cases <= len(points):
        raise click.UsageError(f"--inject-cases {inject_cases}: give a number from 1 to {len(points)}")
    path = journal or Path("reports") / f"aa-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    rules = Rules()
    if runs:
        done = live(
            points,
            runs,
            rules,
            _duration(budget),
            timeout_s,
            path.with_suffix(".arms"),
            path,
            ratio,
            inject_cases,
            beside,
            lambda line: click.echo(line),
        )
        for line in Rates.of(done).lines():
            click.echo(line)
    if resample:
        pairs_drawn = read_journal(path)
        click.echo(scatter(pairs_drawn))
        for line in Rates.of(resample_runs(pairs_drawn, resample, rules, ratio, inject_cases)).lines():
            click.echo(f"resampled: {line}")
    page = write_page(path, rules, resample)
    click.echo(f"journal: {path}, its tables: {page}")


@cli.command()
@click.argument("suite", type=click.Path(path_type=Path))
@CASE
@click.option(
    "--impl", "impls", multiple=True, required=True, metavar="NAME|FILE.py", help="Repeat to set side by side."
)
@click.option("--device", type=click.Choice(CHOICES["device"]), help="Where to run; the suite's own by default.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder; under reports/ by default.")
@click.option("--timeout", "timeout_s", default=900.0, show_default=True, help="Seconds that one may take.")
def profile(
    suite: Path, pairs: tuple[str, ...], impls: tuple[str, ...], device: str | None, out: Path | None, timeout_s: float
) -> None:
    """Show where the time of one case of SUITE goes: stages, operators, stacks, memory; Chrome traces as well."""
    from sasa_bench.profiling.page import save
    from sasa_bench.sweep.run import Workers
    from sasa_bench.timing.probe import available_cores

    loaded = load(suite, _overrides(pairs, device))
    if len(loaded.cases) > 1:
        varying = [axis for axis in loaded.axes if len({getattr(case, axis) for case in loaded.cases}) > 1]
        first = " ".join(f"-c {axis}={getattr(loaded.cases[0], axis)}" for axis in varying)
        raise click.UsageError(f"{loaded.name} has {len(loaded.cases)} cases left: hold every axis, such as {first}")
    case = loaded.cases[0] if loaded.cases[0].threads else loaded.cases[0].with_(threads=available_cores())
    if case.device == "cuda":
        _require_cuda()
    folder = out or Path("reports") / f"profile-{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    summaries = []
    for impl in dict.fromkeys(impls):
        with Workers(timeout_s) as workers:
            summaries.append(workers.get().ask("profile", impl=impl, case=case.to_dict(), folder=str(folder.resolve())))
    path = save(folder, case, summaries)
    click.echo(f"{path}: {', '.join(summary['name'] for summary in summaries)}; traces in {folder / 'traces'}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def index(folder: Path) -> None:
    """Write a report for each results file in FOLDER, and index.html that links them."""
    from sasa_bench.report.index import write

    for path in write(folder):
        click.echo(path)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--impl", "impls", multiple=True, metavar="NAME", help="Only this implementation; repeatable.")
@CASE
@click.option("--level", default=0.01, show_default=True, help="False discovery rate over all series.")
@click.option("--format", "form", default="text", help="text, markdown or csv.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write a page with charts to this .html file.")
def history(
    folder: Path, impls: tuple[str, ...], pairs: tuple[str, ...], level: float, form: str, out: Path | None
) -> None:
    """Show the results below FOLDER over commits: where a case became slower or faster."""
    from sasa_bench.report import page
    from sasa_bench.report.history import html, load, render

    if not 0 < level < 1:
        raise click.UsageError(f"--level {level}: give a share between 0 and 1, such as 0.01")
    found = load(folder, impls, _overrides(pairs), level)
    _say("", found.warnings)
    click.echo(render(found, form), nl=False)
    if out:
        page.write(html(found), out)
        click.echo(f"sasa-bench: {out}: the page", err=True)


@cli.command()
@FILES
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Draw this suite; repeatable, at most three.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="An .svg, .png or .pdf file.")
def figure(files: tuple[Path, ...], suites: tuple[str, ...], out: Path) -> None:
    """Draw attention's time over the convolution's, suite by suite, as one figure for a README or a paper."""
    from sasa_bench.report.figures import overview, save
    from sasa_bench.report.findings import ATTENTION
    from sasa_bench.report.table import frame

    if out.suffix not in (".svg", ".png", ".pdf"):
        raise click.UsageError(f"--out {out}: name a .svg, .png or .pdf file")
    results = read(files)
    rows = frame(results)
    for unknown in set(suites) - set(rows["suite"]):
        raise click.UsageError(f"--suite {unknown}: the files have {', '.join(dict.fromkeys(rows['suite']))}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save(overview(rows[rows["suite"].isin(suites)] if suites else rows, results.impls, ATTENTION), out)
    click.echo(out)


@cli.command(name="list")
@click.argument("suites", nargs=-1, type=click.Path(path_type=Path))
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="As for run.")
@CASE
@click.option("--markdown", is_flag=True, help="Only the implementations, as the table of the README.")
def list_(suites: tuple[Path, ...], impls: tuple[str, ...], pairs: tuple[str, ...], markdown: bool) -> None:
    """Show suites and the rows each will give, axes, implementations and whether they run here."""
    from sasa_bench.case import AXES, Case
    from sasa_bench.cli.doctor import implementations

    if markdown:
        click.echo("| implementation | computes | how |\n|---|---|---|")
        for info, _ in implementations(impls):
            mark, how = (f" {DIFFERS}", f" ({DIFFERS} {info.differs})") if info.differs else ("", "")
            click.echo(f"| `{info.name}`{mark} | {info.op.replace('_', ' ')} | {info.summary}{how} |")
        return

    loaded = [load(path, _overrides(pairs)) for path in suites or sorted(Path("suites").glob("*.toml"))]
    if not loaded:
        click.echo("no suites in ./suites; name suite files, or run from the folder that holds suites/\n")
    for suite in loaded:
        names = impls or suite.impls
        swept = ", ".join(suite.axes) or "nothing"
        click.echo(f"{suite.name}: {suite.title}")
        click.echo(
            f"  {len(suite.cases)} cases × {len(names)} implementations = {len(suite.cases) * len(names)} rows; "
            f"sweeps {swept}"
        )
        click.echo(f"  {', '.join(names)}")
    click.echo("\naxes (FIELD of -c) and their defaults")
    for axis in AXES:
        allowed = f"   one of {', '.join(CHOICES[axis])}" if axis in CHOICES else ""
        click.echo(f"  {axis:17} {getattr(Case(), axis)}{allowed}")
    click.echo("\nimplementations")
    for info, missing in implementations(impls):
        state = f"   not on this machine: {missing}" if missing else ""
        click.echo(f"  {info.label:17} {info.summary}{state}")


@cli.command()
@click.option("--table", "tables", multiple=True, metavar="T1..T7", help="Only this table; repeatable.")
@click.option("--time", "with_time", is_flag=True, help="Also check and measure the networks on this machine, batch 1.")
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="With --time: this one; repeatable.")
@click.option("--device", type=click.Choice(CHOICES["device"]), default="cpu", help="With --time: where to run.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds a stage of a row may take.")
@click.option("--results", type=click.Path(path_type=Path), help="Times of an earlier --time, instead of new ones.")
@click.option("--format", "form", default="text", help="text, markdown or csv.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to a file instead of the terminal.")
def paper(
    tables: tuple[str, ...],
    with_time: bool,
    impls: tuple[str, ...],
    device: str,
    timeout_s: float,
    results: Path | None,
    form: str,
    out: Path | None,
) -> None:
    """Print the paper's tables next to ours: FLOPs (B) and parameters (M), and with --time seconds per image."""
    from sasa_bench.paper.tables import TABLES, cells, render, suite, timed

    wanted = tables or TABLES
    found = cells(wanted)
    render(found, form)
    if with_time and results is None:
        from sasa_bench.impls import IN_NETWORKS, names
        from sasa_bench.results.file import Writer
        from sasa_bench.sweep.run import Workers, describe, execute, plan
        from sasa_bench.timing import probe
        from sasa_bench.timing.settings import Settings

        if device == "cuda":
            _require_cuda()
        networks = suite(wanted, impls or [name for name in IN_NETWORKS if name in names()], device)
        results = Path("reports") / f"paper-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
        with Workers(timeout_s) as workers, Writer(results) as writer, _progress() as bar:
            work = plan([networks], (), describe(workers, networks.impls))
            task = bar.add_task("", total=work.rows)
            for rows in execute(work, workers, writer, probe.detect(), None, Settings()):
                bar.update(task, advance=len(rows), description=rows[0].case.describe()[:60])
        click.echo(f"sasa-bench: times are in {results}", err=True)
    if results is not None:
        found += timed(wanted, read([results]).rows)
    content = render(found, form)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(content, encoding="utf-8")
    else:
        click.echo(content, nl=False)


@cli.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Networks of each position.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images; 12 by default.")
@click.option("--impl", metavar="NAME|FILE.py", help="The local attention to train with.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write a CSV file, one line for each network.")
def accuracy(seeds: int, epochs: int | None, impl: str | None, out: Path | None) -> None:
    """Train small attention networks on real digits: is relative better than absolute, and absolute than none?"""
    from sasa_bench.impls import ANYWHERE
    from sasa_bench.paper.accuracy import EPOCHS, POSITIONS, sentences, to_csv, train

    outcomes = []
    with _progress() as bar:
        task = bar.add_task("", total=seeds * len(POSITIONS))
        for outcome in train(impl or ANYWHERE, seeds, epochs or EPOCHS):
            outcomes.append(outcome)
            bar.update(task, advance=1, description=f"seed {outcome.seed} {outcome.position}")
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(to_csv(outcomes), encoding="utf-8")
    for sentence in sentences(outcomes):
        click.echo(sentence)


@cli.command()
def doctor() -> None:
    """Show what this machine can run, and what would unlock the rest.

    Processor, GPU and what NVML says of it, compiler, libraries; then each implementation with what it lacks, its
    native builds, and the tunables that were measured here and are kept in SASA_BENCH_CACHE. Compiles and measures
    nothing.
    """
    from sasa_bench.cli.doctor import lines

    for line in lines():
        click.echo(line)


if __name__ == "__main__":
    main()
