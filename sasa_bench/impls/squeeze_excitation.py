"""Squeeze-and-excitation: a gate for each channel from the mean of the map."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, layers_only
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    x, squeeze, excite = tensors["x"], tensors["w_squeeze"], tensors["w_excite"]

    def call() -> Tensor:
        gate = F.linear(F.linear(x.mean((2, 3)), squeeze).relu(), excite).sigmoid()
        return x * gate[:, :, None, None]

    return call


def _supports(case: Case) -> str | None:
    if reason := layers_only(case):
        return reason
    return None if case.scope == "layer" else "this is a block with projections of its own: give scope = 'layer'"


IMPL = Impl(
    name="squeeze_excitation",
    op=ops.get("squeeze_excitation"),
    summary="a gate for each channel from the mean of the map (squeeze-and-excitation)",
    build=_build,
    supports=_supports,
    computes=lambda case: case.with_(position="none"),
)
