"""The registry: every implementation by name, one file each.

To add one, write sasa_bench/impls/NAME.py that defines `IMPL` and add a line to BUILTIN. Nothing else names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.networks import modules as networks
from sasa_bench.ops.tensors import LOCAL_ATTENTION, Call, Op, Tensors, add_absolute, project
from sasa_bench.results.record import ImplInfo

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(q, k, v [B, C, H, W], rel_row [N, d // 2, K] or None, rel_col [N, d - d // 2, K] or None) -> y [B, C, H, W]."""

Layer = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(x [B, C, H, W], w_qkv [3 C, C], rel_row, rel_col) -> y [B, C, H, W]: projections and core in one call."""


def _everything(case: Case) -> str | None:
    return None


def layers_only(case: Case) -> str | None:
    """Why an implementation of a single layer cannot do a case, for `supports`."""
    return "this is a layer, not a network" if case.scope == "network" else None


def _nothing_missing() -> str | None:
    return None


def _no_details() -> list[str]:
    return []


def _itself(case: Case) -> Case:
    return case


@dataclass(frozen=True, kw_only=True)
class Impl:
    """How an op is computed.

    name      as written in suites
    op        what is computed; its reference judges the result
    summary   one line for people
    build     (case, tensors) -> call; `call()` computes y from those very tensors, so set-up is not timed. The
              tensors are those of op.shapes in the dtype and on the device of the case. A call with an attribute
              `figures`, a dict from column name (with its unit) to number, adds these columns to its row
    supports  case -> None, or the reason why this implementation cannot do it
    missing   None, or what this machine lacks and the command that would help; must be cheap
    computes  case -> the case that is really computed (conv3x3 always has a 3 x 3 window)
    attend    for local attention: case -> the core as a function of tensors, for use inside models
    layer     for local attention: case -> projections and core as one function, where that is faster
    details   lines for `sasa-bench doctor`: what is built, cached or chosen on this machine; must be cheap
    quick     whether a build takes well under a second; tests draw fewer shapes for one that does not
    poisoned  whether it is checked while torch fills new memory with NaN, which needs deterministic algorithms: for
              these torch.compile would make another program than the one that is timed
    differs   for the work of others that is put next to local attention and is another function, with an op of its
              own: how it differs, as the end of a sentence; readers mark its name
    exports, any_size, library
              of one that runs an exported file: see record.ImplInfo
    """

    name: str
    op: Op
    summary: str
    build: Callable[[Case, Tensors], Call]
    supports: Callable[[Case], str | None] = _everything
    missing: Callable[[], str | None] = _nothing_missing
    computes: Callable[[Case], Case] = _itself
    attend: Callable[[Case], Attend] | None = None
    layer: Callable[[Case], Layer] | None = None
    details: Callable[[], list[str]] = _no_details
    quick: bool = True
    poisoned: bool = True
    differs: str = ""
    exports: str = ""
    any_size: bool = False
    library: bool = False


def local_attention(
    name: str,
    summary: str,
    attend: Callable[[Case], Attend],
    *,
    layer: Callable[[Case], Layer] | None = None,
    supports: Callable[[Case], str | None] = _everything,
    missing: Callable[[], str | None] = _nothing_missing,
    details: Callable[[], list[str]] = _no_details,
) -> Impl:
    """An implementation of local attention from its core, at every scope; of a network it runs the attention layers.

    `attend(case)` prepares what depends on the case alone (masks, indices) and returns the core as a function.
    """

    def build(case: Case, tensors: Tensors) -> Call:
        if case.scope == "network":
            network = networks.bind(case, tensors, impl)
            return lambda: network(tensors["x"])
        rel_row, rel_col = tensors.get("rel_row"), tensors.get("rel_col")
        if layer is not None and case.scope == "layer":
            whole = layer(case)
            return lambda: whole(add_absolute(case, tensors), tensors["w_qkv"], rel_row, rel_col)
        core = attend(case)
        return lambda: core(*project(case, tensors), rel_row, rel_col)

    def supports_each(case: Case) -> str | None:
        cases = networks.attention_cases(case) if case.scope == "network" else [case]
        return next((reason for reason in map(supports, cases) if reason), None)

    impl = Impl(
        name=name,
        op=LOCAL_ATTENTION,
        summary=summary,
        build=build,
        supports=supports_each,
        missing=missing,
        attend=attend,
        layer=layer,
        details=details,
    )
    return impl


BUILTIN = {
    "reference": "sasa_bench.impls.reference:IMPL",
    "naive": "sasa_bench.impls.naive:IMPL",
    "unfold": "sasa_bench.impls.unfold:IMPL",
    "blocked": "sasa_bench.impls.blocked:IMPL",
    "gathered": "sasa_bench.impls.gathered:IMPL",
    "fused": "sasa_bench.impls.fused:IMPL",
    "cuda": "sasa_bench.impls.cuda:IMPL",
    "onnx_unfold": "sasa_bench.impls.unfold:ONNX",
    "onnx_blocked": "sasa_bench.impls.blocked:ONNX",
    "onnx": "sasa_bench.impls.gathered:ONNX",
    "onnx_dynamic": "sasa_bench.impls.gathered:ONNX_DYNAMIC",
    "onnx_fused": "sasa_bench.impls.onnx_fused:IMPL",
    "onnx_conv3x3": "sasa_bench.impls.convolution:ONNX_CONV3X3",
    "conv3x3": "sasa_bench.impls.convolution:CONV3X3",
    "conv_kxk": "sasa_bench.impls.convolution:CONV_KXK",
    "depthwise_kxk": "sasa_bench.impls.convolution:DEPTHWISE_KXK",
    "conv1x1": "sasa_bench.impls.convolution:CONV1X1",
    "global_attention": "sasa_bench.impls.global_attention:IMPL",
    "squeeze_excitation": "sasa_bench.impls.squeeze_excitation:IMPL",
    "non_local": "sasa_bench.impls.non_local:IMPL",
    "criss_cross": "sasa_bench.impls.criss_cross:IMPL",
    "sdpa_dense": "sasa_bench.impls.sdpa_dense:IMPL",
    "flex_attention": "sasa_bench.impls.flex_attention:IMPL",
    "compiled_unfold": "sasa_bench.impls.unfold:COMPILED",
    "compiled_blocked": "sasa_bench.impls.blocked:COMPILED",
    "natten": "sasa_bench.impls.natten:IMPL",
    "halo_attention": "sasa_bench.impls.halo_attention:IMPL",
    "leaderj1001": "sasa_bench.impls.leaderj1001:IMPL",
}
"""Name -> "module:object" of each implementation that comes with the package."""

ANYWHERE = "unfold"
"""The local attention that runs on every device and in every dtype, forward and backward."""

IN_NETWORKS = ("conv3x3", "unfold", "fused", "cuda")
"""What whole networks are timed with, where it is registered and the machine can run it."""

ENTRY_POINTS = "sasa_bench.impls"
"""The entry-point group through which other packages register theirs; each entry is an Impl."""


class UnknownImplError(ValueError):
    """A name that no implementation has, or a file that defines none."""


def names() -> list[str]:
    """Every registered name, in the order of the table: built in first, then those of other packages."""
    return [*BUILTIN, *(name for name in sorted(_plugins()) if name not in BUILTIN)]


def index(name: str) -> int:
    """The place of an implementation in the registry; one that comes from a file stands behind all others."""
    known = names()
    return known.index(name) if name in known else len(known)


def info(impl: Impl) -> ImplInfo:
    """What readers know of it."""
    return ImplInfo(
        impl.name,
        impl.op.name,
        impl.summary,
        index(impl.name),
        impl.differs,
        impl.exports,
        impl.any_size,
        impl.library,
    )


def get(name: str) -> Impl:
    """The implementation of that name, or the IMPL of that .py file. Raises UnknownImplError."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    elif name in (plugins := _plugins()):
        found = plugins[name].load()
    else:
        raise UnknownImplError(
            f"unknown implementation {name!r}: there are {', '.join(names())}; a file of your own is named by its path"
        )
    return _checked(found, name)


def _plugins() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}


def _from_file(path: Path) -> Impl:
    if not path.is_file():
        raise UnknownImplError(f"{path}: no such file; give the path of a Python file that defines IMPL")
    spec = importlib.util.spec_from_file_location(f"sasa_bench_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownImplError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return _checked(getattr(module, "IMPL", None), str(path))


def _checked(found: object, source: str) -> Impl:
    if not isinstance(found, Impl):
        raise UnknownImplError(f"{source} must define IMPL, a sasa_bench.impls.Impl; found {type(found).__name__}")
    return found
