"""What several verbs share: arguments, options, how values are read and how messages are printed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sasa_bench.case import CHOICES, parse_value

if TYPE_CHECKING:
    from sasa_bench.suite import Suite

ERROR, REGRESSION, INCONCLUSIVE = 1, 2, 3
"""Exit statuses other than 0: usage or tool error, regression found, inconclusive or contaminated."""

SUITES = click.argument("suites", nargs=-1, required=True, type=click.Path(path_type=Path))
FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
CASE = click.option("-c", "pairs", multiple=True, metavar="FIELD=VALUE[,VALUE]", help="Hold or sweep an axis.")
DEVICE = click.option(
    "--device", type=click.Choice(CHOICES["device"]), help="Where to run; the suite's own by default."
)
SLURM = click.option(
    "--slurm",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Run as an array job on Slurm with this option of sbatch, such as partition=gpu, gres=gpu:1, time=2:00:00, "
    "array=100%8 or exclusive, which is the default; repeatable.",
)
SECONDS = {"s": 1, "m": 60, "h": 3600}


def overrides(pairs: Sequence[str], device: str | None = None) -> dict[str, list[Any]]:
    """The values of -c FIELD=VALUE[,VALUE] by field, and of --device. Raises UsageError, or CaseError for a field."""
    found: dict[str, list[Any]] = {"device": [device]} if device else {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        if not equals or not values:
            raise click.UsageError(f"-c {pair}: give FIELD=VALUE, or FIELD=VALUE,VALUE to sweep")
        if name in found:
            raise click.UsageError(f"-c {pair}: {name} is given twice: give it once, -c {name}=VALUE,VALUE to sweep")
        found[name] = [parse_value(name, value) for value in values.split(",")]
    return found


def load_suites(paths: Sequence[Path], pairs: Sequence[str] = (), device: str | None = None) -> list[Suite]:
    """The suites of these files. Raises SuiteError, or UsageError for two of one name."""
    from sasa_bench.suite import load

    suites = [load(path, overrides(pairs, device)) for path in paths]
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two suites are called {name!r}: give each file a name of its own")
    return suites


def part(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """I/N of --shard."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.UsageError(f"--shard {text}: give I/N, part I of N, such as 1/4 to 4/4")
    return int(number), int(count)


def duration(text: str) -> float:
    """Seconds of 300, 10m or 1h."""
    unit = SECONDS.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise click.UsageError(f"--budget {text!r} is not a duration: give seconds (300), minutes (10m) or hours (1h)")
    return value


def seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A number of seconds, as --budget and --timeout take it."""
    if not 0 < value < math.inf:
        raise click.UsageError(f"{parameter.opts[0]} {value:g}: give seconds, more than 0")
    return value


def share(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A number between 0 and 1, as --level takes it."""
    if not 0 < value < 1:
        raise click.UsageError(f"{parameter.opts[0]} {value:g}: give a share between 0 and 1, such as 0.01")
    return value


def page(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """The file of a page; another suffix than .html stands for a format that is not written."""
    if path and path.suffix.lower() not in ("", ".html", ".htm"):
        raise click.UsageError(f"{parameter.opts[0]} {path}: a page is an .html file")
    return path


def folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A folder that exists or will be made."""
    require_folder(parameter.opts[0], path)
    return path


def require_folder(option: str, path: Path | None) -> None:
    """Raise UsageError where no folder can be made at `path`, which `option` gives."""
    if path:
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not existing.is_dir():
            raise click.UsageError(f"{option} {path}: {existing} is a file: name a folder")


def stamped(before: str, after: str = "") -> Path:
    """A new path below reports/ that holds the time of now between `before` and `after`."""
    now, number = f"{datetime.now():%Y%m%d-%H%M%S}", 1
    path = Path("reports") / f"{before}{now}{after}"
    while path.exists():
        number += 1
        path = Path("reports") / f"{before}{now}-{number}{after}"
    return path


def require_cuda() -> None:
    """Raise UsageError with what to do where torch finds no CUDA device."""
    from sasa_bench.impls._nvrtc import no_device

    if reason := no_device():
        raise click.UsageError(f"--device cuda: {reason.rstrip('.')}, or use --device cpu")


def warn(sentences: Sequence[str], what: str = "", most: int = 20) -> None:
    """Print sentences to standard error, a line each; past `most` only how many there are."""
    for sentence in sentences[:most]:
        click.echo(f"sasa-bench: {what}{': ' if what else ''}{sentence}", err=True)
    if len(sentences) > most:
        click.echo(f"sasa-bench: {what}{': ' if what else ''}and {len(sentences) - most} more like these", err=True)


def write_or_print(content: bytes, out: Path | None) -> None:
    """Write to the file of --out, whole or not at all, or to standard output."""
    if out:
        from sasa_bench.results.file import replace_file

        replace_file(out, content)
    else:
        sys.stdout.buffer.write(content)
