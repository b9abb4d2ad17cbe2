"""The non-local block of Wang et al. 2018 (arXiv 1711.07971)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, image, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def halved(channels: int) -> int:
    """Channels of the embeddings of a non-local block: C / 2, at least 1."""
    return max(1, channels // 2)


def work(case: Case) -> Work:
    """Wang et al. 2018 (arXiv 1711.07971), embedded Gaussian, h = C / 2.

    8 C h P for four projections, 4 (H W) h P for the products over the whole map, C P for the sum with the input.
    """
    c, p, h = case.channels, pixels(case), halved(case.channels)
    return Work(8 * c * h * p + 4 * case.height * case.width * h * p + c * p, 4 * c * h, c * p, c * p)


def shapes(case: Case) -> Shapes:
    c, h = case.channels, halved(case.channels)
    return {"x": image(case), "w_qkv": ((3 * h, c), c**-0.5 * h**-0.25), "w_out": ((c, h), 1.0)}


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x + W_out sum over the map of softmax(q . k) v, section 3 of Wang et al. 2018, a row of queries at a time."""
    import torch

    x = tensors["x"]
    q, k, v = torch.einsum("oc,nchw->nohw", tensors["w_qkv"], x).chunk(3, dim=1)
    k, v = k.flatten(2), v.flatten(2)
    rows = []
    for i in range(case.height):
        weights = torch.einsum("ndj,ndp->njp", q[:, :, i], k).softmax(-1)
        rows.append(torch.einsum("njp,ndp->ndj", weights, v))
    return x + torch.einsum("oc,nchw->nohw", tensors["w_out"], torch.stack(rows, dim=2))


OP = Op("non_local", shapes, work, reference)
