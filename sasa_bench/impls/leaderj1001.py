"""The softmax of the best-known public re-implementation, leaderj1001/Stand-Alone-Self-Attention: one for each channel.

Written from a description of what it computes. Its logits are products of one channel of q and k, never added up over
the channels of a head, so every channel is a head of its own, and there are d times as many logits as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, Info, layers_only
from sasa_bench.ops.tensors import Call, Tensors, project


def _build(case: Case, tensors: Tensors) -> Call:
    """Windows of k and v [B, C, H, W, K, K]; k gets row embeddings in half of the channels, column ones in the rest."""
    window, half = case.kernel_size, case.channels // 2

    def windows(t: Tensor) -> Tensor:
        return F.pad(t, (case.radius,) * 4).unfold(2, window, 1).unfold(3, window, 1)

    def call() -> Tensor:
        q, k, v = project(case, tensors)
        keys = windows(k)
        if case.position == "relative":
            rows = keys[:, :half] + tensors["rel_row"][:, None, None, :, None]
            keys = torch.cat([rows, keys[:, half:] + tensors["rel_col"][:, None, None, None, :]], dim=1)
        logits = (q[..., None, None] * keys).flatten(4)
        weights = logits.softmax(-1).unflatten(4, (window, window))
        return torch.einsum("bchwij,bchwij->bchw", weights, windows(v))

    return call


def _supports(case: Case) -> str | None:
    if case.position == "absolute":
        return "the re-implementation has no absolute positions: give position = 'none' or 'relative'"
    return layers_only(case)


IMPL = Impl(
    name="leaderj1001",
    op=ops.get("per_channel_attention"),
    summary="K x K copies and the softmax of the best-known re-implementation",
    build=_build,
    supports=_supports,
    computes=lambda case: case.with_(border="zero"),
    info=Info(differs="each channel has its own softmax, over products instead of dot products, zero padding included"),
)
