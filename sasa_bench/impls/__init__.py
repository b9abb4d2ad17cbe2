"""How an op is computed: one file or folder for each implementation, and the registry that finds them by name."""

from sasa_bench.impls.implementation import (
    Attend,
    Exported,
    Impl,
    Info,
    Layer,
    attend_with,
    attends,
    layers_only,
    local_attention,
    no_libraries,
)
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
from sasa_bench.networks.core import Core, Window

__all__ = [
    "ANYWHERE",
    "BUILTIN",
    "ENTRY_POINTS",
    "IN_NETWORKS",
    "Attend",
    "Core",
    "Exported",
    "Impl",
    "Info",
    "Layer",
    "UnknownImplError",
    "Window",
    "attend_with",
    "attends",
    "get",
    "index",
    "info",
    "layers_only",
    "local_attention",
    "names",
    "no_libraries",
    "source",
    "unused",
]
