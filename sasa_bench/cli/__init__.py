"""The verbs of the command line. Exit status: 0 fine, 1 usage or tool error, 2 regression, 3 inconclusive.

A verb is a click command in one of the modules of GROUPS. Their heads import nothing heavy, so that `--help` is quick;
what a verb needs it imports itself.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

import click

from sasa_bench.case import UserError
from sasa_bench.cli import bisecting, exporting, gating, machine, measuring, papers, prebuilding, profiling, reading
from sasa_bench.cli.options import ERROR
from sasa_bench.results.environment import absent

GROUPS = (measuring, reading, gating, bisecting, profiling, papers, exporting, machine, prebuilding)


class _Verbs(click.Group):
    """Lists the verbs in the order of GROUPS, each with the whole first sentence of its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them to the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in self.commands.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sasa-bench")
def cli() -> None:
    """What does local self-attention cost next to a convolution, and which implementation should I use?"""


for _group in GROUPS:
    for _verb in vars(_group).values():
        if isinstance(_verb, click.Command):
            cli.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error that a user can cause is one line and exit status 1."""
    from sasa_bench.timing.process import WorkerDied

    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not in UTF-8 lacks characters that are used here.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(cli.main(None if arguments is None else list(arguments), standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.UsageError as error:
        _fail(error.format_message() + (f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""))
    except click.ClickException as error:
        _fail(error.format_message())
    except (UserError, WorkerDied) as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted")
    except BrokenPipeError:
        # Whoever read the output has read enough; what is left in the buffer must not fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ERROR)
    except OSError as error:
        _fail(_sentence(error))
    except ImportError as error:
        if (sentence := absent(error)) is None:
            raise
        _fail(sentence)


REMEDIES = {
    errno.ENOSPC: "free some space, then repeat the command (`run` with --resume)",
    errno.EDQUOT: "free some of your quota, then repeat the command (`run` with --resume)",
    errno.EROFS: "name a path on a file system that can be written to",
    errno.EACCES: "name another path, or change its permissions",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another path",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOTDIR: "name a path that goes through folders only",
}


def _sentence(error: OSError) -> str:
    said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    remedy = REMEDIES.get(error.errno or 0)
    return f"{said}; {remedy}" if remedy else said


def _fail(message: str) -> None:
    click.echo(f"sasa-bench: {message}", err=True)
    sys.exit(ERROR)
