"""The CUDA kernels as torch operators, on the runtime of the tensors' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import _operator
from sasa_bench.impls.cuda import launch
from sasa_bench.impls.cuda.kernels import ELEMENTS


def _run_forward(q: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(q):
        launch.run_forward(nvrtc.runtime(q.device), q, *arguments)


def _run_backward(dy: Tensor, q: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(q):
        launch.run_backward(nvrtc.runtime(q.device), dy, q, *arguments)


OPERATORS = _operator.define("cuda_local_attention", "CUDA", list(ELEMENTS), _run_forward, _run_backward)
forward, backward = OPERATORS.forward, OPERATORS.backward
forward_qkv, backward_qkv = OPERATORS.forward_qkv, OPERATORS.backward_qkv


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> Tensor:  # fmt: skip
    """Local self-attention y [B, C, H, W] on a CUDA device, differentiable once.

    Also ``torch.ops.sasa_bench.cuda_local_attention``. Runs on torch's current stream.
    ``torch.ops.sasa_bench.cuda_local_attention_qkv`` takes the whole projection [B, 3C, H, W] and gives its gradient as
    one tensor.

    Args:
        q, k, v: [B, C, H, W] in float32, float16 or bfloat16; C = heads * d, a head's channels contiguous.
        rel_row, rel_col: position embeddings [heads, d // 2, K] and [heads, d - d // 2, K], or None for both.
        kernel_size: odd window size K; it may exceed the image.
        heads: number of heads.
        zero_border: whether zero-padded positions outside the image take part in the softmax.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message states which are allowed.
        RuntimeError: this machine cannot run CUDA kernels; the message states what is missing.
        NotImplementedError: a second derivative is asked for.
    """
    return OPERATORS.attend(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)
