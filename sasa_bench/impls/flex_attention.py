"""Local attention by FlexAttention: the window is a block mask, q . r a change of each score; compiled."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sasa_bench.case import Case
from sasa_bench.impls import _compiled
from sasa_bench.ops.tensors import Tensors, project


def function(case: Case) -> _compiled.Function:
    """Pixels in raster order are the sequence. At border "zero" the keys are those of the padded map.

    A score of query (i, j) and key (a, b) gets q . r_{a-i} + q . r_{b-j}, which are products of q with K row and K
    column embeddings, taken before.
    """
    height, width, radius, half = case.height, case.width, case.radius, case.head_dim // 2
    margin = radius if case.border == "zero" else 0
    stride, last = width + 2 * margin, case.kernel_size - 1

    def steps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the key in the window of the query."""
        down = key // stride - query // width + radius - margin
        across = key % stride - query % width + radius - margin
        return down, across

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, across = steps(query, key)
        return (down >= 0) & (down <= last) & (across >= 0) & (across <= last)

    keys = (height + 2 * margin) * stride
    window = create_block_mask(in_window, None, None, height * width, keys, device=case.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor | None, by_column: Tensor | None) -> Tensor:
        score: Callable[..., Tensor] | None = None
        if by_row is not None and by_column is not None:

            def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                down, across = (step.clamp(0, last) for step in steps(query, key))
                return value + by_row[batch, head, query, down] + by_column[batch, head, query, across]

        y = flex_attention(q, k, v, score_mod=score, block_mask=window, scale=1.0)
        assert isinstance(y, Tensor)
        return y

    attend = _compiled.one_graph(attend)

    def heads(t: Tensor) -> Tensor:
        # The kernel that is compiled for the CPU reads wrong keys from a transposed view.
        return t.unflatten(1, (case.heads, case.head_dim)).flatten(3).transpose(2, 3).contiguous()

    def run(tensors: Tensors) -> Tensor:
        q, k, v = project(case, tensors)
        q, k, v = heads(q), heads(F.pad(k, (margin,) * 4)), heads(F.pad(v, (margin,) * 4))
        by_row = by_column = None
        if case.position == "relative":
            by_row, by_column = q[..., :half] @ tensors["rel_row"], q[..., half:] @ tensors["rel_col"]
        return attend(q, k, v, by_row, by_column).transpose(2, 3).reshape(len(q), case.channels, height, width)

    return run


def _supports(case: Case) -> str | None:
    if case.device == "cpu" and case.mode != "forward":
        return "FlexAttention has no backward pass on the CPU: give mode = 'forward'"
    return None


IMPL = _compiled.compiled(
    "flex_attention", "FlexAttention compiled with the window as block mask and q . r as score_mod", function, _supports
)
