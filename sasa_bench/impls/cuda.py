"""Local self-attention in CUDA C++ (``csrc/local_attention.cu``), compiled on the user's machine for its GPU.

Computes ``y_i = sum_j softmax_j(q_i.k_j + q_i.r_{j-i}) v_j`` over a K x K window, per head, without 1/sqrt(d)
(Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019, section 3), and its
gradients, in float32, float16 and bfloat16 with float32 sums. Deterministic; no tensor with K*K entries per
pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import local_attention as attention_impl

SOURCE = Path(__file__).parent / "csrc" / "local_attention.cu"
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
SHARED_LIMIT = 48 * 1024
SHARED_TARGET = 24 * 1024
MOST_REGISTERS = 224
ALL_REGISTERS = 65536
MOST_THREADS = 2048
WIDEST_SEGMENT = 19
MOST_CANDIDATES = 6
# (pixels, channels of a thread, widest tile, most threads) to try, the unmeasured default first.
CHOICES = (
    (2, 8, 32, 128),
    (4, 8, 32, 128),
    (1, 8, 32, 128),
    (2, 8, 16, 64),
    (2, 4, 32, 128),
    (1, 16, 32, 128),
    (1, 8, 16, 64),
)
# Floats that a thread holds for each of its pixels, per channel and per window column.
HELD = {"forward": (2, 2), "backward_queries": (3, 4), "backward_keys": (5, 2)}
OTHER_REGISTERS = {"forward": 60, "backward_queries": 66, "backward_keys": 57}
SHUFFLE_REGISTERS = 8
SUM_COLUMNS, SUM_ROWS = 32, 8


@dataclass(frozen=True)
class Function:
    """What a kernel computes: element type, window, channels of a head, relative position or none, border."""

    dtype: torch.dtype
    kernel_size: int
    head_width: int
    position: bool
    zero_border: bool

    def __str__(self) -> str:
        return (
            f"{str(self.dtype).removeprefix('torch.')} k={self.kernel_size} d={self.head_width} "
            f"{'relative' if self.position else 'none'} {'zero' if self.zero_border else 'mask'}"
        )


@dataclass(frozen=True)
class Tunables:
    """How a kernel computes it.

    A thread owns `pixels` neighbouring pixels and every `lanes`-th channel. A block has `columns` x `rows`
    groups of `lanes` threads, keeps `staged` rows in shared memory at a time, and passes over the window
    `segment` columns at a time. Registers are rationed so that `resident` blocks fit a multiprocessor.
    """

    pixels: int
    lanes: int
    columns: int
    rows: int
    staged: int
    segment: int
    resident: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.lanes * self.columns * self.rows

    def tiles(self, height: int, width: int) -> int:
        """Blocks that cover one image."""
        return ceil(width / (self.columns * self.pixels)) * ceil(height / self.rows)


class Runtime(Protocol):
    """What the host side needs from a device; `nvrtc.Runtime` is the real one."""

    def launch(
        self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]
    ) -> None: ...

    def choose(self, key: str, candidates: Sequence[Tunables], run: Callable[[Tunables], None]) -> Tunables: ...


@cache
def source() -> str:
    """The CUDA C++ source of all kernels."""
    return SOURCE.read_text()


def expression(kernel: str, function: Function, tunables: Tunables) -> str:
    """The template instance to compile, in the order of the template parameters of ``Plan``."""
    values = [
        ELEMENTS[function.dtype],
        function.kernel_size,
        function.head_width,
        str(function.position).lower(),
        str(function.zero_border).lower(),
        tunables.pixels,
        tunables.lanes,
        tunables.columns,
        tunables.rows,
        tunables.staged,
        tunables.segment,
        tunables.resident,
    ]
    return f"{kernel}<Plan<{', '.join(map(str, values))}>>"


def shared_bytes(kernel: str, function: Function, tunables: Tunables) -> int:
    """Shared memory of a block in bytes: the kernel's arrays, rounded up to their alignment of 16 bytes."""
    vector = next(size for size in (4, 2, 1) if tunables.pixels % size == 0)
    line = ceil((tunables.pixels + tunables.segment - 1) / vector) * vector
    plane = tunables.staged * ((tunables.columns - 1) * tunables.pixels + line)
    if tunables.lanes > 1:
        bank_step = 32 // min(tunables.lanes, 32 // vector)
        plane += (bank_step - plane) % 32
    arrays = [tunables.lanes * ceil(function.head_width / tunables.lanes) * plane] * 2
    if kernel == "backward_keys":
        arrays += [plane, plane]
    if kernel == "backward_queries" and function.position:
        tile = tunables.columns * tunables.pixels * tunables.rows
        arrays.append(2 * function.kernel_size * (tile + 1))
    return sum(ceil(floats / 4) * 16 for floats in arrays)


