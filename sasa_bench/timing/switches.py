"""What torch may do while a case is built, checked and timed: set for each case, the same for every implementation."""

from __future__ import annotations

from typing import Any

import torch

from sasa_bench.case import Case


def apply(case: Case) -> dict[str, Any]:
    """Set the threads and switches of a case; what of them a row records.

    float32 is float32: products may be rounded to TF32 only where the dtype of the case says so. On CUDA cuDNN times
    its algorithms at the first call of each shape and takes the fastest, as a user does who tunes.
    """
    if torch.get_num_threads() != case.threads:
        torch.set_num_threads(case.threads)
    tf32, cuda = case.dtype == "tf32", case.device == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cuda
    return {"tf32": "on" if tf32 else "off", "cudnn_benchmark": "on"} if cuda else {}


def unfit(case: Case) -> str | None:
    """Why no implementation can run a case in its dtype on its device; None where some can."""
    if case.dtype == "tf32" and case.device != "cuda":
        return "tf32 is how NVIDIA's tensor cores round products of float32: give dtype=float32, or --device cuda"
    return None
