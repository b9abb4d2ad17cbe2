"""The verb that finds the commit which made a case slower."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sasa_bench.cli.gating import IMPLS, SUITE, TIMEOUT, interrupted_by_sigterm, phases
from sasa_bench.cli.options import CASE, duration, folder, overrides, stamped
from sasa_bench.gate.relink import PAIR
from sasa_bench.results.environment import require_free_threads

if TYPE_CHECKING:
    from sasa_bench.gate.git import Repository
    from sasa_bench.gate.pairs import Point


@click.command()
@click.option("--good", required=True, metavar="REV", help="Revision at which the case was fast.")
@click.option(
    "--bad", required=True, metavar="REV", help="Revision at which it is slow; --good is one of its ancestors."
)
@SUITE
@click.option("--case", "words", multiple=True, metavar="TEXT", help="Only cases with this in their name; repeatable.")
@IMPLS
@CASE
@click.option("--confidence", default=0.95, show_default=True, help="Probability of one commit at which to stop.")
@click.option("--budget", default="1h", show_default=True, help="Wall time; the probabilities so far are printed then.")
@TIMEOUT
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=folder,
    help="Folder of the search; an existing one is continued.",
)
def bisect(
    good: str, bad: str, suite: Path, words: tuple[str, ...], pairs: tuple[str, ...], out: Path | None, **given: Any
) -> int:
    """Find the commit that made a case slower, with its probability; exit status 3 where none is certain enough.

    The gate compares both ends first, then single commits in between with the good end, on a few fresh pairs each.
    Commits that do not build are skipped.
    """
    from sasa_bench.gate.bisect import Bisection
    from sasa_bench.gate.verdicts import Rules

    require_free_threads(os.environ)
    if not 0.5 <= given["confidence"] < 1:
        raise click.UsageError(f"--confidence {given['confidence']}: give a probability from 0.5 to below 1")
    repository = _repository()
    points = _points(good, bad, suite, words, given["impls"], pairs)
    folder = out or stamped("bisect-")
    limits = duration(given["budget"]), given["timeout_s"], given["confidence"]
    with interrupted_by_sigterm(), phases() as say:
        search = Bisection(repository, good, bad, points, folder, Rules(), *limits, given["impls"], say, PAIR)
        found = search.run()
    click.echo(found.text(), nl=False)
    click.echo(f"{folder}: --out {folder} continues from here")
    return 0 if max(found.p) >= given["confidence"] else 3


def _repository() -> Repository:
    from sasa_bench.gate.git import find

    repository = find(Path.cwd())
    if repository is None:
        raise click.UsageError(f"{Path.cwd()} is in no git repository: run bisect inside one")
    return repository


def _points(
    good: str, bad: str, suite: Path, words: tuple[str, ...], impls: tuple[str, ...], pairs: tuple[str, ...]
) -> list[Point]:
    from sasa_bench.gate.points import points
    from sasa_bench.gate.sources import sources

    found = points(suite, sources(good, bad), impls, overrides(pairs))
    chosen = [point for point in found if all(word in point.key for word in words)]
    if not chosen:
        names = ", ".join(point.key for point in found[:3])
        raise click.UsageError(f"--case {' --case '.join(words)} is in none of the {len(found)} cases, such as {names}")
    return chosen
