"""How an op is computed: one file or folder for each implementation, and the registry that finds them by name."""

from sasa_bench.impls.implementation import Attend, Impl, Info, Layer, layers_only, local_attention
from sasa_bench.impls.registry import (
    ANYWHERE,
    BUILTIN,
    ENTRY_POINTS,
    IN_NETWORKS,
    UnknownImplError,
    get,
    index,
    info,
    names,
    source,
    unused,
)

__all__ = [
    "ANYWHERE",
    "BUILTIN",
    "ENTRY_POINTS",
    "IN_NETWORKS",
    "Attend",
    "Impl",
    "Info",
    "Layer",
    "UnknownImplError",
    "get",
    "index",
    "info",
    "layers_only",
    "local_attention",
    "names",
    "source",
    "unused",
]
