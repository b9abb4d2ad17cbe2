"""The verbs: each is short, is found by being in a module of a group, and costs nothing until it is called."""

from __future__ import annotations

import inspect
import subprocess
import sys

import click
import pytest

from sasa_bench.cli import GROUPS, cli

HEAVY = ("torch", "pandas", "matplotlib", "altair", "scipy", "rich", "onnx")
CONTRACT = {"list", "run", "table", "report", "gate", "aa", "profile", "paper", "doctor"}


def body(verb: click.Command) -> list[str]:
    """The lines of a verb's function without its decorators."""
    assert verb.callback is not None
    lines = inspect.getsource(verb.callback).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("def ")) :]


@pytest.mark.parametrize("verb", cli.commands.values(), ids=list(cli.commands))
def test_the_function_of_a_verb_is_shorter_than_thirty_lines(verb: click.Command) -> None:
    assert len(body(verb)) < 30


def test_every_command_of_a_group_is_a_verb() -> None:
    found = {c.name for group in GROUPS for c in vars(group).values() if isinstance(c, click.Command)}
    assert found == set(cli.commands)
    assert found >= CONTRACT


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sasa_bench.cli import cli; cli.main(['--help'], standalone_mode=False); "
        f"sys.exit(' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