def _split(size: int, limit: int) -> int:
    """The largest part, at most `limit`, when `size` is divided evenly."""
    return ceil(size / ceil(size / max(1, min(size, limit))))


def _registers(kernel: str, function: Function, pixels: int, lanes: int, segment: int) -> int:
    """An estimate of the registers of a thread; the tests compare it with compiled kernels."""
    per_channel, per_column = HELD[kernel]
    held = per_channel * ceil(function.head_width / lanes) + per_column * segment
    others = OTHER_REGISTERS[kernel] + (SHUFFLE_REGISTERS if lanes > 1 else 0)
    return pixels * (held + 1) + segment + others


def _fit(
    kernel: str,
    function: Function,
    height: int,
    width: int,
    pixels: int,
    channels: int,
    widest: int,
    most_threads: int,
) -> Tunables | None:
    """Tunables with `pixels` and at most `channels` per thread that fit a block's resources, or None."""
    lanes = 1
    while lanes < 32 and ceil(function.head_width / lanes) > channels:
        lanes *= 2
    segment = _split(function.kernel_size, WIDEST_SEGMENT)
    while _registers(kernel, function, pixels, lanes, segment) > MOST_REGISTERS and segment > 1:
        if pixels > 1:
            return None
        segment = _split(function.kernel_size, segment - 1)
    rows_limit = most_threads
    while True:
        columns = ceil(_split(width, widest) / pixels)
        columns = max(1, min(columns, most_threads // lanes))
        rows = _split(height, min(rows_limit, max(1, most_threads // (lanes * columns))))
        every_row = rows + function.kernel_size - 1
        for staged in dict.fromkeys(_split(every_row, limit) for limit in range(every_row, 0, -1)):
            registers = min(MOST_REGISTERS, _registers(kernel, function, pixels, lanes, segment))
            threads = ceil(lanes * columns * rows / 32) * 32
            resident = min(ALL_REGISTERS // (ceil(registers / 8) * 8 * threads), MOST_THREADS // threads, 32)
            tunables = Tunables(pixels, lanes, columns, rows, staged, segment, resident)
            size = shared_bytes(kernel, function, tunables)
            if size <= SHARED_TARGET or (staged == 1 and size <= SHARED_LIMIT):
                return tunables
        if rows > 1:
            rows_limit = rows - 1
        elif columns > 1:
            rows_limit, widest = most_threads, (columns - 1) * pixels
        elif segment > 1 and pixels == 1:
            segment = _split(function.kernel_size, segment - 1)
        else:
            return None


@cache
def candidates(kernel: str, function: Function, height: int, width: int) -> tuple[Tunables, ...]:
    """Tunables worth measuring for an image size, the unmeasured default first.

    Raises:
        ValueError: no choice fits the shared memory of a block.
    """
    found: dict[Tunables, None] = {}
    for choice in CHOICES:
        if tunables := _fit(kernel, function, height, width, *choice):
            found[tunables] = None
    if not found:
        raise ValueError(
            f"the CUDA kernels have no shared memory for {function.head_width} channels per head with "
            f"kernel_size {function.kernel_size}: use more heads or a smaller window."
        )
    return tuple(found)[:MOST_CANDIDATES]


def _tuned(
    runtime: Runtime,
    kernel: str,
    function: Function,
    shape: torch.Size,
    heads: int,
    run: Callable[[Tunables], None],
) -> Tunables:
    images = 1 << (shape[0] * heads - 1).bit_length()
    key = f"{kernel} {function} {shape[2]}x{shape[3]} images<={images}"
    return runtime.choose(key, candidates(kernel, function, shape[2], shape[3]), run)


def _function(q: Tensor, rel_row: Tensor | None, kernel_size: int, heads: int, zero_border: bool) -> Function:
    return Function(q.dtype, kernel_size, q.shape[1] // heads, rel_row is not None, zero_border)


def run_forward(
    runtime: Runtime, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None,
    kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, C, H, W] and the base-2 logarithm of the softmax's denominator [B, heads, H, W] in float32."""
    batch, _, height, width = q.shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    y = torch.empty_like(q)
    log2_sum = q.new_empty((batch, heads, height, width), dtype=torch.float32)
    if q.numel() == 0:
        return y, log2_sum

    def run(tunables: Tunables) -> None:
        runtime.launch(
            source(),
            expression("forward", function, tunables),
            batch * heads * tunables.tiles(height, width),
            tunables.threads,
            [q, k, v, rel_row, rel_col, y, log2_sum, height, width, heads],
        )

    run(_tuned(runtime, "forward", function, q.shape, heads, run))
    return y, log2_sum


def run_backward(
    runtime: Runtime, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None,
    rel_col: Tensor | None, y: Tensor, log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, rel_row and rel_col; the last two are empty without positions."""
    batch, _, height, width = q.shape
    function = _function(q, rel_row, kernel_size, heads, zero_border)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if rel_row is None or rel_col is None:
        drel_row, drel_col = q.new_empty(0), q.new_empty(0)
    else:
        drel_row, drel_col = torch.empty_like(rel_row), torch.empty_like(rel_col)
    if q.numel() == 0:
        return dq, dk, dv, drel_row.zero_(), drel_col.zero_()
    inputs = (q, k, v, rel_row, rel_col)
    delta = torch.empty_like(log2_sum)
    column_logits = partials = None
    if function.position:
        column_logits = log2_sum.new_empty((batch, heads, kernel_size, height, width))

    def run_queries(tunables: Tunables) -> None:
        nonlocal partials
        blocks = batch * heads * tunables.tiles(height, width)
        if function.position:
            partials = log2_sum.new_empty((blocks, function.head_width, kernel_size))
        runtime.launch(
            source(),
            expression("backward_queries", function, tunables),
            blocks,
            tunables.threads,
            [*inputs, y, dy, log2_sum, dq, delta, column_logits, partials, height, width, heads, 0],
        )

    def run_keys(tunables: Tunables) -> None:
        runtime.launch(
            source(),
            expression("backward_keys", function, tunables),
            batch * heads * tunables.tiles(height, width),
            tunables.threads,
            [*inputs, dy, log2_sum, delta, column_logits, dk, dv, height, width, heads, 0],
        )

    by_queries = _tuned(runtime, "backward_queries", function, q.shape, heads, run_queries)
    run_queries(by_queries)
    run_keys(_tuned(runtime, "backward_keys", function, q.shape, heads, run_keys))
    if partials is not None:
        runtime.launch(
            source(),
            f"sum_positions<{ELEMENTS[q.dtype]}, {kernel_size}, {function.head_width}>",
            heads * ceil(function.head_width * kernel_size / SUM_COLUMNS),
            SUM_COLUMNS * SUM_ROWS,
            [partials, drel_row, drel_col, batch, heads, by_queries.tiles(height, width)],
        )
    return dq, dk, dv, drel_row, drel_col


def _check(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int,
) -> None:  # fmt: skip
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [batch, channels, height, width].")
    if q.dtype not in ELEMENTS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ELEMENTS)
        raise ValueError(f"q is {q.dtype}; the CUDA kernels take {allowed}: convert the inputs.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and at least 1.")
    if heads < 1 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} channels do not divide into {heads} heads: choose a divisor.")
    width = q.shape[1] // heads
    shapes = {"k": (k, tuple(q.shape)), "v": (v, tuple(q.shape))}
    if (rel_row is None) != (rel_col is None):
        raise ValueError("only one of rel_row and rel_col is given: pass both, or None for both.")
    if rel_row is not None and rel_col is not None:
        shapes["rel_row"] = (rel_row, (heads, width // 2, kernel_size))
        shapes["rel_col"] = (rel_col, (heads, width - width // 2, kernel_size))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; next to this q it must be {shape}.")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: make them match."
            )
    if max(width, kernel_size) * q.shape[2] * q.shape[3] >= 2**31:
        raise ValueError(f"a head of {width} x {q.shape[2]} x {q.shape[3]} has 2^31 elements or more: split the image.")


def _contiguous(*tensors: Tensor | None) -> Iterator[Any]:
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


@torch.library.custom_op("sasa_bench::cuda_local_attention_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`cuda_local_attention`, and the base-2 logarithm of the softmax's denominator [B, heads, H, W]."""
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    q, k, v, rel_row, rel_col = _contiguous(q, k, v, rel_row, rel_col)
    with torch.cuda.device_of(q):
        runtime = nvrtc.runtime(q.device)
        return run_forward(runtime, q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)


@forward.register_fake
def _(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    batch, _, height, width = q.shape
    log2_sum = q.new_empty((batch, heads, height, width), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), log2_sum


@torch.library.custom_op("sasa_bench::cuda_local_attention_backward", mutates_args=())
def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor,
    log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, rel_row and rel_col from that of y; the last two are empty without positions."""
    _check(q, k, v, rel_row, rel_col, kernel_size, heads)
    dy, q, k, v, rel_row, rel_col, y = _contiguous(dy, q, k, v, rel_row, rel_col, y)
    axes = (kernel_size, heads, zero_border)
    with torch.cuda.device_of(q):
        runtime = nvrtc.runtime(q.device)
        return run_backward(runtime, dy, q, k, v, rel_row, rel_col, y, log2_sum.contiguous(), *axes)


@backward.register_fake
def _(dy, q, k, v, rel_row, rel_col, y, log2_sum, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
    def like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return q.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(rel_row), like(rel_col)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rel_row, rel_col, ctx.kernel_size, ctx.heads, ctx.zero_border = inputs
    y, log2_sum = output
    ctx.mark_non_differentiable(log2_sum)
    ctx.save_for_backward(q, k, v, rel_row, rel_col, y, log2_sum)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, rel_row, rel_col, y, log2_sum = ctx.saved_tensors
    dq, dk, dv, drel_row, drel_col = backward(
        dy, q, k, v, rel_row, rel_col, y, log2_sum, ctx.kernel_size, ctx.heads, ctx.zero_border
    )
    if rel_row is None:
        return dq, dk, dv, None, None, None, None, None
    return dq, dk, dv, drel_row, drel_col, None, None, None


def _no_second_gradient(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "cuda_local_attention has no second derivative: call backward without create_graph, or use another "
        "implementation of local attention for double backward."
    )


forward.register_autograd(_gradients, setup_context=_save)
backward.register_autograd(_no_second_gradient)

_library = torch.library.Library("sasa_bench", "FRAGMENT")
_library.define(
    "cuda_local_attention(Tensor q, Tensor k, Tensor v, Tensor? rel_row, Tensor? rel_col, "
    "int kernel_size, int heads, bool zero_border) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
    heads: int, zero_border: bool,
) -> Tensor:  # fmt: skip
    """Local self-attention y [B, C, H, W] on a CUDA device, differentiable once.

    Also ``torch.ops.sasa_bench.cuda_local_attention``. Runs on torch's current stream.

    Args:
        q, k, v: [B, C, H, W] in float32, float16 or bfloat16; C = heads * d, a head's channels contiguous.
        rel_row, rel_col: position embeddings [heads, d // 2, K] and [heads, d - d // 2, K], or None for both.
        kernel_size: odd window size K; it may exceed the image.
        heads: number of heads.
        zero_border: whether zero-padded positions outside the image take part in the softmax.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message says which are allowed.
        RuntimeError: this machine cannot run CUDA kernels; the message says what is missing.
        NotImplementedError: a second derivative is asked for.
    """
    return forward(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)[0]


_library.impl("cuda_local_attention", local_attention, "CompositeImplicitAutograd")


def missing() -> str | None:
    """What keeps the kernels from running on this machine and what would unlock them; None if nothing."""
    return nvrtc.missing()


def attend(case: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The operator of a case: ``(q, k, v, rel_row, rel_col) -> y``.

    Args:
        case: has `kernel_size`, `heads` and `border` (``"mask"`` or ``"zero"``).
    """
    if case.border not in ("mask", "zero"):
        raise ValueError(f"border is {case.border!r}; it must be 'mask' or 'zero'.")
    zero_border = case.border == "zero"

    def call(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        return local_attention(q, k, v, rel_row, rel_col, case.kernel_size, case.heads, zero_border)

    return call


def describe() -> list[str]:
    """Lines for a person: device or what is missing, cached cubins, chosen tunables."""
    return nvrtc.describe()


def _supports(case: Case) -> str | None:
    return None if case.device == "cuda" else "the CUDA kernel needs --device cuda"


IMPL = attention_impl(
    "cuda",
    "CUDA C++ kernels compiled by NVRTC for the GPU at hand; deterministic",
    attend,
    supports=_supports,
    missing=missing,
    details=nvrtc.details,
)
