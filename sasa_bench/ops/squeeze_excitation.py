"""Squeeze-and-excitation of Hu et al. 2018 (arXiv 1709.01507)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, image, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def squeezed(channels: int) -> int:
    """Channels in the middle of squeeze-and-excitation: C / 16, at least 1."""
    return max(1, channels // 16)


def work(case: Case) -> Work:
    """Hu et al. 2018 (arXiv 1709.01507): C P for the mean, C P for the scaling, 4 C h for each image's two matrices."""
    c, p, h = case.channels, pixels(case), squeezed(case.channels)
    return Work(2 * c * p + 4 * c * h * case.batch, 2 * c * h, c * p, c * p)


def shapes(case: Case) -> Shapes:
    c, h = case.channels, squeezed(case.channels)
    return {"x": image(case), "w_squeeze": ((h, c), 1.0), "w_excite": ((c, h), h**-0.5)}


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x sigmoid(W_excite relu(W_squeeze mean(x))), section 3 of Hu et al. 2018; no biases."""
    import torch

    x = tensors["x"]
    squeeze = torch.relu(x.flatten(2).mean(2) @ tensors["w_squeeze"].T)
    return x * torch.sigmoid(squeeze @ tensors["w_excite"].T)[:, :, None, None]


OP = Op("squeeze_excitation", shapes, work, reference)
