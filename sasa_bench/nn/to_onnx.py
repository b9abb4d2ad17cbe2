"""A trained layer or network as an ONNX file, run in ONNX Runtime against the module before it is called done."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sasa_bench import impls
from sasa_bench.case import UserError
from sasa_bench.impls import Impl, Window, _onnx
from sasa_bench.networks.stem import Stem
from sasa_bench.nn.choice import AUTO, exporters
from sasa_bench.nn.layer import LocalAttention2d
from sasa_bench.results.fields import first_line

if TYPE_CHECKING:
    import onnxruntime

BUDGET_FACTOR = 8.0
"""How many times the float32 error of the module itself the file may be off, as in the check before timing."""

DTYPES = (torch.float32, torch.float16)


class ExportError(UserError):
    """A module that cannot be exported, or whose file does not compute what it does; no file is written."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    path         the ONNX file
    impl         whose formulation of the attention it holds, by name
    node_count   nodes of the graph
    model_bytes  size of the file
    max_abs_err  largest error of any output in ONNX Runtime, against the module in float64
    err_budget   what that error may be: 8 times that of the module itself, or 8 roundings of the largest output
    library      the library of custom operators that must be registered to load it, or ""
    """

    path: Path
    impl: str
    node_count: int
    model_bytes: int
    max_abs_err: float
    err_budget: float
    library: str


def export(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    dynamic: bool = False,
    library: bool = False,
) -> Exported:
    """Write `module`, in evaluation mode, as an ONNX file, with its attention in the formulation that runs best there.

    The file is first run in ONNX Runtime and compared with the module in float64; it is written only if it agrees.

    module   a LocalAttention2d, a `network`, or any module that contains them, whatever their `impl`; left as it is
    example  images [B, C, H, W] as the module takes them, float32 or float16 on the CPU
    dynamic  leave batch, height and width open; else the file takes images of the example's size only
    library  write the attention as one custom operator, the fastest; whoever loads the file registers
             Exported.library with `session_options.register_custom_ops_library`

    Raises ExportError for a module or an example that cannot be exported, for a package that is not installed, and for
    a file that does not agree with the module.
    """
    given = (example,) if isinstance(example, Tensor) else tuple(example)
    images = tuple(image.detach() if isinstance(image, Tensor) else image for image in given)
    layers = [layer for layer in module.modules() if isinstance(layer, LocalAttention2d)]
    _check(module, images, layers)
    impl = _formulation(layers, library)
    assert impl.exported is not None
    path = Path(path)
    try:
        twin = _with_formulation(module, impl, images)
    except (RuntimeError, ValueError) as failure:
        raise ExportError(
            f"{type(module).__name__} does not run on the example: {first_line(failure)}; give images of its channels, "
            "in the dtype of its parameters"
        ) from failure
    shapes = _open(images) if dynamic else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        try:
            program = _onnx.program(twin, _asymmetric(images) if dynamic else images, dynamic_shapes=shapes)
        except RuntimeError as failure:
            raise ExportError(str(failure)) from failure
        program.save(str(file))
        operators = impl.exported.library() if impl.exported.library else ""
        sized = [images, *([_larger(images)] if dynamic else [])]
        errors = [_error(module, file, given, operators) for given in sized]
        error, budget = max(errors, key=_share)
        if not error <= budget:
            raise ExportError(
                f"{path.name} would differ from the module by {error:.2e} where {budget:.2e} is allowed: not written"
            )
        for made in Path(scratch).iterdir():
            made.replace(path.parent / made.name)
    nodes = _onnx.node_count(program.model_proto.graph)
    return Exported(path, impl.name, nodes, path.stat().st_size, error, budget, operators)


def _check(module: nn.Module, images: tuple[Tensor, ...], layers: list[LocalAttention2d]) -> None:
    if reason := _onnx.missing():
        raise ExportError(reason)
    if not layers:
        raise ExportError(f"{type(module).__name__} contains no LocalAttention2d: torch.onnx.export suits it")
    for image in images:
        if not isinstance(image, Tensor):
            raise ExportError(f"an example is a {type(image).__name__}: give tensors [B, C, H, W]")
        if image.dim() != 4 or image.dtype not in DTYPES or image.device.type != "cpu":
            raise ExportError(
                f"an example is {list(image.shape)}, {image.dtype} on {image.device}: give images "
                "[B, C, H, W], float32 or float16 on the CPU"
            )


def _formulation(layers: list[LocalAttention2d], library: bool) -> Impl:
    """The first formulation in the order of choice.csv that takes the windows of the layers."""
    reasons = []
    for name in exporters(library):
        impl = impls.get(name)
        assert impl.exported is not None
        reason = impl.missing()
        for layer in layers:
            reason = reason or impl.exported.core.refuses(
                layer.window, layer.w_qkv[None, None], layer.rel_row is not None
            )
        if not reason:
            return impl
        reasons.append(f"{name}: {reason}")
    raise ExportError("; ".join(reasons))


def _with_formulation(module: nn.Module, impl: Impl, images: tuple[Tensor, ...]) -> nn.Module:
    """A copy of the module whose attention runs `impl`, with the tables of the example's size as constants."""
    assert impl.exported is not None
    core, make = impl.exported.core, impl.exported.core.tables
    known: dict[tuple[Window, int, int], Any] = {}

    def tables(window: Window, height: int, width: int, like: Tensor) -> Any:
        assert make is not None
        # Numbers that are not plain belong to a trace with open sizes.
        if type(height) is not int or type(width) is not int:
            return make(window, height, width, like)
        key = window, height, width
        if key not in known:
            known[key] = make(window, height, width, like)
        return known[key]

    if make is not None:
        core = replace(core, tables=tables)
    twin = _by_any(copy.deepcopy(module).eval())
    for layer in twin.modules():
        if isinstance(layer, LocalAttention2d):
            layer._forced = replace(impl, core=core)
    if core.portable:
        with torch.no_grad():
            twin(*images)
    return twin


