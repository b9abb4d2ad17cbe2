"""The native kernels of local attention: which libraries a build has, for `fused` in torch and for ONNX Runtime.

Where there are headers of ONNX Runtime's C++ interface, the forward pass is a library of custom operators, too. They
come with its sources and not with its Python package. ONNXRUNTIME_INCLUDE_DIR names their folder; without it they are
looked for in Debian's libonnxruntime-dev and in the Python package amd-quark, which contains them. An older header
serves a newer runtime: the interface is versioned.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from sasa_bench.impls._native import ISAS, Library

CSRC = Path(__file__).parent / "csrc"
SHARED_HEADERS = ("kernel_table", "vectors", "layout", "phases")
ATTENTION_HEADERS = ("windows", "task", "local_attention")
HEADERS = {
    "forward": (*ATTENTION_HEADERS, "forward_block", "forward", "onnx_operator", "packing", "products", "qkv"),
    "backward": (*ATTENTION_HEADERS, "backward_block", "backward"),
    "products": ("products", "packing", "products16", "amx"),
}
ATTENTION = {"avx512_amx": "avx512_wide", "avx512_bf16": "avx512"}
"""Builds that share all but the products of matrices with another one."""

HEADER = "onnxruntime_cxx_api.h"
SYSTEM_FOLDERS = ("/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session", "/usr/local/include/onnxruntime")
HEADER_PACKAGE = "amd-quark"
OLDEST_INTERFACE = 16
"""Operators have had the present form of their interface since then (ONNX Runtime 1.16)."""


def kernels(isa: str, timed: bool = False) -> list[Library]:
    """The libraries of one build: forward pass, backward pass and products of matrices; `timed`: with clocks, for
    profiles."""
    attention = ATTENTION.get(isa, isa)
    return [
        _library("forward", attention, timed, None if timed else onnx_headers()),
        _library("backward", attention, timed),
        _library("products", isa, timed),
    ]


def _library(kind: str, isa: str, timed: bool, onnx: Path | None = None) -> Library:
    headers = tuple(CSRC / f"{name}.h" for name in (*SHARED_HEADERS, *HEADERS[kind]))
    flags = ("-O3", "-fno-math-errno", f"-DSASA_ISA={isa}", *ISAS[isa][0])
    flags += ("-DSASA_PHASES",) if timed else ()
    flags += ("-DSASA_ONNX", f"-I{onnx}") if onnx else ()
    name = f"fused_{kind}_{isa}{'_timed' if timed else ''}"
    return Library(name, CSRC / f"{kind}.cpp", headers, flags, versions=(str(_interface(onnx)),) if onnx else ())


def onnx_headers() -> Path | None:
    """The folder with the headers of ONNX Runtime's C++ interface, or None.

    ONNXRUNTIME_INCLUDE_DIR, where it is set, is the only place searched.
    """
    named = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    folders = [Path(named)] if named else [*map(Path, SYSTEM_FOLDERS), *_of_package(HEADER_PACKAGE)]
    return next((folder for folder in folders if _interface(folder) >= OLDEST_INTERFACE), None)


def no_onnx_headers() -> str:
    """What to do where `onnx_headers` finds none, as a sentence."""
    if named := os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
        return (
            f"ONNXRUNTIME_INCLUDE_DIR={named} has no {HEADER} of ONNX Runtime 1.{OLDEST_INTERFACE} or newer: give the "
            "folder that has it, or unset it"
        )
    return (
        f"no {HEADER}: pip install --no-deps {HEADER_PACKAGE}, whose wheel has it, or set ONNXRUNTIME_INCLUDE_DIR "
        "to the folder that has it"
    )


@cache
def _of_package(name: str) -> list[Path]:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).parent for file in files if file.name == HEADER][:1]


@cache
def _interface(folder: Path) -> int:
    """The version of the interface that the headers of a folder declare; 0 where there are none."""
    if not (folder / HEADER).is_file():
        return 0
    try:
        text = (folder / "onnxruntime_c_api.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"#define\s+ORT_API_VERSION\s+(\d+)", text)
    return int(found[1]) if found else 0
