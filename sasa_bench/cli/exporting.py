"""The verb about files for other runtimes: export."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn


@click.command()
@click.argument("source", metavar="MODEL.pt|module:factory")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The ONNX file to write.")
@click.option(
    "--shape", metavar="BxCxHxW", help="Of the images; by default one, with the channels that the model takes."
)
@click.option("--dynamic", is_flag=True, help="Leave batch, height and width open.")
@click.option("--library", is_flag=True, help="Attention as one custom operator (fastest); prints its library.")
@click.option("--trust", is_flag=True, help="Load MODEL.pt even where it can run any code.")
def export(source: str, out: Path, shape: str | None, dynamic: bool, library: bool, trust: bool) -> None:
    """Write a trained LocalAttention2d or network as ONNX, run in ONNX Runtime against the module first.

    MODEL.pt is what torch.save(module, path) wrote; module:factory is a function without arguments that returns the
    module, in an importable file such as one of this folder.
    """
    import torch

    import sasa_bench

    sys.path.insert(0, str(Path.cwd()))  # for a factory, and for classes of a saved module
    module = _from_file(Path(source), trust) if ":" not in source else _from_factory(source)
    made = sasa_bench.export(module, torch.randn(_shape(shape, module)), out, dynamic=dynamic, library=library)
    click.echo(
        f"{made.path}: {made.model_bytes} bytes, {made.node_count} nodes, attention as {made.impl}; differs from the "
        f"module by {made.max_abs_err:.1e} at most, {made.err_budget:.1e} allowed"
    )
    if made.library:
        click.echo(f"register before loading: session_options.register_custom_ops_library({made.library!r})")


def _shape(text: str | None, module: nn.Module) -> list[int]:
    if text is None:
        from sasa_bench.nn import LocalAttention2d

        return [1, module.channels, 28, 28] if isinstance(module, LocalAttention2d) else [1, 3, 224, 224]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise click.UsageError(f"--shape {text}: give batch, channels, height and width, such as 1x3x224x224")
    return [int(side) for side in text.split("x")]


def _from_factory(source: str) -> nn.Module:
    from torch import nn

    name, _, attribute = source.partition(":")
    try:
        module = getattr(importlib.import_module(name), attribute)()
    except Exception as error:
        raise click.UsageError(f"{source} gives no module: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise click.UsageError(
            f"{source} returned {type(module).__name__}: give a function that returns a torch module"
        )
    return module


def _from_file(path: Path, trust: bool) -> nn.Module:
    import torch
    from torch import nn

    from sasa_bench.nn import saved_types
    from sasa_bench.results.fields import first_line

    try:
        with torch.serialization.safe_globals(saved_types()):
            module = torch.load(path, map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise click.UsageError(
            f"{path}: {error.strerror}; give a file of torch.save(module, path), or module:factory"
        ) from None
    except Exception as error:  # whatever reading bytes that are no such file may raise
        remedy = "call sasa_bench.export in the script that made it" if trust else "add --trust if you trust it"
        raise click.UsageError(
            f"{path} is no saved module {'found here' if trust else 'of torch and sasa-bench classes only'}: "
            f"{remedy}, or give module:factory, a function that loads the weights ({first_line(error)})"
        ) from None
    if not isinstance(module, nn.Module):
        raise click.UsageError(
            f"{path} holds {type(module).__name__}, not a module: save the module, or give module:factory, a function "
            "that loads the weights"
        )
    return module
