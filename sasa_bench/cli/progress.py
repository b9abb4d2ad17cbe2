"""How far a verb is, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_S = 30.0
"""Seconds between two lines of one phase where there is no terminal."""
WIDEST = 60
"""Characters of what is being done at the end of a bar."""


class Shown:
    """What `progress` gives: `show` may be called as often as need be, and nothing appears before its first call."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        self.bar: Progress | None = None
        self.phase, self.line_at, self.done = "", 0.0, 0

    def show(self, done: int, total: int | None, phase: str, detail: str = "") -> None:
        """`done` of `total` (None: not known); `phase` in words, and what is being done in it."""
        if self.terminal:
            self._show_bar(done, total, f"{phase} {detail}".strip())
        elif phase != self.phase or done == total != self.done or time.monotonic() > self.line_at + EVERY_S:
            self.phase, self.line_at, self.done = phase, time.monotonic(), done
            counted = f"{done} of {total}" if total is not None else str(done)
            click.echo(": ".join(part for part in (counted, phase, detail) if part), err=True)

    def _show_bar(self, done: int, total: int | None, words: str) -> None:
        if self.bar is None:
            self.bar = _bar()
            self.bar.start()
            self.bar.add_task("")
        self.bar.update(self.bar.task_ids[0], total=total, completed=done, description=words[:WIDEST])

    def stop(self) -> None:
        """Leave the bar as it is and show no more of it."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def progress() -> Iterator[Shown]:
    """Shows how far something is until the block ends."""
    shown = Shown(sys.stderr.isatty())
    try:
        yield shown
    finally:
        shown.stop()


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
