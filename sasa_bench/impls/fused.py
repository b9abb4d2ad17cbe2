"""`fused`: local self-attention as one native CPU kernel, compiled on this machine at first use.

The operator is eq. 2 and 4 of Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models":
softmax over the window of q.k + q.r, times v, without a 1/sqrt(d). `csrc/local_attention.h` holds the
kernels and says how they work, `csrc/fused.cpp` the torch operators `sasa_bench::fused_*` around them,
docs/fused.md what was measured.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _flops, _native, _stem, local_attention
from sasa_bench.impls._native import ISAS, Library, chosen_isa, cpu_flags

CSRC = Path(__file__).parent / "csrc"


def _library(part: str) -> Library:
    """The library of the torch operators, or of the kernels for one instruction set."""
    name = f"fused_{part}"
    if part != "operators":
        flags = ("-O3", "-fno-math-errno", f"-DSASA_ISA={part}", *ISAS[part][0])
        return Library(name, CSRC / "kernels.cpp", tuple(sorted(CSRC.glob("*.h"))), flags)
    root = Path(torch.__file__).parent
    include = root / "include"
    return Library(
        name,
        CSRC / "fused.cpp",
        (CSRC / "kernel_table.h", CSRC / "parallel.h"),
        ("-O2", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        ("-lc10", "-ltorch_cpu", "-ltorch"),
        ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"), f"-L{root / 'lib'}"),
        (torch.__version__,),
    )


def build(isas: list[str]) -> None:
    """Compiles the operators and the given builds of the kernels at once, those that are not in the cache.

    Raises RuntimeError with the compiler's words.
    """
    _native.build([_library(part) for part in ("operators", *isas)])


@cache
def _load_operators() -> None:
    torch.ops.load_library(str(_library("operators").path))
    for name, formula in (
        ("fused_local_attention", _flops.forward),
        ("fused_local_attention_forward", _flops.forward),
        ("fused_local_attention_backward", _flops.backward),
        ("fused_attention_layer", _flops.layer),
        ("fused_attention_layer_forward", _flops.layer),
        ("fused_attention_layer_backward", _flops.layer_backward),
    ):
        _flops.count(name, formula)


def load(isa: str | None = None) -> None:
    """Makes the operators usable with the kernels of `isa` (default: `chosen_isa()`), compiling them if
    needed.

    Loading another build later replaces the kernels of the whole process. Raises RuntimeError when there is
    no compiler (see `missing`) or it fails, and the errors of `chosen_isa`.
    """
    isa = isa or chosen_isa()
    build([isa])
    _load_operators()
    torch.ops.sasa_bench.fused_use_kernels(str(_library(isa).path))


def missing() -> str | None:
    """What keeps the kernel from running on this machine, with the command that would help; None if nothing
    does.

    Compiles nothing. Raises the errors of `chosen_isa`.
    """
    return _library("operators").missing() or _library(chosen_isa()).missing() or _stem.library().missing()


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """The core: q, k, v [B, C, H, W] with each head's channels contiguous -> y; differentiable once.

    float32, or bfloat16 with sums in float32.
    """
    y: Tensor = torch.ops.sasa_bench.fused_local_attention.default(
        q, k, v, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def layer(window: Window, x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
    """The whole layer: x [B, C, H, W], w_qkv [3 C, C], the rows of queries, then of keys and of values -> y.

    Where heads fill the lanes of the kernel, each task projects the rows that it needs next, in the layout that it
    computes in. Differentiable once; float32 or bfloat16.
    """
    y: Tensor = torch.ops.sasa_bench.fused_attention_layer.default(
        x, w_qkv, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the fused kernel has square windows, not {window.rows} x {window.columns}"
    return _cannot_run(x.device.type, x.dtype)


def _cannot_run(device: str, dtype: torch.dtype) -> str | None:
    if device not in ("cpu", "meta"):
        return f"the fused kernel runs on the CPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the fused kernel computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _supports(case: Case) -> str | None:
    return _cannot_run(case.device, getattr(torch, case.dtype))


def details() -> list[str]:
    """A line for each build: whether this processor runs it, whether it is compiled, which one is used."""
    chosen, lines = chosen_isa(), []
    for isa, (_, needed) in ISAS.items():
        if lacking := sorted(needed - cpu_flags()):
            state = f"not on this processor, which lacks {', '.join(lacking)}"
        else:
            built = _library("operators").is_built() and _library(isa).is_built()
            state = "compiled" if built else "compiled at first use"
        lines.append(f"build {isa}: {state}{', in use' if isa == chosen else ''}")
    return lines


IMPL = local_attention(
    "fused",
    "one native CPU kernel, compiled here at first use; no tensor with K x K entries",
    core=Core(run, layer=layer, refuses=_refuses, load=load, keeps_output=True, transforms=False, portable=False),
    stem=_stem.run,
    supports=_supports,
    missing=missing,
    details=details,
)
