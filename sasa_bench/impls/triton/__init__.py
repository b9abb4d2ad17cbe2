"""Local self-attention on tensor cores, in Triton: float16, bfloat16, and float32 as tf32 where torch allows it.

Computes ``y_i = sum_j softmax_j(q_i.k_j + q_i.r_{j-i}) v_j`` over a K x K window, per head, without 1/sqrt(d)
(Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019, section 3), and its gradients, with
float32 sums. Deterministic; no tensor with K*K entries per pixel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import CHOICES as AXIS_CHOICES
from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _operator, local_attention
from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls._tuning import Chooser, choosing_in_build
from sasa_bench.impls.triton import launch
from sasa_bench.impls.triton.launch import CHOICES, DTYPES, MOST_SLOTS, WIDEST_HEAD, Function, Tunables

SOURCE = Path(__file__).parent / "kernels.py"
LEAST_CAPABILITY = (8, 0)
LEAST_VERSION = (3, 5)
"""Of Triton: earlier ones multiply no matrix with fewer than 16 columns."""


@cache
def _chooser(index: int) -> Chooser:
    name = torch.cuda.get_device_name(index)
    return Chooser(f"{name} triton", SOURCE.read_text(encoding="utf-8"))


@cache
def launcher(index: int) -> launch.Launcher:
    """Runs the kernels on a device. Raises RuntimeError, which states what is missing."""
    if reason := missing():
        raise RuntimeError(reason)
    from sasa_bench.impls.triton import kernels

    def choose(kernel: str, function: Function, shape: torch.Size, run: Callable[[Tunables], None]) -> Tunables:
        heads = shape[1] // function.head_width
        images = 1 << (shape[0] * heads - 1).bit_length()
        key = f"{kernel} {function} {shape[2]}x{shape[3]} images<={images}"
        chosen: Tunables = _chooser(index).choose(key, CHOICES, run)
        return chosen

    return launch.Launcher(kernels, choose)


def _launcher(t: Tensor) -> launch.Launcher:
    if t.device.type != "cuda":
        raise ValueError(f"the Triton kernels take CUDA tensors, these are on {t.device.type!r}: use .to('cuda').")
    return launcher(torch.cuda.current_device() if t.device.index is None else t.device.index)


def _run_forward(q: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(q):
        launch.run_forward(_launcher(q), q, *arguments)


def _run_backward(dy: Tensor, q: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(q):
        launch.run_backward(_launcher(q), dy, q, *arguments)


OPERATORS = _operator.define(
    "triton_local_attention", "Triton", DTYPES, _run_forward, _run_backward, torch.channels_last
)
"""``torch.ops.sasa_bench.triton_local_attention(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)`` and
``triton_local_attention_qkv(qkv, ...)``. float32 is rounded to tf32 where torch allows it
(``torch.backends.cuda.matmul.allow_tf32``, off by default); else the FMA units multiply it, slowly. Maps are read where
they lie if the channels of a pixel lie side by side (channels-last, or thirds of a channels-last projection), else
copied."""


def missing() -> str | None:
    """What keeps the kernels from running on this machine and what would unlock them; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'sasa-bench[triton]'."
    if (found := _version()) and found < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"triton {'.'.join(map(str, found))} does not compile the kernels: pip install 'triton>={least}'."
    if reason := nvrtc.no_device():
        return reason
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        return (
            f"this GPU has compute capability {capability[0]}.{capability[1]}: tensor cores have bfloat16 and tf32 "
            f"from {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} on."
        )
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler, and there is none: apt install gcc."
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        return f"Triton builds its launcher with {header}, which is not there: apt install python3-dev."
    return None


def _version() -> tuple[int, ...]:
    """The version of Triton to its second number; empty for a distribution of another name, as for AMD's GPUs."""
    try:
        return tuple(int(number) for number in metadata.version("triton").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return ()


WIDEST_WINDOW = MOST_SLOTS - CHOICES[0].columns + 1
MOST_IMAGES = 65535
"""CUDA's limit of the second side of a grid."""


def supports(case: Case) -> str | None:
    """None, or why the kernels do not cover a case."""
    if case.device != "cuda":
        return "the Triton kernels need --device cuda"
    if case.dtype == "float32":
        others = ", ".join(dtype for dtype in AXIS_CHOICES["dtype"] if dtype != "float32")
        return f"tensor cores round float32 to tf32: give dtype = one of {others}"
    if case.head_dim > WIDEST_HEAD:
        return f"{case.head_dim} channels per head are more than the {WIDEST_HEAD} that fit: give more heads"
    if case.kernel_size > WIDEST_WINDOW:
        return f"kernel_size = {case.kernel_size} is more than the {WIDEST_WINDOW} that fit a block"
    if case.batch > MOST_IMAGES:
        return f"batch = {case.batch} is more than the {MOST_IMAGES} images of one launch"
    return None


def attend(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The operator of a case: ``(q, k, v, rel_row, rel_col) -> y``."""
    axes = (case.kernel_size, case.heads, case.border == "zero")

    def call(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        return OPERATORS.attend(q, k, v, rel_row, rel_col, *axes)

    return call


def project(x: Tensor, w_qkv: Tensor) -> Tensor:
    """The projection [B, 3C, H, W], pixel-major, of x [B, C, H, W] by w_qkv [3C, C]."""
    if torch.is_grad_enabled() and (x.requires_grad or w_qkv.requires_grad):
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), w_qkv[:, :, None, None])
    pixels = x.flatten(2).transpose(1, 2)
    qkv = torch.bmm(pixels, w_qkv.t().expand(len(x), -1, -1))
    return qkv.transpose(1, 2).unflatten(2, x.shape[2:])


def layer(case: Case) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The layer of a case, ``(x, w_qkv, rel_row, rel_col) -> y``; y is channels-last."""
    axes = (case.kernel_size, case.heads, case.border == "zero")

    def call(x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        return OPERATORS.attend_qkv(project(x, w_qkv), rel_row, rel_col, *axes)

    return call


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """The operator for tensors of every size."""
    return OPERATORS.attend(q, k, v, rel_row, rel_col, window.rows, window.heads, window.border == "zero")


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the Triton kernels have square windows, not {window.rows} x {window.columns}"
    if x.device.type not in ("cuda", "meta"):
        return f"the Triton kernels run on a GPU, not on {x.device.type}"
    if x.dtype not in DTYPES or (x.dtype == torch.float32 and not launch.allows_tf32()):
        return "the Triton kernels compute float16, bfloat16 and, where torch.backends.cuda.matmul.allow_tf32, tf32"
    if x.shape[1] > WIDEST_HEAD * window.heads:
        return f"the Triton kernels take at most {WIDEST_HEAD} channels per head"
    if window.rows > WIDEST_WINDOW:
        return f"the Triton kernels take windows of at most {WIDEST_WINDOW} pixels a side"
    if x.shape[0] > MOST_IMAGES:
        return f"the Triton kernels take at most {MOST_IMAGES} images at a time"
    return None


IMPL = local_attention(
    "triton",
    "blocks of queries against their halo on tensor cores, in Triton; deterministic",
    attend,
    core=Core(run, refuses=_refuses, keeps_output=True, transforms=False, portable=False),
    layer=layer,
    supports=supports,
    missing=missing,
)
IMPL = replace(IMPL, build=choosing_in_build(IMPL.build))
