"""The verb prebuild."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from sasa_bench.case import Case, UserError
from sasa_bench.cli.options import CASE, SUITES, load_suites, warn
from sasa_bench.results.cache import cache_directory


@click.command()
@SUITES
@CASE
@click.option("--arch", metavar="sm_NN", help="Architecture to compile for, such as sm_90; by default this GPU's.")
@click.option("--threads", type=click.IntRange(1), help="How many are compiled at a time; by default one a core.")
def prebuild(suites: tuple[Path, ...], pairs: tuple[str, ...], arch: str | None, threads: int | None) -> None:
    """Compile the CUDA kernels of suites into SASA_BENCH_CACHE, on a machine with or without a GPU.

    A run on a GPU of that architecture, with this cache and an NVRTC of the same major version, compiles nothing. Needs
    cuda-core and NVRTC.
    """
    from sasa_bench.impls import _nvrtc as nvrtc

    if arch is None:
        arch = _arch_here()
    if not arch.removeprefix("sm_").isdecimal() or not arch.startswith("sm_"):
        raise click.UsageError(f"--arch {arch}: give sm_ and a number, such as sm_80, sm_90 or sm_100")
    if reason := nvrtc.missing_compiler():
        raise UserError(reason)
    cases = [case for suite in load_suites(suites, pairs, "cuda") for case in suite.cases]
    kernels = _kernels(cases)
    count, failures = nvrtc.prebuild(kernels, arch, threads or os.cpu_count() or 1)
    if count and len(failures) == count:
        raise UserError(failures[0])
    warn(failures)  # a run leaves a candidate out that does not compile
    click.echo(f"{count - len(failures)} kernels for {arch} are in {cache_directory() / 'cubin'}")


def _arch_here() -> str:
    """The architecture of the current GPU. Raises UsageError where there is none."""
    import torch

    from sasa_bench.impls import _nvrtc as nvrtc

    if reason := nvrtc.no_device():
        raise click.UsageError(f"{reason.rstrip('.')}; or give --arch sm_NN, for which no GPU is needed")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _kernels(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """(source, template instance) of every kernel that some implementation may launch in these cases."""
    from sasa_bench import impls

    found = []
    for impl in map(impls.get, impls.BUILTIN):
        found += [kernel for case in cases if not impl.supports(case) for kernel in impl.info.kernels(case)]
    return found
