"""The CUDA kernels as torch operators: checks of arguments, fake tensors, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda.kernels import ELEMENTS
from sasa_bench.impls.cuda.launch import run_backward, run_forward


def _check(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int,
) -> None:  # fmt: skip
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [batch, channels, height, width].")
    if q.dtype not in ELEMENTS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ELEMENTS)
        raise ValueError(f"q is {q.dtype}; the CUDA kernels take {allowed}: convert the inputs.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and at least 1.")
    if heads < 1 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} channels do not divide into {heads} heads: choose a divisor.")
    width = q.shape[1] // heads
    shapes = {"k": (k, tuple(q.shape)), "v": (v, tuple(q.shape))}
    if (rel_row is None) != (rel_col is None):
        raise ValueError("only one of rel_row and rel_col is given: pass both, or None for both.")
    if rel_row is not None and rel_col is not None:
        shapes["rel_row"] = (rel_row, (heads, width // 2, kernel_size))
        shapes["rel_col"] = (rel_col, (heads, width - width // 2, kernel_size))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; next to this q it must be {shape}.")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: make them match."
            )
    if max(width, kernel_size) * q.shape[2] * q.shape[3] >= 2**31:
        raise ValueError(f"a head of {width} x {q.shape[2]} x {q.shape[3]} has 2^31 elements or more: split the image.")


def _contiguous(*tensors: Tensor | None) -> Iterator[Any]:
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


@torch.library.custom_op("sasa_bench::cuda_local_attention_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`cuda_local_attention`, and the base-2 logarithm of the softmax's denominator [B, heads, H, W]."""
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    q, k, v, rel_row, rel_col = _contiguous(q, k, v, rel_row, rel_col)
    with torch.cuda.device_of(q):
        runtime = nvrtc.runtime(q.device)
        return run_forward(runtime, q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)


@forward.register_fake
def _(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    batch, _, height, width = q.shape
    log2_sum = q.new_empty((batch, heads, height, width), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), log2_sum


@torch.library.custom_op("sasa_bench::cuda_local_attention_backward", mutates_args=())
def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor,
    log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, rel_row and rel_col from that of y; the last two are empty without positions."""
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    dy, q, k, v, rel_row, rel_col, y = _contiguous(dy, q, k, v, rel_row, rel_col, y)
    axes = (kernel_size, heads, zero_border)
    with torch.cuda.device_of(q):
        runtime = nvrtc.runtime(q.device)
        return run_backward(runtime, dy, q, k, v, rel_row, rel_col, y, log2_sum.contiguous(), *axes)


@backward.register_fake
def _(dy, q, k, v, rel_row, rel_col, y, log2_sum, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
    def like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return q.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(rel_row), like(rel_col)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rel_row, rel_col, ctx.kernel_size, ctx.heads, ctx.zero_border = inputs
    y, log2_sum = output
    ctx.mark_non_differentiable(log2_sum)
    ctx.save_for_backward(q, k, v, rel_row, rel_col, y, log2_sum)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, rel_row, rel_col, y, log2_sum = ctx.saved_tensors
    dq, dk, dv, drel_row, drel_col = backward(
        dy, q, k, v, rel_row, rel_col, y, log2_sum, ctx.kernel_size, ctx.heads, ctx.zero_border
    )
    if rel_row is None:
        return dq, dk, dv, None, None, None, None, None
    return dq, dk, dv, drel_row, drel_col, None, None, None


def _no_second_gradient(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "cuda_local_attention has no second derivative: call backward without create_graph, or use another "
        "implementation of local attention for double backward."
    )


forward.register_autograd(_gradients, setup_context=_save)
backward.register_autograd(_no_second_gradient)

_library = torch.library.Library("sasa_bench", "FRAGMENT")
_library.define(
    "cuda_local_attention(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
    "int kernel_size, int heads, bool zero_border) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> Tensor:  # fmt: skip
    """Local self-attention y [B, C, H, W] on a CUDA device, differentiable once.

    Also ``torch.ops.sasa_bench.cuda_local_attention``. Runs on torch's current stream.

    Args:
        q, k, v: [B, C, H, W] in float32, float16 or bfloat16; C = heads * d, a head's channels contiguous.
        rel_row, rel_col: position embeddings [heads, d // 2, K] and [heads, d - d // 2, K], or None for both.
        kernel_size: odd window size K; it may exceed the image.
        heads: number of heads.
        zero_border: whether zero-padded positions outside the image take part in the softmax.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message says which are allowed.
        RuntimeError: this machine cannot run CUDA kernels; the message says what is missing.
        NotImplementedError: a second derivative is asked for.
    """
    return forward(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)[0]


_library.impl("cuda_local_attention", local_attention, "CompositeImplicitAutograd")
