"""The command line in this process, for tests of its verbs."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from sasa_bench.cli import main

SUITE = """
title = "A test?"
impls = ["unfold", "blocked", "conv3x3"]
[axes]
kernel_size = [3, 5]
[fixed]
channels = 8
heads = 2
resolution = 6
threads = 1
"""
QUICK = ["--budget", "0.01"]


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


def sasa_bench(*arguments: object) -> Ran:
    """The command line in this process: its exit status and what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out.flush()
    assert isinstance(out.buffer, io.BytesIO)
    return Ran(int(stop.value.code or 0), out.buffer.getvalue().decode(), err.getvalue())


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b'"kind": "row"') >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"{path} never had {count} rows")
