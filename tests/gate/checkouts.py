"""Tiny cases, and copies of the package with an edit, for gates that run for real."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import sasa_bench
from sasa_bench.case import Case
from sasa_bench.gate.pairs import Point

PACKAGE = Path(sasa_bench.__file__).parent
TINY = Case(channels=8, heads=2, kernel_size=3, resolution=6, batch=1, threads=1)
POINTS = [Point(impl, TINY.with_(kernel_size=k)) for impl in ("unfold", "conv3x3") for k in (3, 5)]
SIZES = "    batch, channels, height, width = sizes(q)\n"
"""A line of `unfold` that every call passes."""


def checkout(folder: Path, edit: Callable[[Path], None] = lambda package: None) -> Path:
    """A copy of the package, edited."""
    shutil.copytree(PACKAGE, folder / "sasa_bench", ignore=shutil.ignore_patterns("__pycache__"))
    edit(folder / "sasa_bench")
    return folder


def substitute(file: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(package: Path) -> None:
        text = (package / file).read_text()
        assert old in text, file
        (package / file).write_text(text.replace(old, new))

    return edit
