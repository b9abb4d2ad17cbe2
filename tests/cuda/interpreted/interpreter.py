"""The Triton kernels in Triton's interpreter, on the CPU, with bfloat16 as hardware has it.

The interpreter keeps bfloat16 as 16-bit integers: Triton 3.9 multiplies these in `tl.dot`, and cuts off float32 where
it should round it. `exact_bfloat16` replaces both by conversions of torch's; triton_checks.py checks that the products
are right then, and whether the interpreter still needs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import dense_reference
import numpy as np
import torch
from dense_reference import Problem

from sasa_bench.impls.triton import launch

KERNELS = Path(launch.__file__).parent / "kernels.py"
MARGIN = 1 << 14


@cache
def load(path: Path = KERNELS) -> ModuleType:
    """The kernels in a file; TRITON_INTERPRET=1 has to be set before triton is imported."""
    spec = importlib.util.spec_from_file_location(f"interpreted_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Inside, products and roundings of bfloat16 are right, and integers are not checked for overflow."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, options = builder.create_dot, builder.cast_impl, interpreter.interpreter_builder.options

    def widened(data: np.ndarray) -> np.ndarray:
        bits = torch.from_numpy(np.ascontiguousarray(data).view(np.int16))
        return bits.view(torch.bfloat16).float().numpy()

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *precision)
        return handle(np.matmul(widened(a.data), widened(b.data)) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(torch.tensor([value]).bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    if lacking := not hasattr(builder, "get_bf16"):  # before Triton 3.9
        builder.get_bf16 = get_bf16
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl = dot, cast
        if lacking:
            del builder.get_bf16
        interpreter.interpreter_builder.options = options


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 by `tl.dot` in the interpreter, for square matrices."""
    folder = Path(__file__).parent
    result = torch.full(a.shape, float("nan"))
    load(folder / "product_kernel.py").product[(1,)](a, b, result, len(a))
    return result


def launcher(path: Path = KERNELS, tunables: launch.Tunables = launch.CHOICES[0]) -> launch.Launcher:
    """Launches the interpreted kernels of a file with fixed tunables."""
    return launch.Launcher(load(path), lambda *_: tunables)


class Guarded:
    """Tensors with a margin of NaN on either side, so that reads beside them show and writes beside them are seen."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def like(self, t: torch.Tensor, fill: bool = True) -> torch.Tensor:
        """A pixel-major copy of a map (a plain one of another tensor), or with `fill` false one full of NaN."""
        maps = t.dim() == 4 and t.shape[1] > 1
        buffer = torch.full((2 * MARGIN + t.numel(),), float("nan"), dtype=t.dtype)
        self.buffers.append((buffer, t.numel()))
        inner = buffer[MARGIN : MARGIN + t.numel()]
        made = inner.view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2) if maps else inner.view(t.shape)
        return made.copy_(t) if fill else made

    def strays(self) -> list[str]:
        """A line for each tensor beside which something was written."""
        return [
            "written beside a tensor"
            for buffer, size in self.buffers
            if not (buffer[:MARGIN].isnan().all() and buffer[MARGIN + size :].isnan().all())
        ]


def run(running: launch.Launcher, problem: Problem) -> tuple[list[torch.Tensor], list[str]]:
    """y and all gradients, NaN where the kernels did not write, and what they wrote elsewhere."""
    inputs, dy = problem.inputs()
    axes = (problem.kernel_size, problem.heads, problem.zero_border)
    guarded = Guarded()
    q, k, v, dy = (guarded.like(t) for t in (*inputs[:3], dy))
    y, dq, dk, dv = (guarded.like(q, fill=False) for _ in range(4))
    log2_sum = guarded.like(torch.empty(problem.batch, problem.heads, problem.height, problem.width)[None], fill=False)[
        0
    ]
    drel = [None if t is None else torch.full_like(t, float("nan")) for t in inputs[3:]]
    with exact_bfloat16():
        launch.run_forward(running, q, k, v, *inputs[3:], y, log2_sum, *axes)
        launch.run_backward(running, dy, q, k, v, *inputs[3:], y, log2_sum, dq, dk, dv, *drel, *axes)
    results = [y, dq, dk, dv, *(torch.empty(0) if t is None else t for t in drel)]
    return results, guarded.strays()


def findings(running: launch.Launcher, problem: Problem) -> list[str]:
    """What is wrong with a run: values beyond their budget, writes beside a tensor."""
    results, strays = run(running, problem)
    return dense_reference.failures(problem, results, dense_reference.TENSOR_CORE_FACTOR) + strays
