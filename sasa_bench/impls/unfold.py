"""Local attention by unfolding: k and v are copied K x K times, as public re-implementations do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.impls import Core, Window, _compiled, _onnx, local_attention
from sasa_bench.networks.core import sizes


def tables(window: Window, height: int, width: int, like: Tensor) -> Tensor:
    """[Kh, Kw, H W]: which pixels of each window are outside the map."""
    inside = torch.ones(1, 1, height, width, device=like.device)
    copies = F.unfold(inside, (window.rows, window.columns), padding=window.radii)
    return copies.view(window.rows, window.columns, height * width) == 0


def run(
    window: Window, outside: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """Copies of k and v of shape [B, N, d, Kh, Kw, H W]; relative embeddings are added to k, as the paper writes it."""
    batch, channels, height, width = sizes(q)
    heads, d = window.heads, channels // window.heads

    def windows(t: Tensor) -> Tensor:
        copies = F.unfold(t, (window.rows, window.columns), padding=window.radii)
        return copies.view(batch, heads, d, window.rows, window.columns, height * width)

    keys = windows(k)
    if rel_row is not None and rel_col is not None:
        rows = rel_row[:, :, :, None].expand(-1, -1, -1, window.columns)
        columns = rel_col[:, :, None, :].expand(-1, -1, window.rows, -1)
        keys = keys + torch.cat([rows, columns], dim=1)[..., None]
    logits = (q.reshape(batch, heads, d, 1, 1, height * width) * keys).sum(2)
    if window.border == "mask":
        logits = logits.masked_fill(outside, -torch.inf)
    weights = logits.flatten(2, 3).softmax(2).view_as(logits)
    return (weights[:, :, None] * windows(v)).sum((3, 4)).view(batch, channels, height, width)


CORE = Core(run, tables)
IMPL = local_attention("unfold", "K x K copies of keys and values, as public re-implementations do", core=CORE)
ONNX = _onnx.exported_attention("onnx_unfold", "the unfolding formulation in ONNX Runtime", CORE, exports="unfold")
COMPILED = _compiled.compiled_attention("compiled_unfold", "the unfolding formulation through torch.compile", CORE)
