"""The verb about this machine: doctor."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Show what this machine can run, and what would unlock the rest.

    Processor, GPU and what NVML says of it, compiler, libraries; then each implementation with what it lacks, its
    native builds, and the tunables that were measured here and are kept in SASA_BENCH_CACHE. Compiles and measures
    nothing.
    """
    from sasa_bench.cli.doctor import lines

    for line in lines():
        click.echo(line)
