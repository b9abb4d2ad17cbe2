"""Local attention by unfolding: k and v are copied K x K times, as public re-implementations do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Attend, _compiled, _onnx, local_attention


def attend(case: Case) -> Attend:
    """Copies of k and v of shape [B, N, d, K, K, H W]; relative embeddings are added to k, as the paper writes it."""
    window, radius = case.kernel_size, case.radius
    inside = torch.ones(1, 1, case.height, case.width, device=case.device)
    outside = F.unfold(inside, window, padding=radius).view(window, window, case.height * case.width) == 0

    def windows(t: Tensor) -> Tensor:
        copies = F.unfold(t, window, padding=radius)
        return copies.view(len(t), case.heads, case.head_dim, window, window, case.height * case.width)

    def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        keys = windows(k)
        if rel_row is not None and rel_col is not None:
            rows = rel_row[:, :, :, None].expand(-1, -1, -1, window)
            columns = rel_col[:, :, None, :].expand(-1, -1, window, -1)
            keys = keys + torch.cat([rows, columns], dim=1)[..., None]
        query = q.reshape(len(q), case.heads, case.head_dim, 1, 1, case.height * case.width)
        logits = (query * keys).sum(2)
        if case.border == "mask":
            logits = logits.masked_fill(outside, -torch.inf)
        weights = logits.flatten(2, 3).softmax(2).view_as(logits)
        return (weights[:, :, None] * windows(v)).sum((3, 4)).view_as(q)

    return core


IMPL = local_attention("unfold", "K x K copies of keys and values, as public re-implementations do", attend)
ONNX = _onnx.exported_attention("onnx_unfold", "the unfolding formulation in ONNX Runtime", attend, exports="unfold")
COMPILED = _compiled.compiled_attention("compiled_unfold", "the unfolding formulation through torch.compile", attend)
