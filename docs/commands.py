"""The page of the commands, from their help, and of the environment variables that sasa-bench reads."""

from __future__ import annotations

import click

from sasa_bench.cli import cli
from sasa_bench.results.environment import READ

WIDTH = 100
"""Characters of a line."""


def page() -> str:
    """Markdown."""
    whole = click.Context(cli, info_name="sasa-bench", terminal_width=WIDTH)
    parts = ["# Commands\n", "Exit status: 0 fine, 1 usage or tool error; a command with other ones lists them.\n"]
    for name in cli.list_commands(whole):
        verb = cli.commands[name]
        shown = verb.get_help(click.Context(verb, parent=whole, info_name=name, terminal_width=WIDTH))
        parts.append(f"## {name}\n\n```text\n{shown}\n```\n")
    parts.append("## Environment variables\n\n| variable | for |\n|---|---|")
    parts += [f"| `{variable}` | {purpose} |" for variable, purpose in READ.items()]
    return "\n".join(parts) + "\n"
