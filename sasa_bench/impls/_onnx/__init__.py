"""Export to ONNX with torch.onnx and run in ONNX Runtime: what every exported implementation shares.

The images (x, or q, k and v) are the graph's inputs. Every parameter is an initialiser, as in a file that is deployed:
ONNX Runtime may fold what depends on parameters alone and pack weights once, while the PyTorch implementations get
their parameters as tensors in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Core, Exported, Impl, Info, Window, attend_with, layers_only, no_libraries
from sasa_bench.impls._native import Library
from sasa_bench.impls._onnx.export import Function, export, exported_once, program
from sasa_bench.impls._onnx.graph import node_count
from sasa_bench.impls._onnx.session import Session, load, missing, session_options, unsupported
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import Tensors, add_absolute, project

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Function",
    "attention_function",
    "export",
    "exported",
    "exported_attention",
    "load",
    "missing",
    "node_count",
    "program",
    "session_options",
]


def exported(
    name: str,
    summary: str,
    op: Op,
    function: Callable[[Case], Function],
    *,
    exports: str,
    exported_core: Exported | None = None,
    dynamic: bool = False,
    computes: Callable[[Case], Case] = lambda case: case,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
    native: Callable[[Case], Sequence[Library]] = no_libraries,
) -> Impl:
    """An implementation that exports `function(case)` to ONNX and runs it in ONNX Runtime, forward only.

    `exports` names the implementation that computes the same function in PyTorch. `dynamic` leaves batch, height and
    width open in the file; else they are those of the case. `library` gives the path of the custom operators that the
    graph contains, if any, and `native` what is compiled for it.
    """

    def model_of(case: Case, tensors: Tensors) -> tuple[onnx.ModelProto, dict[str, Any]]:
        return exported_once(name, case, tensors, lambda: export(function(case), case, tensors, dynamic))

    def build(case: Case, tensors: Tensors) -> Session:
        model, figures = model_of(case, tensors)
        return load(name, model, case, tensors, figures, library() if library else None)

    def able(case: Case) -> str | None:
        if reason := layers_only(case):
            return reason
        if case.mode != "forward":
            return "ONNX Runtime runs the forward pass only"
        if case.memory_format != "contiguous":
            return "ONNX Runtime takes images as contiguous [B, C, H, W] only"
        return supports(case) or unsupported(case)

    return Impl(
        name=name,
        op=op,
        summary=summary,
        build=build,
        ahead=model_of,
        supports=able,
        missing=missing,
        computes=computes,
        exported=exported_core,
        info=Info(exports=exports, any_size=dynamic, library=library is not None, quick=False, native=native),
    )


def exported_attention(
    name: str,
    summary: str,
    core: Core,
    *,
    exports: str,
    dynamic: bool = False,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
    native: Callable[[Case], Sequence[Library]] = no_libraries,
) -> Impl:
    """Local attention exported from its core, at both scopes; see `exported`.

    Absolute embeddings have the size of one map, and there is no dynamic layer with them.
    """

    def able(case: Case) -> str | None:
        if dynamic and case.position == "absolute" and case.scope == "layer":
            return "absolute embeddings have the size of one map: there is no model of every size with them"
        return supports(case)

    return exported(
        name,
        summary,
        ops.get("local_attention"),
        lambda case: attention_function(case, core, dynamic),
        exported_core=Exported(core, library),
        exports=exports,
        dynamic=dynamic,
        supports=able,
        missing=missing,
        library=library,
        native=native,
    )


def attention_function(case: Case, core: Core, dynamic: bool = False) -> Function:
    """Projections, at scope "layer", and core; with `dynamic` its tables are part of the graph."""
    window = Window.of(case)
    attended = attend_with(core)(case)

    def function(tensors: Tensors) -> Tensor:
        rel_row, rel_col = tensors.get("rel_row"), tensors.get("rel_col")
        if case.scope == "layer" and core.layer is not None:
            return core.layer(window, add_absolute(case, tensors), tensors["w_qkv"], rel_row, rel_col)
        q, k, v = project(case, tensors)
        if not dynamic:
            return attended(q, k, v, rel_row, rel_col)
        tables = core.tables and core.tables(window, q.shape[2], q.shape[3], q)
        return core.run(window, tables, q, k, v, rel_row, rel_col)

    return function
