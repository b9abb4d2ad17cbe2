"""The verb about this machine: doctor."""

from __future__ import annotations

from pathlib import Path

import click

from sasa_bench.cli.options import INCONCLUSIVE


@click.command()
@click.option("--check", is_flag=True, help="Only look for what spoils measurements; exit status 3 if anything does.")
@click.option(
    "--choose-from",
    multiple=True,
    metavar="F.jsonl",
    type=click.Path(path_type=Path),
    help="Results of this machine: impl = 'auto' follows their order from now on; repeatable.",
)
def doctor(check: bool, choose_from: tuple[Path, ...]) -> int:
    """Show what this machine can run, what would unlock the rest, and what spoils measurements.

    Processor, GPU with what NVML reports, compiler, libraries, environment variables; then each implementation with
    what it lacks, its native builds, and the tunables that were measured here and are kept in SASA_BENCH_CACHE; what
    impl = "auto" runs and why; last what makes times noisy: a quota, binding, governor, turbo, SMT, load, a preloaded
    allocator. Compiles and measures nothing.
    """
    from sasa_bench.cli.doctor import learn, lines, spoiling

    if choose_from:
        click.echo(learn(choose_from))
        return 0
    found = spoiling()
    for line in () if check else (*lines(), ""):
        click.echo(line)
    for line in found or ["nothing that spoils measurements was found"]:
        click.echo(line)
    return INCONCLUSIVE if check and found else 0
