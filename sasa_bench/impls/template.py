"""my_kernel: local self-attention in plain torch, to be replaced by your own kernel.

    sasa-bench run smoke --impl my_kernel.py --impl unfold --out my_kernel.jsonl
    sasa-bench table my_kernel.jsonl

Every case is checked against a float64 reference on fresh random input, with its gradients where the case has them,
before it is timed: a kernel that computes something else gets a row "wrong" with its largest error, and no time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench import Case, local_attention
from sasa_bench.impls import Attend


def attend(case: Case) -> Attend:
    """Prepare what depends on the case alone, untimed; the function that comes back is what is timed.

    The fields of a case: kernel_size K, channels C, heads N, head_dim d = C / N, height H, width W, batch B,
    radius = K // 2, position, border, dtype, device, mode, threads. Masks, index tables, compiled code and buffers
    belong here.
    """
    half = case.head_dim // 2

    def windows(t: Tensor) -> Tensor:  # [..., H, W] -> [..., H, W, K, K], a view of the zero-padded map
        padded = F.pad(t, (case.radius,) * 4)
        return padded.unfold(-2, case.kernel_size, 1).unfold(-2, case.kernel_size, 1)

    outside = ~windows(torch.ones(case.height, case.width, dtype=torch.bool, device=case.device))

    def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        # Your kernel goes here. q, k, v are [B, C, H, W] in the dtype and on the device of the case; channel c is
        # channel c % d of head c // d. rel_row [N, d // 2, K] and rel_col [N, d - d // 2, K] are None unless position
        # is "relative". What it returns is [B, C, H, W]. A compiled kernel is called from here like any other function;
        # for gradients wrap it in a torch.autograd.Function, or return a reason in `supports`.
        q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in (q, k, v))
        logits = torch.einsum("bndhw,bndhwij->bnhwij", q, windows(k))
        if rel_row is not None and rel_col is not None:
            by_row = torch.einsum("bndhw,ndi->bnhwi", q[:, :, :half], rel_row)
            by_column = torch.einsum("bndhw,ndj->bnhwj", q[:, :, half:], rel_col)
            logits = logits + by_row[..., :, None] + by_column[..., None, :]
        if case.border == "mask":  # with "zero", pixels outside the map take part with k = v = 0
            logits = logits.masked_fill(outside, -torch.inf)
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        y = torch.einsum("bnhwij,bndhwij->bndhw", weights, windows(v))
        return y.flatten(1, 2)

    return core


def supports(case: Case) -> str | None:
    """None, or the reason why this kernel cannot run a case: its row is then "skipped", with this reason.

    For a kernel without a backward pass: `if case.mode != "forward": return "this kernel has no backward pass"`.
    """
    return None


def missing() -> str | None:
    """None, or what this machine lacks to run the kernel, and the command that installs it. Must be quick."""
    return None


IMPL = local_attention("my_kernel", "one line about it, for the report", attend, supports=supports, missing=missing)
