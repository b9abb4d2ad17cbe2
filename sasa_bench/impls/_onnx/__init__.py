"""Export to ONNX with torch.onnx and run in ONNX Runtime: what every exported implementation shares.

The images (x, or q, k and v) are the graph's inputs. Every parameter is an initialiser, as in a file that is deployed:
ONNX Runtime may fold what depends on parameters alone and pack weights once, while the PyTorch implementations get
their parameters as tensors in every call.
"""

from __future__ import annotations

from collections.abc import Callable

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Attend, Impl, Info, layers_only
from sasa_bench.impls._onnx.export import Function, export, exported_once
from sasa_bench.impls._onnx.session import Session, load, missing, session_options, unsupported
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import Tensors, project

__all__ = [
    "Function",
    "attention_function",
    "export",
    "exported",
    "exported_attention",
    "load",
    "missing",
    "session_options",
]


def exported(
    name: str,
    summary: str,
    op: Op,
    function: Callable[[Case], Function],
    *,
    exports: str,
    dynamic: bool = False,
    computes: Callable[[Case], Case] = lambda case: case,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
) -> Impl:
    """An implementation that exports `function(case)` to ONNX and runs it in ONNX Runtime, forward only.

    `exports` names the implementation that computes the same function in PyTorch. `dynamic` leaves batch, height and
    width open in the file; else they are those of the case. `library` gives the path of the custom operators that the
    graph contains, if any.
    """

    def build(case: Case, tensors: Tensors) -> Session:
        model, figures = exported_once(name, case, tensors, lambda: export(function(case), case, tensors, dynamic))
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
        supports=able,
        missing=missing,
        computes=computes,
        info=Info(exports=exports, any_size=dynamic, library=library is not None, quick=False),
    )


def exported_attention(
    name: str,
    summary: str,
    attend: Callable[[Case], Attend],
    *,
    exports: str,
    dynamic: bool = False,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
) -> Impl:
    """Local attention exported from its core, at both scopes; see `exported`.

    With `dynamic`, the core must take its sizes from its arguments. Absolute embeddings have the size of one map, and
    there is no dynamic layer with them.
    """

    def able(case: Case) -> str | None:
        if dynamic and case.position == "absolute" and case.scope == "layer":
            return "absolute embeddings have the size of one map: there is no model of every size with them"
        return supports(case)

    return exported(
        name,
        summary,
        ops.get("local_attention"),
        lambda case: attention_function(case, attend),
        exports=exports,
        dynamic=dynamic,
        supports=able,
        missing=missing,
        library=library,
    )


def attention_function(case: Case, attend: Callable[[Case], Attend]) -> Function:
    """Projections, at scope "layer", and core."""
    core = attend(case)
    return lambda tensors: core(*project(case, tensors), tensors.get("rel_row"), tensors.get("rel_col"))
