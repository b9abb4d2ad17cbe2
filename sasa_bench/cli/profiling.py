"""The verb that shows where time goes: profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sasa_bench.cli.options import CASE, DEVICE, overrides, require_cuda, stamped

if TYPE_CHECKING:
    from sasa_bench.case import Case
    from sasa_bench.suite import Suite


@click.command()
@click.argument("suite", type=click.Path(path_type=Path))
@CASE
@click.option(
    "--impl", "impls", multiple=True, required=True, metavar="NAME|FILE.py", help="Repeat to set side by side."
)
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="A folder; under reports/ by default.")
@click.option("--timeout", "timeout_s", default=900.0, show_default=True, help="Seconds that one may take.")
def profile(
    suite: Path, pairs: tuple[str, ...], impls: tuple[str, ...], device: str | None, out: Path | None, timeout_s: float
) -> None:
    """Show where the time of one case of SUITE goes: stages, operators, stacks, memory; Chrome traces as well."""
    from sasa_bench.profiling.page import save
    from sasa_bench.suite import load
    from sasa_bench.sweep.run import Workers

    loaded = load(suite, overrides(pairs, device))
    case = _only_case(loaded)
    if case.device == "cuda":
        require_cuda()
    folder = out or stamped(f"profile-{loaded.name}-{{}}")
    summaries = []
    for impl in dict.fromkeys(impls):
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
