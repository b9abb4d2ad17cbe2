"""The stem of a network, by the implementation that runs its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sasa_bench.case import STEM_HEADS
from sasa_bench.impls import Window
from sasa_bench.networks.core import transforming
from sasa_bench.networks.layers import STEM_WINDOW
from sasa_bench.networks.stem import Norm
from sasa_bench.nn.choice import AUTO, LOADED, READY, Use, constant_in_traces, ready, ready_in_trace

BLOCK = Window(STEM_WINDOW + 1, STEM_WINDOW + 1, STEM_HEADS, "mask")
"""What `choose` is asked about: the smallest odd window that holds a block."""


@dataclass(frozen=True)
class StemOf:
    """The networks.stem.StemKernel of an implementation, `impl` its name or "auto".

    None, which leaves the stem to torch's own operators, where the implementation has no stem, in exports, and under
    torch.func and forward-mode derivatives.
    """

    impl: str

    def __call__(
        self, x: Tensor, parameters: Mapping[str, Tensor], norm: Norm
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return None
        if torch.compiler.is_compiling():
            impl = getattr(LOADED, _ready_in_trace(self.impl, x.device.type, x.dtype, torch.is_grad_enabled()))
        elif torch.onnx.is_in_onnx_export() or transforming(x, *parameters.values()):
            return None
        else:
            impl = READY[_ready(self.impl, x.device.type, x.dtype, torch.is_grad_enabled())]
        return None if impl.stem is None else impl.stem(x, parameters, norm)


@lru_cache(maxsize=256)
def _ready(impl: str, device: str, dtype: torch.dtype, grad: bool) -> str:
    return ready(impl, Use(device, dtype, grad) if impl == AUTO else None, BLOCK)


@constant_in_traces
def _ready_in_trace(impl: str, device: str, dtype: torch.dtype, grad: bool) -> str:
    return ready_in_trace(impl, Use(device, dtype, grad), BLOCK)
