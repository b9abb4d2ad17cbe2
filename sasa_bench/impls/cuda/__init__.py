"""Local self-attention in CUDA C++ (``csrc/local_attention.cu``), compiled on the user's machine for its GPU.

Computes ``y_i = sum_j softmax_j(q_i.k_j + q_i.r_{j-i}) v_j`` over a K x K window, per head, without 1/sqrt(d)
(Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019, section 3), and its
gradients, in float32, float16 and bfloat16 with float32 sums. Deterministic; no tensor with K*K entries per
pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window
from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import local_attention as attention_impl
from sasa_bench.impls._tuning import choosing_in_build
from sasa_bench.impls.cuda.kernels import ELEMENTS, Function, candidates, expression, last_sum, source
from sasa_bench.impls.cuda.operator import OPERATORS, local_attention
from sasa_bench.networks import attention_cases
from sasa_bench.ops.tensors import dtype_of


def missing() -> str | None:
    """What keeps the kernels from running on this machine and what would unlock them; None if nothing."""
    return nvrtc.missing()


def attend(case: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The operator of a case: ``(q, k, v, rel_row, rel_col) -> y``.

    Args:
        case: has `kernel_size`, `heads` and `border` (``"mask"`` or ``"zero"``).
    """
    if case.border not in ("mask", "zero"):
        raise ValueError(f"border is {case.border!r}; it must be 'mask' or 'zero'.")
    zero_border = case.border == "zero"

    def call(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        return local_attention(q, k, v, rel_row, rel_col, case.kernel_size, case.heads, zero_border)

    return call


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """The operator for tensors of every size."""
    return local_attention(q, k, v, rel_row, rel_col, window.rows, window.heads, window.border == "zero")


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the CUDA kernel has square windows, not {window.rows} x {window.columns}"
    if x.device.type not in ("cuda", "meta"):
        return f"the CUDA kernel runs on a GPU, not on {x.device.type}"
    if x.dtype not in ELEMENTS:
        return f"the CUDA kernel computes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    return None


def layer(case: Any) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The layer of a case, ``(x, w_qkv, rel_row, rel_col) -> y``, whose projection has one gradient."""
    axes = (case.kernel_size, case.heads, case.border == "zero")

    def call(x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        return OPERATORS.attend_qkv(F.conv2d(x, w_qkv[:, :, None, None]), rel_row, rel_col, *axes)

    return call


def describe() -> list[str]:
    """Lines for a person: device or what is missing, cached cubins, chosen tunables."""
    return nvrtc.describe()


def _supports(case: Case) -> str | None:
    return None if case.device == "cuda" else "the CUDA kernel needs --device cuda"


def kernels_of(case: Case) -> list[tuple[str, str]]:
    """(source, template instance) of every candidate of the kernels that a case launches, for `prebuild`."""
    found = []
    for each in attention_cases(case) if case.scope == "network" else [case]:
        dtype = dtype_of(case)
        relative = each.position == "relative"
        function = Function(dtype, each.kernel_size, each.head_dim, relative, each.border == "zero")
        names = ("forward",) if case.mode == "forward" else ("forward", "backward_queries", "backward_keys")
        for kernel in names:
            for tunables in candidates(kernel, function, each.height, each.width):
                found.append((source(), expression(kernel, function, tunables)))
        if case.mode != "forward" and relative:
            found.append((source(), last_sum(dtype, each.kernel_size, each.head_dim)))
    return found


IMPL = attention_impl(
    "cuda",
    "CUDA C++ kernels compiled by NVRTC for the GPU at hand; deterministic",
    attend,
    core=Core(run, refuses=_refuses, keeps_output=True, transforms=False, portable=False),
    layer=layer,
    supports=_supports,
    missing=missing,
    details=nvrtc.details,
)
IMPL = replace(IMPL, build=choosing_in_build(IMPL.build), info=replace(IMPL.info, kernels=kernels_of))
