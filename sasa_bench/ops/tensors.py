"""Tensors of a case: random inputs and parameters, the passes of each mode, projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.ops.op import Op

Tensors = dict[str, Tensor]
Call = Callable[[], Tensor]

IMAGES = ("x", "q", "k", "v")
"""Tensors [B, C, H, W], with scalars of their own for each pixel of each image; all others are parameters."""


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of the tensors of a case; float32 for tf32, which is how products of them are rounded."""
    found: torch.dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
    return found


def random_tensors(op: Op, case: Case, seed: int) -> Tensors:
    """Fresh inputs and parameters in float64 on the CPU, already rounded to the dtype of the case.

    Scales give the logits unit variance, so that the softmax is neither flat nor saturated.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(case)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).double()
        for name, (shape, scale) in op.shapes(case).items()
    }


def leaves(tensors: Tensors, case: Case, dtype: torch.dtype | None = None) -> Tensors:
    """Copies of `tensors` in the dtype of the case (or `dtype`) on its device; they need gradients unless forward.

    Those with four dimensions have the memory format of the case, as torch.nn.Module.to gives it to a model.
    """
    grad = case.mode != "forward"
    kind = dtype or dtype_of(case)
    return {
        name: arranged(t, case).to(device=case.device, dtype=kind, copy=True).requires_grad_(grad)
        for name, t in tensors.items()
    }


def arranged(tensor: Tensor, case: Case) -> Tensor:
    """`tensor` in the memory format of the case, where it has four dimensions."""
    if tensor.dim() != 4 or case.memory_format == "contiguous":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def step(case: Case, call: Call, tensors: Tensors, grad_y: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """One pass of the case's mode around the forward `call`.

    forward -> (y,); backward -> the gradient of every tensor, of a graph recorded once; training -> (y, *gradients).
    `grad_y` [B, C, H, W] is the gradient that arrives at y; None is allowed for forward only.
    """
    parameters = tuple(tensors.values())
    if case.mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (call(),)

        return forward
    if case.mode == "backward":
        y = call()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, parameters, grad_y, retain_graph=True)

        return backward

    def training() -> tuple[Tensor, ...]:
        out = call()
        return (out.detach(), *torch.autograd.grad(out, parameters, grad_y))

    return training


def output_names(case: Case, tensors: Tensors) -> list[str]:
    """The names of what `step` returns, for messages."""
    gradients = [f"gradient of {name}" for name in tensors]
    return {"forward": ["y"], "backward": gradients, "training": ["y", *gradients]}[case.mode]


def project(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, C, H, W] of a case at either scope.

    At scope "layer" w_qkv [3 C, C] projects x [B, C, H, W] after absolute embeddings, if any, were added: the row half
    of the channels gets abs_row [C // 2, H], the rest abs_col [C - C // 2, W].
    """
    if case.scope == "core":
        return tensors["q"], tensors["k"], tensors["v"]
    qkv = F.conv2d(add_absolute(case, tensors), tensors["w_qkv"][:, :, None, None])
    q, k, v = qkv.chunk(3, dim=1)
    return q, k, v


def add_absolute(case: Case, tensors: Tensors) -> Tensor:
    """x [B, C, H, W] with absolute embeddings added where the case has them."""
    x = tensors["x"]
    if case.position != "absolute":
        return x
    rows = tensors["abs_row"][:, :, None].expand(-1, -1, case.width)
    columns = tensors["abs_col"][:, None, :].expand(-1, case.height, -1)
    return x + torch.cat([rows, columns])
