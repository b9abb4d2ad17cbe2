"""What is computed: the registry of ops, each with its shapes, its cost and its float64 reference in one file.

To add one, write sasa_bench/ops/NAME.py that defines `OP` and add a line to BUILTIN.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sasa_bench.case import UserError

if TYPE_CHECKING:
    from sasa_bench.ops.op import Op

BUILTIN = {
    "local_attention": "sasa_bench.ops.local_attention:OP",
    "global_attention": "sasa_bench.ops.global_attention:OP",
    "convolution": "sasa_bench.ops.convolution:OP",
    "depthwise_convolution": "sasa_bench.ops.convolution:DEPTHWISE",
    "squeeze_excitation": "sasa_bench.ops.squeeze_excitation:OP",
    "non_local": "sasa_bench.ops.non_local:OP",
    "criss_cross": "sasa_bench.ops.criss_cross:OP",
    "neighborhood_attention": "sasa_bench.ops.neighborhood_attention:OP",
    "halo_attention": "sasa_bench.ops.halo_attention:OP",
    "per_channel_attention": "sasa_bench.ops.per_channel_attention:OP",
}
"""Name -> "module:object" of each op."""


class UnknownOpError(UserError):
    """A name that no op has."""


def get(name: str) -> Op:
    """The op of that name. Raises UnknownOpError, which lists the known ones."""
    if name not in BUILTIN:
        raise UnknownOpError(f"unknown op {name!r}: there are {', '.join(BUILTIN)}")
    module, _, attribute = BUILTIN[name].partition(":")
    op: Op = getattr(importlib.import_module(module), attribute)
    return op
