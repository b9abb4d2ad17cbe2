"""What a CUDA kernel computes and how: template instances, and the tunables that fit a block's resources."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import torch

SOURCE = Path(__file__).parents[1] / "csrc" / "local_attention.cu"
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
WARP = 32
SHARED_LIMIT = 48 * 1024
ALL_SHARED = 144 * 1024
MOST_REGISTERS = 224
ALL_REGISTERS = 65536
MOST_THREADS = 2048
WIDEST_SEGMENT = 19
LEAST_SEGMENT = 5
MOST_CANDIDATES = 6
# (pixels, channels of a thread, widest tile, most threads) to try, the unmeasured default first. The forward holds less
# in registers, so it starts with four pixels, which share the words that they read, and in small windows with six.
CHOICES = (
    (2, 8, 32, 128),
    (4, 8, 64, 128),
    (1, 8, 32, 128),
    (2, 8, 32, 256),
    (2, 4, 32, 128),
    (1, 16, 32, 128),
    (2, 8, 16, 64),
)
FORWARD_CHOICES = ((4, 8, 64, 128), (2, 8, 32, 128), (4, 8, 64, 256), *CHOICES[2:])
SMALL_WINDOW = 3
SMALL_WINDOW_CHOICES = ((6, 8, 60, 128), *FORWARD_CHOICES)
# Floats that a thread holds for each of its pixels, per channel and per window column.
HELD = {"forward": (2, 2), "backward_queries": (3, 4), "backward_keys": (5, 2)}
OTHER_REGISTERS = {"forward": 66, "backward_queries": 66, "backward_keys": 57}
SHUFFLE_REGISTERS = 8


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
    groups of `lanes` threads for each of `images` images (an image is a head of a batch entry); the threads of one row
    fill whole warps. It keeps `staged` rows in shared memory at a time, and passes over the window `segment` columns at
    a time. Registers are rationed so that `resident` blocks fit a multiprocessor.
    """

    pixels: int
    lanes: int
    columns: int
    rows: int
    images: int
    staged: int
    segment: int
    resident: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return _whole_warps(self.lanes * self.columns * self.images) * self.rows

    def tiles(self, height: int, width: int) -> int:
        """Tiles that cover one image."""
        return ceil(width / (self.columns * self.pixels)) * ceil(height / self.rows)


def _whole_warps(threads: int) -> int:
    return ceil(threads / WARP) * WARP


@cache
def source() -> str:
    """The CUDA C++ source of all kernels."""
    return SOURCE.read_text(encoding="utf-8")


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
        tunables.images,
        tunables.staged,
        tunables.segment,
        tunables.resident,
    ]
    return f"{kernel}<Plan<{', '.join(map(str, values))}>>"


def last_sum(dtype: torch.dtype, kernel_size: int, head_width: int) -> str:
    """The template instance that adds up the shares of the gradient of the position embeddings."""
    return f"sum_positions<{ELEMENTS[dtype]}, {kernel_size}, {head_width}>"


def shared_bytes(kernel: str, function: Function, tunables: Tunables) -> int:
    """Shared memory of a block in bytes: the kernel's arrays, rounded up to their alignment of 16 bytes."""
    vector = next(size for size in (4, 2, 1) if tunables.pixels % size == 0)
    line = ceil((tunables.pixels + tunables.segment - 1) / vector) * vector
    plane = tunables.staged * ((tunables.columns - 1) * tunables.pixels + line)
    if tunables.lanes > 1:
        bank_step = 32 // min(tunables.lanes, 32 // vector)
        plane += (bank_step - plane) % 32
    member = tunables.lanes * ceil(function.head_width / tunables.lanes) * plane
    if tunables.images > 1:
        member += (tunables.columns * tunables.pixels - member) % 32
    arrays = [tunables.images * member] * 2
    if kernel == "backward_keys":
        arrays += [tunables.images * plane] * 2
    if kernel == "backward_queries" and function.position:
        tile = tunables.columns * tunables.pixels * tunables.rows
        arrays.append(tunables.images * 2 * function.kernel_size * (tile + 1))
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
    while lanes < WARP and ceil(function.head_width / lanes) > channels:
        lanes *= 2
    segment = _split(function.kernel_size, WIDEST_SEGMENT)
    least = 1 if pixels == 1 else LEAST_SEGMENT
    while _registers(kernel, function, pixels, lanes, segment) > MOST_REGISTERS:
        segment = _split(function.kernel_size, segment - 1)
        if segment < least:
            if pixels > 1:
                return None
            segment = 1
            break
    rows_limit = most_threads
    while True:
        columns = ceil(_split(width, widest) / pixels)
        columns = max(1, min(columns, most_threads // lanes))
        images = max(1, WARP // (lanes * columns))
        row_threads = _whole_warps(lanes * columns * images)
        rows = _split(height, min(rows_limit, max(1, most_threads // row_threads)))
        registers = min(MOST_REGISTERS, _registers(kernel, function, pixels, lanes, segment))
        threads = row_threads * rows
        resident = min(ALL_REGISTERS // (ceil(registers / 8) * 8 * threads), MOST_THREADS // threads, 32)
        target = min(SHARED_LIMIT, ALL_SHARED // resident)
        every_row = rows + function.kernel_size - 1
        while True:
            for staged in dict.fromkeys(_split(every_row, limit) for limit in range(every_row, 0, -1)):
                tunables = Tunables(pixels, lanes, columns, rows, images, staged, segment, resident)
                size = shared_bytes(kernel, function, tunables)
                if size <= target or (staged == images == 1 and size <= SHARED_LIMIT):
                    return tunables
            if images == 1:
                break
            images //= 2
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
    small = function.kernel_size <= SMALL_WINDOW
    choices = CHOICES if kernel != "forward" else SMALL_WINDOW_CHOICES if small else FORWARD_CHOICES
    for choice in choices:
        if tunables := _fit(kernel, function, height, width, *choice):
            found[tunables] = None
    if not found:
        raise ValueError(
            f"the CUDA kernels have no shared memory for {function.head_width} channels per head with "
            f"kernel_size {function.kernel_size}: use more heads or a smaller window."
        )
    return tuple(found)[:MOST_CANDIDATES]
