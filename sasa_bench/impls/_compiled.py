"""torch.compile for one case at a time, all of it in `build`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Core, Impl, Info, _native, attend_with, layers_only
from sasa_bench.ops.tensors import Call, Tensors, project, step

Function = Callable[[Tensors], Tensor]
"""Inputs and parameters by name -> y [B, C, H, W]."""


def missing() -> str | None:
    """None, or that there is no C++ compiler, and the command that installs one."""
    return _native.missing_compiler()


def one_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a Python function as one graph for one size.

    torch keeps what it compiled by code object, and after eight cases of one it would run the next ones uncompiled: so
    the function gets a code object of its own.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    graph: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False)
    return graph


def compiled(
    name: str,
    summary: str,
    function: Callable[[Case], Function],
    supports: Callable[[Case], str | None] = lambda case: None,
) -> Impl:
    """An implementation of local attention whose `function(case)` holds graphs made by `one_graph`.

    Every pass of the mode runs once in `build`, so that the column build_s holds all of the compiling. Nothing is taken
    from a cache on disk: build_s is what a fresh machine waits.
    """

    def build(case: Case, tensors: Tensors) -> Call:
        run = function(case)

        def call() -> Tensor:
            return run(tensors)

        grad_y = torch.ones(case.batch, case.channels, case.height, case.width).to(next(iter(tensors.values())))
        with compiler(case):
            step(case, call, tensors, grad_y)()
        return call

    return Impl(
        name=name,
        op=ops.get("local_attention"),
        summary=summary,
        build=build,
        supports=lambda case: layers_only(case) or supports(case),
        missing=missing,
        poisoned=False,
        info=Info(quick=False),
    )


def compiled_attention(
    name: str,
    summary: str,
    core: Core,
    supports: Callable[[Case], str | None] = lambda case: None,
) -> Impl:
    """Local attention from its core: projections, at scope "layer", and core are one graph; see `compiled`."""

    def function(case: Case) -> Function:
        attended = attend_with(core)(case)

        def whole(tensors: Tensors) -> Tensor:
            return attended(*project(case, tensors), tensors.get("rel_row"), tensors.get("rel_col"))

        return one_graph(whole)

    return compiled(name, summary, function, supports)


@contextmanager
def compiler(case: Case) -> Iterator[None]:
    """How the compiler is set: an empty cache, no processes that stay, and a graph that may be walked back again."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    keep_graph = torch._functorch.config.patch(donated_buffer=case.mode != "backward")
    settings = {"compile_threads": 1, "cpp.cxx": (_native.bare_compiler(),)}
    with fresh_cache(), torch._inductor.config.patch(settings), keep_graph:
        yield
