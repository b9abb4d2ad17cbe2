"""The builds of the fused kernel that this machine runs, and how tests compile them."""

from __future__ import annotations

from dataclasses import replace

from sasa_bench.impls import _attention, _native
from sasa_bench.impls._native import Library

# The others differ from these in their products of matrices alone.
ATTENTION_BUILDS = [build for build in _native.executable_isas() if build not in _attention.ATTENTION]
# avx512_wide and avx512 multiply float32 as these do, and bfloat16 as the builds without AVX-512.
PRODUCT_BUILDS = [
    build
    for build in _native.executable_isas()
    if build not in {_attention.ATTENTION.get(b) for b in _native.executable_isas()}
]

as_published = _attention.kernels


def compiled_quickly(isa: str, timed: bool = False) -> list[Library]:
    """The libraries of a build: the one that this machine uses as published, others made by `quick`."""
    used = as_published(_native.chosen_isa())
    return [one if one in used else quick(one, widest=8) for one in as_published(isa, timed)]


def quick(library: Library, widest: int = 0) -> Library:
    """The same library in a fraction of the compiler's time: few optimisations, kernels for fewer widths of heads."""
    flags = tuple("-O1" if flag in ("-O2", "-O3") else flag for flag in library.flags)
    return replace(library, flags=(*flags, f"-DSASA_WIDEST={widest}"))
