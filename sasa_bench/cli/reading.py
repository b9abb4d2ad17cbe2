"""Verbs that read results files: table, report, index, figure, history, merge."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sasa_bench.cli.options import FILES, overrides, page, share, warn, write_or_print

if TYPE_CHECKING:
    from sasa_bench.results.record import Results

FIGURES = ("svg", "png", "pdf")
LONGEST_NAME = 200
"""Bytes; file systems allow 255."""
SUFFIXES = {".csv": "csv", ".md": "markdown", ".parquet": "parquet"}
EXISTING = click.Path(path_type=Path, exists=True)
FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))


@click.command()
@FILES
@click.option(
    "--format",
    "form",
    help="text, markdown, csv, parquet, github-action-benchmark or bencher; by default as --out ends, else text.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write to a file instead of the terminal.")
def table(files: tuple[Path, ...], form: str | None, out: Path | None) -> None:
    """Print results as a tidy table; csv and parquet hold every column in base units."""
    from sasa_bench.report.services import EXPORTS
    from sasa_bench.report.table import frame, render
    from sasa_bench.results.file import read

    form = form or SUFFIXES.get(out.suffix.lower() if out else "", "text")
    results = read(files)
    warn(results.warnings)
    content = render(frame(results), form)
    timeless = sum(not row.samples_s for row in results.rows)
    if form in EXPORTS and timeless:
        warn([f"{timeless} rows have no time and were left out"])
    if form == "parquet" and not out and sys.stdout.isatty():
        raise click.UsageError("parquet is a binary format: give --out FILE.parquet")
    write_or_print(content, out)


@click.command()
@FILES
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=page,
    help="The page; by default beside the first file.",
)
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
    from sasa_bench.results.file import read

    if compare:
        if figures:
            raise click.UsageError("--figures draws those of a report: drop --compare")
        _compare(files, out)
        return
    for unknown in set(formats) - set(FIGURES):
        raise click.UsageError(f"--figure-format {unknown}: there are svg, png and pdf")
    if figures and figures.exists() and not figures.is_dir():
        raise click.UsageError(f"--figures {figures} is a file: name a folder")
    results = read(files)
    warn(results.warnings)
    path = out or _page_of(files)
    write(results, path)
    if figures:
        save_all(frame(results), results.impls, figures, formats)
    of = f" of {len(files)} files (--compare sets them side by side)" if len(files) > 1 else ""
    click.echo(f"{path}: {len(results.rows)} rows{of}" + (f"; figures in {figures}" if figures else ""))


def _page_of(files: Sequence[Path]) -> Path:
    """A page beside the first file, named after all of them, or after the first of many."""
    name = "-".join(file.stem for file in files)
    if len(files) > 1 and len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{files[0].stem}-and-{len(files) - 1}-more"
    return files[0].with_name(f"{name}.html")


def _compare(files: Sequence[Path], out: Path | None) -> None:
    from sasa_bench.report import compare as comparison
    from sasa_bench.report.page import write

    path = out or _page_of(files)
    write(comparison.html(comparison.load(files)), path)
    click.echo(f"{path}: {len(files)} files compared")


@click.command()
@FOLDER
def index(folder: Path) -> None:
    """Write a report for each results file in FOLDER, and index.html that links them.

    Of several files also a page that sets them side by side, and one that shows them over revisions.
    """
    from sasa_bench.report.index import write

    for path in write(folder):
        click.echo(path)


@click.command()
@click.argument("places", metavar="FOLDER|FILE...", nargs=-1, required=True, type=EXISTING)
@click.option("--impl", "impls", multiple=True, metavar="NAME", help="Only this implementation; repeatable.")
@click.option(
    "-c", "pairs", multiple=True, metavar="FIELD=VALUE[,VALUE]", help="Only cases with these values of an axis."
)
@click.option("--repository", type=EXISTING, help="Also look up dates of commits in this repository; git runs there.")
@click.option("--level", callback=share, default=0.01, show_default=True, help="False discovery rate over all series.")
@click.option("--format", "form", default="text", help="text, markdown or csv.")
@click.option(
    "--out", type=click.Path(path_type=Path), callback=page, help="Also write a page with charts to this .html file."
)
def history(
    places: tuple[Path, ...],
    impls: tuple[str, ...],
    pairs: tuple[str, ...],
    repository: Path | None,
    level: float,
    form: str,
    out: Path | None,
) -> None:
    """Show results over commits, of files and of all below a folder: where a case became slower or faster."""
    from sasa_bench.gate.git import find
    from sasa_bench.report.history import html, load, render
    from sasa_bench.report.page import write

    if repository and find(repository) is None:
        raise click.UsageError(f"--repository {repository}: git finds no repository there")
    found = load(places, impls, overrides(pairs), level, repository)
    warn(found.warnings)
    click.echo(render(found, form), nl=False)
    if out:
        write(html(found), out)
        warn([f"{out}: the page"])


@click.command()
@FILES
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Draw this suite; repeatable, at most three.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="An .svg, .png or .pdf file.")
def figure(files: tuple[Path, ...], suites: tuple[str, ...], out: Path) -> None:
    """Draw attention's time over the convolution's, suite by suite, as one figure for a README or a paper."""
    from sasa_bench.report.figures import overview, save
    from sasa_bench.report.findings import ATTENTION
    from sasa_bench.report.table import frame
    from sasa_bench.results.file import read

    if out.suffix.removeprefix(".") not in FIGURES:
        raise click.UsageError(f"--out {out}: name a .svg, .png or .pdf file")
    results = read(files)
    warn(results.warnings)
    rows = frame(results)
    for unknown in set(suites) - set(rows["suite"]):
        raise click.UsageError(f"--suite {unknown}: the files have {', '.join(dict.fromkeys(rows['suite']))}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save(overview(rows[rows["suite"].isin(suites)] if suites else rows, results.impls, ATTENTION), out)
    click.echo(out)


@click.command()
@FILES
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The merged results file.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Join results files into one, the same byte for byte in whatever order they are named."""
    from sasa_bench.results.file import read
    from sasa_bench.results.merge import MergeConflictError, write
    from sasa_bench.results.merge import merge as merge_results

    if out.exists() and out.resolve() not in (path.resolve() for path in files):
        raise click.UsageError(f"{out} already exists: list it among the files to add to it, or give another --out")
    try:
        merged = merge_results([(str(path), read([path])) for path in files])
    except MergeConflictError as error:
        warn(error.conflicts, "conflict")
        raise
    warn(merged.results.warnings)
    warn(merged.duplicates, "kept once")
    warn(merged.missing, "missing")
    if merged.apart:
        cases = "1 case has" if merged.apart == 1 else f"{merged.apart} cases have"
        warn([f"{cases} rows of several files: ratios between these are not interleaved"])
    warn_of_revisions(merged.results)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(merged.results, out)
    rows, kinds = len(merged.results.rows), len(merged.results.hardware())
    click.echo(f"{out}: {rows} rows from {len(files)} files, {kinds} kind{'s' * (kinds != 1)} of machine")


def warn_of_revisions(results: Results) -> None:
    """Print a warning where the rows come from several revisions of sasa-bench."""
    revisions = sorted({machine.revision for machine in results.used_machines()})
    if len(revisions) > 1:
        warn([f"the rows come from {len(revisions)} revisions of sasa-bench: {', '.join(revisions)}"])
