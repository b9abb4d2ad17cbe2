"""torch.onnx.export of a function of tensors: its images become inputs, its parameters initialisers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from sasa_bench.case import Case
from sasa_bench.impls._onnx.graph import graph_flops, node_count, nodes_of
from sasa_bench.ops.tensors import IMAGES, Tensors
from sasa_bench.results.environment import EXPORTS
from sasa_bench.results.fields import first_line

if TYPE_CHECKING:
    import onnx

Function = Callable[[Tensors], Tensor]
"""Inputs and parameters by name -> y [B, C, H, W]."""

OPSET = 20
"""Every operator of these graphs has had its present form since then; an older runtime loads more files."""


class _Module(nn.Module):
    """`function` as a module: the images are its arguments, the rest are its parameters."""

    def __init__(self, function: Function, tensors: Tensors) -> None:
        super().__init__()
        self.function = function
        self.images = [name for name in tensors if name in IMAGES]
        self.others = [name for name in tensors if name not in IMAGES]
        for name in self.others:
            self.register_buffer(name, tensors[name].detach())

    def forward(self, *images: Tensor) -> Tensor:
        named = dict(zip(self.images, images, strict=True))
        return self.function(named | {name: self.get_buffer(name) for name in self.others})


def export(
    function: Function, case: Case, tensors: Tensors, dynamic: bool = False
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model of `function` and its figures.

    Figures: export_s, seconds of torch.onnx.export; model_bytes, size of the file; node_count of the file; and, for a
    model of one size and standard operators, graph_flops by `graph_flops`. Raises RuntimeError where the export fails.
    """
    module = _Module(function, tensors).eval()
    images = tuple(tensors[name] for name in module.images)
    shapes = None
    if dynamic:
        # A dimension of 1, or two of one size, would be taken for constants; any other example gives the same graph.
        images = tuple(torch.zeros(3, case.channels, 9, 11, dtype=t.dtype, device=t.device) for t in images)
        axes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        shapes = (tuple(axes for _ in images),)
    started = time.perf_counter()
    names = {"input_names": module.images, "output_names": ["y"]}
    model = program(module, images, dynamic_shapes=shapes, **names).model_proto
    figures: dict[str, Any] = {"export_s": time.perf_counter() - started}
    figures["model_bytes"] = model.ByteSize()
    figures["node_count"] = node_count(model.graph)
    if not dynamic and all(node.domain in ("", "ai.onnx") for node in nodes_of(model.graph)):
        figures["graph_flops"] = graph_flops(model)
    return model, figures


def program(module: nn.Module, images: tuple[Tensor, ...], **options: Any) -> torch.onnx.ONNXProgram:
    """torch.onnx.export of a module with these images. Raises RuntimeError with the cause where it fails."""
    # It logs a line for each operator of torchvision when that is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            with _translations_kept():
                made = torch.onnx.export(module, images, dynamo=True, opset_version=OPSET, verbose=False, **options)
        except torch.onnx.OnnxExporterError as error:
            cause = first_line(error.__cause__ or error)
            raise RuntimeError(f"torch.onnx.export failed, torch {torch.__version__}: {cause}") from error
    assert made is not None
    return made


@cache
def _translations() -> tuple[Any, Callable[..., Any]] | None:
    """The class of torch's table of translations and what makes one, once for each opset; None where torch differs."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        return ONNXRegistry, cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def _translations_kept() -> Iterator[None]:
    """torch.onnx.export makes its table again each time, which takes longer than a small graph: here one is kept."""
    if (found := _translations()) is None:
        yield
        return
    registry, kept = found
    with mock.patch.object(registry, "from_torchlib", staticmethod(kept)):
        yield


def exported_once(
    name: str, case: Case, tensors: Tensors, make: Callable[[], tuple[onnx.ModelProto, dict[str, Any]]]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """What `make` gives, or what it gave a process that shares the folder EXPORTS, for the same case and parameters."""
    folder = os.environ.get(EXPORTS)
    if not folder:
        return make()
    import onnx

    contents = hashlib.sha256(repr((name, case, torch.__version__, onnx.__version__)).encode())
    for key, tensor in tensors.items():
        if key not in IMAGES:
            contents.update(key.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    path = Path(folder) / f"{name}-{contents.hexdigest()[:16]}.onnx"
    figures = path.with_suffix(".json")
    if figures.exists():
        return onnx.load(path), json.loads(figures.read_text(encoding="utf-8"))
    model, found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, model.SerializeToString()), (figures, json.dumps(found).encode())):
        scratch = target.with_name(f"{os.getpid()}-{target.name}")
        scratch.write_bytes(content)
        scratch.replace(target)
    return model, found
