"""The verb that shows where time goes: profile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sasa_bench.cli.options import CASE, DEVICE, overrides, require_cuda, require_folder, seconds, stamped
from sasa_bench.results.environment import require_free_threads

if TYPE_CHECKING:
    from sasa_bench.case import Case
    from sasa_bench.suite import Suite


TRACE = click.option(
    "--trace",
    "as_traces",
    is_flag=True,
    help="Show the traces FILE… of torch.profiler or ONNX Runtime, from any program, instead of a suite.",
)
AGAINST = click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --trace: an earlier trace that the one of --trace is compared with.",
)
OUT = click.option(
    "--out", type=click.Path(path_type=Path), help="A folder, or a page with --trace; under reports/ by default."
)


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="SUITE | --trace FILE…", type=click.Path(path_type=Path))
@TRACE
@AGAINST
@CASE
@click.option("--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="Profile this one; repeat to compare.")
@DEVICE
@OUT
@click.option(
    "--timeout", "timeout_s", callback=seconds, default=900.0, show_default=True, help="Seconds for one implementation."
)
def profile(
    paths: tuple[Path, ...],
    as_traces: bool,
    against: Path | None,
    pairs: tuple[str, ...],
    impls: tuple[str, ...],
    device: str | None,
    out: Path | None,
    timeout_s: float,
) -> None:
    """Show where the time of one case of SUITE goes, or what traces of any program hold: one page.

    The page has operators with shapes, stacks and memory; stages for a suite, idle time for traces.
    """
    if as_traces or against:
        if impls or pairs or device:
            raise click.UsageError("--trace and --against read files: drop -c, --impl and --device")
        _show_traces(paths, against, out)
    elif len(paths) > 1 or not impls:
        raise click.UsageError("profile one SUITE with --impl NAME, or give --trace FILE…")
    else:
        _profile_case(paths[0], pairs, impls, device, out, timeout_s)


def _show_traces(paths: Sequence[Path], against: Path | None, out: Path | None) -> None:
    from sasa_bench.profiling.trace_page import html, open_traces
    from sasa_bench.report import page

    if against and len(paths) > 1:
        raise click.UsageError("--against compares one trace with another: give one FILE to --trace")
    opened = open_traces([*paths, *([against] if against else [])])
    target = out or stamped("trace-", ".html")
    if target.is_dir():
        target /= "index.html"
    page.write(html(opened[: len(paths)], opened[-1] if against else None), target)
    click.echo(f"{target}: {', '.join(one.name for one in opened)}")


def _profile_case(
    suite: Path, pairs: Sequence[str], impls: Sequence[str], device: str | None, out: Path | None, timeout_s: float
) -> None:
    from sasa_bench.profiling.page import save
    from sasa_bench.suite import load
    from sasa_bench.sweep.plan import require_distinct
    from sasa_bench.sweep.workers import Workers

    require_free_threads(os.environ)
    require_folder("--out", out)
    loaded = load(suite, overrides(pairs, device))
    case = _only_case(loaded)
    if case.device == "cuda":
        require_cuda()
    folder = out or stamped(f"profile-{loaded.name}-")
    specs = list(dict.fromkeys(impls))
    if len(specs) > 1:
        with Workers(timeout_s) as workers:
            names = [info["name"] for info in workers.get().ask("describe", impls=specs)]
        require_distinct(dict(zip(specs, names, strict=True)))
    summaries = []
    for impl in specs:
        with Workers(timeout_s) as workers:
            summaries.append(workers.get().ask("profile", impl=impl, case=case.to_dict(), folder=str(folder.resolve())))
    path = save(folder, case, summaries)
    click.echo(f"{path}: {', '.join(summary['name'] for summary in summaries)}; traces in {folder / 'traces'}")


def _only_case(suite: Suite) -> Case:
    from sasa_bench.timing.probe import available_cores

    if len(suite.cases) > 1:
        varying = [axis for axis in suite.axes if len({getattr(case, axis) for case in suite.cases}) > 1]
        first = " ".join(f"-c {axis}={getattr(suite.cases[0], axis)}" for axis in varying)
        raise click.UsageError(f"{suite.name} has {len(suite.cases)} cases left: hold every axis, such as {first}")
    return suite.cases[0] if suite.cases[0].threads else suite.cases[0].with_(threads=available_cores())
