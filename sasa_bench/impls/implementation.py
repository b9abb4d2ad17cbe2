"""What an implementation is, and how one of local attention is made from its core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls._native import Library
from sasa_bench.impls._phases import Phases
from sasa_bench.networks import attention_cases
from sasa_bench.networks.build import bind
from sasa_bench.networks.core import Core, Window
from sasa_bench.networks.stem import StemKernel
from sasa_bench.ops.network import holds
from sasa_bench.ops.op import Op
from sasa_bench.ops.tensors import Call, Tensors, add_absolute, dtype_of, project

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(q, k, v [B, C, H, W], rel_row [N, d // 2, K] or None, rel_col [N, d - d // 2, K] or None) -> y [B, C, H, W]."""

Layer = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(x [B, C, H, W], w_qkv [3 C, C], rel_row, rel_col) -> y [B, C, H, W]: projections and core in one call."""


def _everything(case: Case) -> str | None:
    return None


def layers_only(case: Case) -> str | None:
    """Why an implementation of a single layer cannot do a case, for `supports`."""
    return "this is a layer, not a network or a stem" if holds(case) else None


def attends(case: Case) -> bool:
    """Whether a case has attention over windows of q, k and v, which a stem alone and a plain network have not."""
    return not holds(case) or any(attention_cases(case))


def _nothing_missing() -> str | None:
    return None


def no_libraries(case: Case) -> Sequence[Library]:
    """For an implementation without native code."""
    return ()


def _no_kernels(case: Case) -> list[tuple[str, str]]:
    return []


def _no_details() -> list[str]:
    return []


def _itself(case: Case) -> Case:
    return case


@dataclass(frozen=True, kw_only=True)
class Info:
    """What only readers and tests need to know of an implementation; computing does without.

    details   lines for `sasa-bench doctor`: what is built, cached or chosen on this machine; must be cheap
    phases    (call, threads, number of calls) -> where its time goes inside a kernel that profilers see as one piece
    kernels   case -> (source, template instance) of the CUDA kernels that it may launch, for `sasa-bench prebuild`
    native    the native libraries that a case needs, so that those of several implementations are compiled at once
    quick     whether a build takes well under a second; tests draw fewer shapes for one that does not
    differs   for the work of others that is put next to local attention and is another function, with an op of its
              own: how it differs, as the end of a sentence; readers mark its name
    exports, any_size, library
              of one that runs an exported file: see record.ImplInfo
    """

    details: Callable[[], list[str]] = _no_details
    kernels: Callable[[Case], list[tuple[str, str]]] = _no_kernels
    native: Callable[[Case], Sequence[Library]] = no_libraries
    phases: Callable[[Callable[[], object], int, int], Phases] | None = None
    quick: bool = True
    differs: str = ""
    exports: str = ""
    any_size: bool = False
    library: bool = False


@dataclass(frozen=True)
class Exported:
    """What an implementation that runs an exported file makes of an attention layer in a model that is exported.

    core     the attention of the file
    library  makes the library of custom operators that the file needs and returns its path, or None
    """

    core: Core
    library: Callable[[], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Impl:
    """How an op is computed.

    name      as written in suites
    op        what is computed; results are checked against its reference
    summary   one line for people
    build     (case, tensors) -> call; `call()` computes y from those very tensors, so set-up is not timed. The
              tensors are those of op.shapes in the dtype and on the device of the case. A call with an attribute
              `figures`, a dict from column name (with its unit) to number, adds these columns to its row
    ahead     makes what `build` of the same case and parameters then finds on disk, in another process perhaps: what
              takes seconds is made by several processes before anything is timed
    supports  case -> None, or the reason why this implementation cannot do it
    missing   None, or what this machine lacks and the command that would help; must be cheap
    computes  case -> the case that is really computed (conv3x3 always has a 3 x 3 window)
    attend    for local attention: case -> the core as a function of tensors of one size, for use inside models
    layer     for local attention: case -> projections and core as one function, where that is faster
    core      for local attention: the core for tensors of every size, which models prefer to the two above
    exported  for local attention that runs an exported file: what it makes of the layers of a model
    stem      for local attention: a whole stem in one pass, for use inside models; see networks.stem.StemKernel
    poisoned  whether it is checked while torch fills new memory with NaN, which needs deterministic algorithms: for
              these torch.compile would make another program than the one that is timed
    info      what only readers and tests need
    """

    name: str
    op: Op
    summary: str
    build: Callable[[Case, Tensors], Call]
    ahead: Callable[[Case, Tensors], object] | None = None
    supports: Callable[[Case], str | None] = _everything
    missing: Callable[[], str | None] = _nothing_missing
    computes: Callable[[Case], Case] = _itself
    attend: Callable[[Case], Attend] | None = None
    layer: Callable[[Case], Layer] | None = None
    core: Core | None = None
    exported: Exported | None = None
    stem: StemKernel | None = None
    poisoned: bool = True
    info: Info = field(default_factory=Info)


def attend_with(core: Core) -> Callable[[Case], Attend]:
    """What `core` is for one case, its tables made ahead."""

    def attend(case: Case) -> Attend:
        core.load()
        window = Window.of(case)
        tables = None
        if core.tables is not None:
            like = torch.empty(0, dtype=dtype_of(case), device=case.device)
            tables = core.tables(window, case.height, case.width, like)
        return lambda q, k, v, rel_row, rel_col: core.run(window, tables, q, k, v, rel_row, rel_col)

    return attend


def layer_with(core: Core) -> Callable[[Case], Layer] | None:
    """The layer of `core`, if it has one, for one case."""
    whole = core.layer
    if whole is None:
        return None

    def layer(case: Case) -> Layer:
        core.load()
        return partial(whole, Window.of(case))

    return layer


def local_attention(
    name: str,
    summary: str,
    attend: Callable[[Case], Attend] | None = None,
    *,
    core: Core | None = None,
    layer: Callable[[Case], Layer] | None = None,
    stem: StemKernel | None = None,
    supports: Callable[[Case], str | None] = _everything,
    missing: Callable[[], str | None] = _nothing_missing,
    details: Callable[[], list[str]] = _no_details,
    phases: Callable[[Callable[[], object], int, int], Phases] | None = None,
    native: Callable[[Case], Sequence[Library]] = no_libraries,
) -> Impl:
    """An implementation of local attention from its core, at every scope; of a network it runs the attention layers.

    `attend(case)` prepares what depends on the case alone (masks, indices) and returns the core as a function. With
    `core`, which takes tensors of every size, `layer` comes from it, and `attend` where none is given; such an
    implementation can be compiled and exported with open sizes.
    """
    if core is not None:
        attend, layer = attend or attend_with(core), layer_with(core)
    if attend is None:
        raise TypeError(f"local_attention({name!r}) has no kernel: give attend, a function of a case, or core")
    prepare = attend

    def build(case: Case, tensors: Tensors) -> Call:
        if holds(case):
            if core is not None and attends(case):
                core.load()
            network = bind(case, tensors, impl)
            return lambda: network(tensors["x"])
        rel_row, rel_col = tensors.get("rel_row"), tensors.get("rel_col")
        if layer is not None and case.scope == "layer":
            whole = layer(case)
            return lambda: whole(add_absolute(case, tensors), tensors["w_qkv"], rel_row, rel_col)
        attended = prepare(case)
        return lambda: attended(*project(case, tensors), rel_row, rel_col)

    def supports_each(case: Case) -> str | None:
        cases = [case]
        if holds(case):
            pixel = Case(scope="core", resolution=1, dtype=case.dtype, device=case.device, mode=case.mode)
            cases = list(attention_cases(case)) or [pixel]
        return next((reason for reason in map(supports, cases) if reason), None)

    impl = Impl(
        name=name,
        op=ops.get("local_attention"),
        summary=summary,
        build=build,
        supports=supports_each,
        missing=missing,
        attend=attend,
        layer=layer,
        core=core,
        stem=stem,
        info=Info(details=details, phases=phases, native=native),
    )
    return impl