def _open(images: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC) for _ in images)


def _asymmetric(images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Images like these for a trace: a size of 1, or two that are equal, would be taken for constants.

    Odd sizes, because a stem traced at multiples of its blocks does not fill other sizes up.
    """
    height, width = (max(size, 9) | 1 for size in images[0].shape[2:])
    width += 4 if height == width else 0
    return tuple(torch.zeros(3, image.shape[1], height, width, dtype=image.dtype) for image in images)


def _larger(images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random images of another batch, height and width."""
    batch, _, height, width = images[0].shape
    return tuple(torch.randn(batch + 1, i.shape[1], height + 5, width + 2).to(i.dtype) for i in images)


def _share(pair: tuple[float, float]) -> float:
    """Error over budget; infinite for a NaN. Outputs that are 0 have a budget of 0."""
    error, budget = pair
    if error <= budget:
        return error / budget if budget else 0.0
    return error / budget if budget and not math.isnan(error) else math.inf


def _error(module: nn.Module, file: Path, images: tuple[Tensor, ...], library: str) -> tuple[float, float]:
    """The largest error of the file's outputs, and its budget."""
    exact_module = _by_any(copy.deepcopy(module).double().eval())
    plain_module = copy.deepcopy(module).eval()
    with torch.no_grad():
        exact = _tensors(exact_module(*(image.double() for image in images)))
        try:
            plain = _tensors(plain_module(*images))
        except RuntimeError:  # its implementation needs a GPU, or a package that is not here
            plain = _tensors(_by_any(plain_module)(*images))
    found = _run(file, images, library)
    rounding = torch.finfo(images[0].dtype).eps * _largest(exact)
    error = _largest([f.double() - e for f, e in zip(found, exact, strict=True)])
    own = _largest([p.double() - e for p, e in zip(plain, exact, strict=True)])
    return error, BUDGET_FACTOR * max(own, rounding)


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude in any of them; NaN where one has a NaN."""
    return torch.stack([t.abs().max() for t in tensors]).max().item()


def _by_any(module: nn.Module) -> nn.Module:
    """The module, with attention and stems by what can run here."""
    for part in module.modules():
        if isinstance(part, LocalAttention2d):
            part.impl = AUTO
        elif isinstance(part, Stem):
            part.kernel = None
    return module


def _run(file: Path, images: tuple[Tensor, ...], library: str) -> list[Tensor]:
    import onnxruntime

    options: onnxruntime.SessionOptions = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {given.name: image.numpy() for given, image in zip(session.get_inputs(), images, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def _tensors(outputs: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
