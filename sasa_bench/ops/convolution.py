"""A K x K convolution, dense or depthwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, also_in_networks, in_windows, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def work(case: Case) -> Work:
    """2 K^2 C^2 P; parameters K^2 C^2; stride 1, same padding, no bias. Needed are the products inside the image."""
    c, p, k = case.channels, pixels(case), case.kernel_size
    return Work(2 * k * k * c * c * p, k * k * c * c, c * p, c * p, 2 * c * c * case.batch * in_windows(case))


def depthwise_work(case: Case) -> Work:
    """2 K^2 C P; parameters K^2 C: each channel is convolved with its own window."""
    c, p, k = case.channels, pixels(case), case.kernel_size
    return Work(2 * k * k * c * p, k * k * c, c * p, c * p, 2 * c * case.batch * in_windows(case))


def shapes(case: Case, groups: int = 1) -> Shapes:
    fan_in, k = case.channels // groups, case.kernel_size
    return {
        "x": ((case.batch, case.channels, case.height, case.width), 1.0),
        "weight": ((case.channels, fan_in, k, k), (fan_in * k * k) ** -0.5),
    }


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over (a, b) in the window of W_ab x_{i+a,j+b}, one window offset at a time; zero padding."""
    import torch
    from torch.nn import functional as F

    x, weight = tensors["x"], tensors["weight"]
    padded = F.pad(x, (case.radius,) * 4)
    y = torch.zeros_like(x)
    for a in range(case.kernel_size):
        for b in range(case.kernel_size):
            shifted = padded[:, :, a : a + case.height, b : b + case.width]
            if weight.shape[1] == 1 and case.channels > 1:
                y = y + weight[:, 0, a, b][:, None, None] * shifted
            else:
                y = y + torch.einsum("oc,nchw->nohw", weight[:, :, a, b], shifted)
    return y


OP = also_in_networks(Op("convolution", shapes, work, reference))
DEPTHWISE = Op("depthwise_convolution", lambda case: shapes(case, case.channels), depthwise_work, reference)
