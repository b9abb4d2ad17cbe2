"""The verb about this machine: doctor."""

from __future__ import annotations

import click

from sasa_bench.cli.options import INCONCLUSIVE


@click.command()
@click.option("--check", is_flag=True, help="Only look for what spoils measurements; exit status 3 if anything does.")
def doctor(check: bool) -> int:
    """Show what this machine can run, what would unlock the rest, and what spoils measurements.

    Processor, GPU and what NVML says of it, compiler, libraries, environment variables; then each implementation with
    what it lacks, its native builds, and the tunables that were measured here and are kept in SASA_BENCH_CACHE; last
    what makes times noisy: a quota, binding, governor, turbo, SMT, load, a preloaded allocator. Compiles and measures
    nothing.
    """
    from sasa_bench.cli.doctor import lines, spoiling

    found = spoiling()
    for line in () if check else (*lines(), ""):
        click.echo(line)
    for line in found or ["nothing that spoils measurements was found"]:
        click.echo(line)
    return INCONCLUSIVE if check and found else 0
