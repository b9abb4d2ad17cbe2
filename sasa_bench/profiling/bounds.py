"""What bounds an operator: computing, moving data, or overhead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sasa_bench.profiling.breakdown import Operator

OVERHEAD = 0.25
"""An operator is bound by overhead where the roof explains less than this share of its time."""
LEAST_S = 20e-6
"""A run must be as long for its rate to count: shorter ones are mostly overhead."""


@dataclass(frozen=True)
class Roof:
    """The best rates among the operators of a trace: a lower bound of what the machine can do."""

    flops_per_s: float
    bytes_per_s: float


def best_rates(operators: Sequence[Operator]) -> Roof | None:
    """The highest FLOP/s and byte/s that an operator of known cost reached; None where none ran long enough."""
    known = [o for o in operators if o.flops and o.bytes and _time(o) >= LEAST_S * max(o.count, 1)]
    if not known:
        return None
    return Roof(max((o.flops or 0) / _time(o) for o in known), max((o.bytes or 0) / _time(o) for o in known))


def bound(operator: Operator, roof: Roof | None) -> str:
    """ "compute", "memory", "overhead", or "" where the cost or the roof is not known."""
    if roof is None or not operator.flops or not operator.bytes or not _time(operator):
        return ""
    computing, moving = operator.flops / roof.flops_per_s, operator.bytes / roof.bytes_per_s
    if max(computing, moving) < OVERHEAD * _time(operator):
        return "overhead"
    return "compute" if computing >= moving else "memory"


def flops_per_s(operator: Operator) -> float | None:
    """Useful FLOP/s of the operator with what runs inside it: on the GPU where it launched kernels."""
    return operator.flops / _time(operator) if operator.flops and _time(operator) else None


def _time(operator: Operator) -> float:
    return operator.gpu_total_s or operator.total_s
