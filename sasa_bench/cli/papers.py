"""Verbs about the paper: paper, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sasa_bench.case import CHOICES
from sasa_bench.cli.options import require_cuda, seconds, stamped, warn, write_or_print
from sasa_bench.cli.progress import progress

if TYPE_CHECKING:
    from sasa_bench.paper.tables import Cell


@click.command()
@click.option("--table", "tables", multiple=True, metavar="T1..T7", help="Only this table; repeatable.")
@click.option("--time", "with_time", is_flag=True, help="Also check and measure the networks on this machine, batch 1.")
@click.option(
    "--impl", "impls", multiple=True, metavar="NAME|FILE.py", help="With --time: only this implementation; repeatable."
)
@click.option("--device", type=click.Choice(CHOICES["device"]), default="cpu", help="With --time: where to run.")
@click.option(
    "--timeout",
    "timeout_s",
    callback=seconds,
    default=600.0,
    show_default=True,
    help="Seconds a stage of a row may take; building, at least 900.",
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="A results file with times of the networks, instead of new ones."
)
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
    from sasa_bench.paper.tables import TABLES, cells, render

    if with_time and results is not None:
        raise click.UsageError("--time measures the networks, --results takes their times from a file: give one")
    if not with_time and (impls or device != "cpu"):
        raise click.UsageError("--impl and --device say what --time measures: add --time")
    wanted = tables or TABLES
    found = cells(wanted)
    render(found, form)
    if with_time and results is None:
        results = _time(wanted, impls, device, timeout_s)
    if results is not None:
        found += _times(wanted, results)
    write_or_print(render(found, form).encode(), out)


def _times(tables: Sequence[str], file: Path) -> list[Cell]:
    """The times of the networks of these tables in a results file; a warning where it has none."""
    from sasa_bench.paper.tables import timed
    from sasa_bench.results.file import read

    results = read([file])
    found = timed(tables, results)
    warn(results.warnings)
    if not found:
        warn([f"{file} has no row of these networks: `sasa-bench run networks` measures them"])
    return found


def _time(tables: Sequence[str], impls: Sequence[str], device: str, timeout_s: float) -> Path:
    """Measure the networks of these tables; the results file."""
    from sasa_bench.cli.measuring import watching
    from sasa_bench.impls import IN_NETWORKS, names
    from sasa_bench.paper.tables import suite
    from sasa_bench.sweep.run import run

    if device == "cuda":
        require_cuda()
    networks = suite(tables, impls or [name for name in IN_NETWORKS if name in names()], device)
    path = stamped("paper-", ".jsonl")
    with progress() as shown:
        run([networks], (), path, timeout_s=timeout_s, watch=watching(shown))
    warn([f"times are in {path}"])
    return path


@click.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Networks of each position.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images; 12 by default.")
@click.option("--impl", metavar="NAME|FILE.py", help="The local attention to train with.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write a CSV file, one line for each network.")
def accuracy(seeds: int, epochs: int | None, impl: str | None, out: Path | None) -> None:
    """Train small attention networks on real digits: is relative better than absolute, and absolute than none?"""
    from sasa_bench.impls import ANYWHERE
    from sasa_bench.paper.accuracy import EPOCHS, POSITIONS, sentences, to_csv, train

    outcomes = []
    try:
        with progress() as shown:
            for outcome in train(impl or ANYWHERE, seeds, epochs or EPOCHS):
                outcomes.append(outcome)
                shown.show(len(outcomes), seeds * len(POSITIONS), f"seed {outcome.seed}", outcome.position)
                if out:
                    write_or_print(to_csv(outcomes).encode(), out)
    except RuntimeError as error:  # a layer that cannot run says so in its first line
        raise click.ClickException(f"--impl {impl or ANYWHERE}: {str(error).partition(chr(10))[0]}") from None
    for sentence in sentences(outcomes):
        click.echo(sentence)
