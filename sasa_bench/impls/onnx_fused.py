"""`onnx_fused`: the native CPU kernel as one node of a graph in ONNX Runtime.

csrc/onnx_operator.h wraps the forward pass of `fused` through the runtime's custom-operator interface, in the library
that holds that pass: sasa_bench::LocalAttention takes q, k and v, sasa_bench::LocalAttentionLayer x and the weights. It
is compiled on this machine, for its processor, at first use. A file that contains one of them needs that library
wherever it runs: `session_options.register_custom_ops_library(path)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _attention, _native, _onnx, attends
from sasa_bench.impls._native import Library


def missing() -> str | None:
    """None, or what it takes to compile the operator and is not here."""
    if absent := _onnx.missing():
        return absent
    return _library().missing() if _attention.onnx_headers() else _attention.no_onnx_headers()


def _library() -> Library:
    return _attention.kernels(_native.chosen_isa())[0]


@cache
def library() -> str:
    """The path of the compiled operator. Raises RuntimeError with the compiler's words."""
    if _attention.onnx_headers() is None:
        raise RuntimeError(_attention.no_onnx_headers())
    return str(_library().build())


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """One node, for maps of every size."""
    return _node("LocalAttention", window, [q, k, v], rel_row, rel_col, q.shape)


def layer(window: Window, x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
    """Projections and attention as one node, for maps of every size; its weights are packed when a session is made."""
    shape = (x.shape[0], w_qkv.shape[0] // 3, x.shape[2], x.shape[3])
    return _node("LocalAttentionLayer", window, [x, w_qkv], rel_row, rel_col, shape)


def _node(
    name: str,
    window: Window,
    inputs: list[Tensor],
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    attributes: dict[str, Any] = {
        "kernel_size": window.rows,
        "heads": window.heads,
        "zero_border": int(window.border == "zero"),
    }
    relative = [rel_row, rel_col] if rel_row is not None and rel_col is not None else []
    node = torch.onnx.ops.symbolic(
        f"sasa_bench::{name}", [*inputs, *relative], attributes, dtype=inputs[0].dtype, shape=shape, version=1
    )
    assert isinstance(node, Tensor)
    return node


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the operator has square windows, not {window.rows} x {window.columns}"
    return None if x.dtype == torch.float32 else "the operator computes float32 only"


CORE = Core(run, layer=layer, refuses=_refuses, portable=False)


def _supports(case: Case) -> str | None:
    if case.device != "cpu":
        return "the operator runs on the CPU only"
    if case.dtype != "float32":
        return f"the operator computes float32 only, not {case.dtype}"
    return None


IMPL = _onnx.exported_attention(
    "onnx_fused",
    "the native CPU kernel as one node in ONNX Runtime",
    CORE,
    exports="fused",
    supports=_supports,
    missing=missing,
    library=library,
    native=lambda case: [_library()] if attends(case) and _attention.onnx_headers() else [],
)
