"""`onnx_fused`: the native CPU kernel as one node of a graph in ONNX Runtime.

csrc/onnx_fused.cpp wraps the kernels of csrc/local_attention.h as the operator sasa_bench::LocalAttention through the
runtime's custom-operator interface. It is compiled on this machine, for its processor, at first use. A file that
contains the operator needs that library wherever it runs: `session_options.register_custom_ops_library(path)`.

The interface is declared in headers that come with the sources of ONNX Runtime and not with its Python package.
ONNXRUNTIME_INCLUDE_DIR names their folder; without it they are looked for in Debian's libonnxruntime-dev and in the
Python package amd-quark, which contains them. An older header serves a newer runtime: the interface is versioned.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _native, _onnx

CSRC = Path(__file__).parent / "csrc"
SOURCE = CSRC / "onnx_fused.cpp"
HEADER = "onnxruntime_cxx_api.h"
SYSTEM_FOLDERS = ("/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session", "/usr/local/include/onnxruntime")
HEADER_PACKAGE = "amd-quark"


def header_folder() -> Path | None:
    """The folder with the headers of ONNX Runtime's C++ interface, or None.

    ONNXRUNTIME_INCLUDE_DIR, where it is set, is the only place searched.
    """
    if named := os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
        return Path(named) if (Path(named) / HEADER).is_file() else None
    for folder in map(Path, SYSTEM_FOLDERS):
        if (folder / HEADER).is_file():
            return folder
    try:
        files = metadata.files(HEADER_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == HEADER]
    return found[0].parent if found and found[0].is_file() else None


def missing() -> str | None:
    """None, or what it takes to compile the operator and is not here."""
    if absent := _onnx.missing():
        return absent
    headers = header_folder()
    if headers is None:
        if named := os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
            return f"ONNXRUNTIME_INCLUDE_DIR={named} has no {HEADER}: give the folder that has it, or unset it"
        return (
            f"no {HEADER}: pip install --no-deps {HEADER_PACKAGE}, whose wheel has it, or set ONNXRUNTIME_INCLUDE_DIR "
            "to the folder that has it"
        )
    return _library(headers).missing()


def _library(headers: Path) -> _native.Library:
    # Not -march=native, which made it slower.
    flags = ("-O3", "-fno-math-errno", *_native.ISAS[_native.chosen_isa()][0], f"-I{headers}", f"-I{CSRC}")
    return _native.Library("onnx_fused", SOURCE, tuple(sorted(CSRC.glob("*.h"))), flags)


@cache
def library() -> str:
    """The path of the compiled operator. Raises RuntimeError with the compiler's words."""
    headers = header_folder()
    if headers is None:
        raise RuntimeError(str(missing()))
    return str(_library(headers).build())


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """One node, for maps of every size."""
    attributes: dict[str, Any] = {
        "kernel_size": window.rows,
        "heads": window.heads,
        "zero_border": int(window.border == "zero"),
    }
    inputs = [q, k, v] + ([rel_row, rel_col] if rel_row is not None and rel_col is not None else [])
    node = torch.onnx.ops.symbolic(
        "sasa_bench::LocalAttention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=1
    )
    assert isinstance(node, Tensor)
    return node


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the operator has square windows, not {window.rows} x {window.columns}"
    return None if x.dtype == torch.float32 else "the operator computes float32 only"


CORE = Core(run, refuses=_refuses, portable=False)


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
    native=lambda: [_library(headers)] if (headers := header_folder()) else [],
)
