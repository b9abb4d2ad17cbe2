"""What an attention core is: local attention of q, k and v of every size, inside a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sasa_bench.case import Case


@dataclass(frozen=True)
class Window:
    """What a core needs to know that its tensors do not say.

    rows, columns  Kh and Kw, sides of the window in pixels; odd
    heads          N; a head has d = C / N channels
    border         mask: pixels outside the map take no part in the softmax; zero: they do, with k = v = 0
    """

    rows: int
    columns: int
    heads: int
    border: str

    @classmethod
    def of(cls, case: Case) -> Window:
        """The window of a case."""
        return cls(case.kernel_size, case.kernel_size, case.heads, case.border)

    @property
    def radii(self) -> tuple[int, int]:
        """Pixels from the middle of the window to its upper and to its left edge."""
        return self.rows // 2, self.columns // 2

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """What the window needs around a map, in the order of torch.nn.functional.pad: left, right, top, bottom."""
        down, across = self.radii
        return across, across, down, down


Run = Callable[[Window, Any, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(window, tables, q, k, v [B, C, H, W], rel_row [N, d // 2, Kh] or None, rel_col [N, d - d // 2, Kw] or None) ->
y [B, C, H, W]."""

Layer = Callable[[Window, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(window, x [B, C, H, W], w_qkv [3 C, C], rel_row, rel_col) -> y [B, C, H, W]: projections and core in one call."""

Pack = Callable[[Window, Tensor, Tensor | None, Tensor | None, nn.BatchNorm2d | None, bool], Callable[[Tensor], Tensor]]


def _takes_all(window: Window, x: Tensor, relative: bool) -> str | None:
    return None


def _ready() -> None:
    return None


@dataclass(frozen=True)
class Core:
    """Local attention for tensors of every size, on whatever device they are; may be traced with symbolic sizes.

    run           the attention itself
    tables        None, or (window, height, width, like) -> what `run` needs that depends on the map's size alone, as a
                  tensor or a tuple of tensors on the device of `like`; its sizes may be symbolic
    layer         projections and core in one call, where that is faster
    refuses       (window, x or q, whether positions are relative) -> None, or why it cannot take tensors like this one
    load          makes it ready to run, such as by compiling it; called before the first `run`, outside of any trace
    pack          None, or (window, w_qkv, rel_row, rel_col, batch norm or None, whether a relu follows) -> layer, norm
                  and relu as one function of x, its weights packed once; no gradient
    compiled      called in the trace of a compiler, before the graph is optimized
    keeps_output  whether the backward pass reads y, so that nothing may overwrite it
    recomputes    whether, outside of traces, that pass computes y again where something has overwritten it
    transforms    whether forward-mode derivatives and torch.func go through it
    portable      whether it consists of torch's own operators alone, and so exports to ONNX
    open_sizes    whether torch.export keeps open sizes open: sizes that a core computes from them become conditions
    """

    run: Run
    tables: Callable[[Window, int, int, Tensor], Any] | None = None
    layer: Layer | None = None
    refuses: Callable[[Window, Tensor, bool], str | None] = _takes_all
    load: Callable[[], None] = _ready
    pack: Pack | None = None
    compiled: Callable[[], None] = _ready
    keeps_output: bool = False
    recomputes: bool = False
    transforms: bool = True
    portable: bool = True
    open_sizes: bool = True


def sizes(t: Tensor) -> tuple[int, int, int, int]:
    """batch, channels, height and width of `t`; plain numbers under torch.jit.trace, which follows one size."""
    batch, channels, height, width = t.shape
    if torch.jit.is_tracing():
        return int(batch), int(channels), int(height), int(width)
    return batch, channels, height, width


def transforms_run() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is open: quick to ask in every call."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def transforming(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode derivatives follow a call with these tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(*tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is a dual number of forward-mode derivatives."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
