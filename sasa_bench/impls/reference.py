"""The float64 reference of local attention as an implementation: slow, and right by inspection."""

from __future__ import annotations

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    return lambda: (
        ops.get("local_attention")
        .reference(case, {name: t.double() for name, t in tensors.items()})
        .to(next(iter(tensors.values())).dtype)
    )


def _supports(case: Case) -> str | None:
    return "the reference computes a layer, not a network or a stem" if case.stem != "none" else None


IMPL = Impl(
    name="reference",
    op=ops.get("local_attention"),
    summary="float64 reference, row by row; every other implementation is checked against it",
    build=_build,
    supports=_supports,
)
