"""Neighborhood attention by NATTEN: near a border the window is shifted inward, where the paper's is cut off."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, Info, layers_only
from sasa_bench.ops.tensors import Call, Tensors, project

FLEX = "flex-fna"
"""The one backend of NATTEN that runs on a CPU: FlexAttention, not compiled, which writes all (H W)^2 logits."""


def _missing() -> str | None:
    if find_spec("natten") is None:
        return "natten is not installed: pip install --no-deps --no-build-isolation natten"
    return None


def _build(case: Case, tensors: Tensors) -> Call:
    from natten import na2d

    backend = FLEX if case.device == "cpu" else None

    def pixels(t: Tensor) -> Tensor:
        return t.unflatten(1, (case.heads, case.head_dim)).permute(0, 3, 4, 1, 2).contiguous()

    def call() -> Tensor:
        q, k, v = map(pixels, project(case, tensors))
        y: Tensor = na2d(q, k, v, kernel_size=(case.kernel_size,) * 2, scale=1.0, backend=backend)
        return y.flatten(3).permute(0, 3, 1, 2)

    return call


def _supports(case: Case) -> str | None:
    if reason := layers_only(case):
        return reason
    if case.position == "relative":
        return "NATTEN has no position term: give position = 'none'"
    if not 2 <= case.kernel_size <= min(case.height, case.width):
        return f"NATTEN takes windows from 2 x 2 to the map of {case.height} x {case.width} pixels"
    if case.device == "cpu":
        return _on_cpu(case)
    return None


def _on_cpu(case: Case) -> str | None:
    if case.mode != "forward":
        return "NATTEN runs on FlexAttention on a CPU, which has no backward pass there: give mode = 'forward'"
    d = case.head_dim
    if not 8 <= d <= 512 or d & (d - 1):
        return f"NATTEN on a CPU takes 8 to 512 channels a head, a power of two: {d} given"
    return None


IMPL = Impl(
    name="natten",
    op=ops.get("neighborhood_attention"),
    summary="neighborhood attention by NATTEN; on a CPU its FlexAttention backend, not compiled",
    build=_build,
    supports=_supports,
    missing=_missing,
    computes=lambda case: case.with_(border="mask"),
    info=Info(
        quick=False,
        differs="near a border the window is shifted inward instead of cut off, and there is no position term",
    ),
)
