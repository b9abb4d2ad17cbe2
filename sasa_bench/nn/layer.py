"""LocalAttention2d and the networks of the paper, run by any implementation by name."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import torch
from torch import Tensor, nn

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.impls import Impl, Window
from sasa_bench.networks import describe, image_shape, layers
from sasa_bench.networks.attention import RELATIVE, WindowAttention
from sasa_bench.networks.build import build
from sasa_bench.networks.core import transforming, transforms_run
from sasa_bench.nn.choice import AUTO, LOADED, READY, Use, choose, constant_in_traces, ready, ready_in_trace, refuses
from sasa_bench.nn.stem import StemOf

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LocalAttention2d(WindowAttention):
    """Stand-alone self-attention of Ramachandran et al. 2019 (arXiv 1906.05909, equation 3) over K x K windows.

    y_ij = sum over ab in the window of softmax_ab(scale (q_ij . k_ab + q_ij . r_{a-i,b-j})) v_ab, for each of N heads
    of d = C / N channels. By default, as in the paper, scale is 1, and there is no bias and no output projection.

    x [B, channels, H, W] -> y [B, C, H, W] on the device of x, for maps of any size, an empty batch too; channels last
    if x is. y has the dtype of x, or that of torch.autocast where it is on, as with nn.Conv2d.

    channels      of x
    out_channels  C; as many as `channels` when None
    kernel_size   K, side of the window in pixels, or (Kh, Kw); odd
    heads         N; divides the output channels
    position      none; absolute: sines of row and column added to x; relative: r = (row, column) embeddings of d / 2
                  channels each; relative_only: q . r alone are the logits
    border        mask: pixels outside the map take no part in the softmax; zero: they do, with k = v = 0
    impl          the implementation that runs it, by name; see `sasa-bench list`. auto: the fastest that can; see
                  `sasa-bench doctor`
    bias          whether q, k, v and the output projection have one
    scale         factor of the logits; d ** -0.5 is that of transformers
    proj          whether a C x C projection follows, which mixes the heads
    dropout       probability of dropping a scalar of the output, in training
    stride        side of the average pool that follows, the paper's way to halve a map; H and W halve upwards

    Parameters: w_qkv [3 C, channels] (rows of q, k, v; of q, v with relative_only); with relative positions rel_row
    [N, d // 2, Kh] and rel_col [N, d - d // 2, Kw]; with bias b_qkv [3 C]; with proj w_out [C, C] and b_out [C]. They
    do not depend on `impl`, and `impl` may be changed at any time.

    Raises ValueError for a value outside its choices and for an input of another shape or dtype than said here;
    RuntimeError, at the first call, where the implementation cannot run this on this machine, or not under torch.func,
    forward-mode derivatives or an exporter: the message names one that can.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 7,
        *,
        heads: int = 8,
        position: str = "relative",
        border: str = "mask",
        impl: str = AUTO,
        bias: bool = False,
        scale: float = 1.0,
        proj: bool = False,
        dropout: float = 0.0,
        stride: int = 1,
    ) -> None:
        channels = _whole("channels", channels, 1)
        out_channels = channels if out_channels is None else _whole("out_channels", out_channels, 1)
        heads, stride = _whole("heads", heads, 1), _whole("stride", stride, 1)
        if out_channels != channels and out_channels % heads:
            raise ValueError(
                f"out_channels = {out_channels} do not split into heads = {heads}: give a multiple of {heads}, or "
                "other heads"
            )
        sides = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        if len(sides) != 2:
            raise ValueError(f"kernel_size = {kernel_size!r}: give one side in pixels, or two, (Kh, Kw)")
        rows, columns = (_whole("kernel_size", side, 1) for side in sides)
        for side in (rows, columns):
            Case(
                kernel_size=side,
                channels=out_channels,
                heads=heads,
                position="relative" if position == "relative_only" else position,
                border=border,
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r}: give a probability, 0 or more and less than 1")
        super().__init__(
            channels,
            (rows, columns),
            heads,
            position,
            border,
            out_channels,
            bias=bias,
            scale=_finite("scale", scale),
            proj=proj,
            dropout=float(dropout),
            stride=stride,
        )
        self.impl = impl

    @property
    def impl(self) -> str:
        """The name of the implementation, or "auto"."""
        return self._impl

    @impl.setter
    def impl(self, name: str) -> None:
        if name != AUTO:
            _attending(name)
        self._impl = name

    def kernel(self, x: Tensor) -> Impl:
        """The implementation that runs the attention of x; of "auto", the one that is chosen for it."""
        if self._forced is not None:
            return self._forced
        if torch.compiler.is_compiling():
            exported = _exported(x)
            grad = torch.is_grad_enabled()
            relative = self.position in RELATIVE
            arguments = (x.device.type, x.dtype, grad, exported, self.head_dim, self.window, relative)
            impl = getattr(LOADED, _ready_in_trace(self._impl, *arguments))
        else:
            # The legacy exporter traces.
            exported = "onnx" if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export() else ""
            if exported and self._impl != AUTO:
                _require_portable(impls.get(self._impl))  # before it is made ready, which would be traced
            impl = self._eager(x, exported)
        if exported == "open" and impl.core is not None and not impl.core.open_sizes:
            raise RuntimeError(f"torch.export would close the open sizes with {impl.name!r}: export with impl = 'auto'")
        if exported == "onnx":
            _require_portable(impl)
        return impl

    _forced: Impl | None = None
    """What runs instead of `impl` while the layer is exported."""

    def _eager(self, x: Tensor, exported: str) -> Impl:
        name, window = self._impl, self.window
        transformed = transforms_run() and transforming(x, self.w_qkv, self.b_qkv, self.rel_row, self.rel_col)
        if name == AUTO:
            key = (x.device.type, x.dtype, torch.is_grad_enabled(), exported, transformed, self.head_dim, window)
            name = _CHOSEN.get(key) or _CHOSEN.setdefault(key, ready(AUTO, Use(*key[:6]), window))
        impl = READY.get(name) or READY[ready(name, None, window)]
        refused: dict[str, str] = {}
        while impl.core is not None and (reason := impl.core.refuses(window, x, self.position in RELATIVE)):
            refused[impl.name] = reason
            if self._impl != AUTO:
                raise RuntimeError(_refusal(impl.name, reason))
            use = Use(x.device.type, x.dtype, torch.is_grad_enabled(), exported, transformed, self.head_dim)
            impl = READY[ready(AUTO, use, window, refused)]
        core = impl.core
        if core is not None and transformed and not core.transforms:
            use = Use(x.device.type, x.dtype, torch.is_grad_enabled(), transformed=True, width=self.head_dim)
            other = choose(use, window).name
            raise RuntimeError(
                f"torch.func and forward-mode derivatives do not go through {impl.name!r}: give impl = {other!r}"
            )
        return impl

    def _check(self, x: Tensor, w_qkv: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {list(x.shape)}: give [batch, {self.channels}, height, width]")
        if x.dtype == w_qkv.dtype and x.dtype in DTYPES:
            return
        name, have = (str(t.dtype).removeprefix("torch.") for t in (x, w_qkv))
        if x.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"x has dtype {name}: give {names}")
        if not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x has dtype {name} and the parameters {have}: convert one, such as module.to(x.dtype)")

    def extra_repr(self) -> str:
        words = [
            f"{self.channels}, kernel_size={self.kernel_size}, heads={self.heads}, position={self.position!r}, "
            f"border={self.border!r}, impl={self.impl!r}"
        ]
        told: dict[str, Any] = {
            "out_channels": (self.out_channels, self.channels),
            "bias": (self.b_qkv is not None, False),
            "scale": (self.scale, 1.0),
            "proj": (self.w_out is not None, False),
            "dropout": (self.dropout, 0.0),
            "stride": (self.stride, 1),
        }
        return ", ".join(words + [f"{name}={value!r}" for name, (value, usual) in told.items() if value != usual])


def network(
    name: str,
    stem: str = "conv",
    attention_groups: str = "1234",
    kernel_size: int = 7,
    heads: int = 8,
    position: str = "relative",
    border: str = "mask",
    impl: str = AUTO,
) -> nn.Module:
    """A network of the paper: x [B, 3, H, W] -> scores [B, 1000], or of a RetinaNet [B, A, 95].

    The arguments are the axes of a case at scope "network" and the implementation that runs the attention. A state dict
    of one fits the same network with any other implementation. An odd number of pixels halves upwards.

    name              resnet26, resnet38, resnet50, retinanet26, retinanet38 or retinanet50
    stem              conv, or attention: stand_alone, conv_values, aware_values
    attention_groups  the groups of the backbone whose 3 x 3 convolutions are attention, such as "34"; none for none
    kernel_size, heads, position, border, impl
                      of every attention layer, as for LocalAttention2d

    Raises CaseError for a value outside its axis and UnknownImplError for an unknown implementation.
    """
    case = Case(
        scope="network",
        network=name,
        stem=stem,
        attention_groups=attention_groups,
        kernel_size=_whole("kernel_size", kernel_size, 1),
        heads=_whole("heads", heads, 1),
        position=position,
        border=border,
    )

    if impl != AUTO:
        _attending(impl)

    def make(layer: layers.Attention, channels: int) -> LocalAttention2d:
        made = LocalAttention2d(
            channels,
            kernel_size=layer.kernel_size,
            heads=layer.heads,
            position=layer.position,
            border=layer.border,
            impl=impl,
            out_channels=layer.channels or None,
        )
        made._successors_keep = True
        return made

    return build(describe(case), image_shape(case), make, StemOf(impl))


_CHOSEN: dict[Any, str] = {}


@constant_in_traces
def _called_by(package: str) -> bool:
    """Whether a function of that package is on the stack: torch.onnx.export traces by torch.export and sets no flag."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
    return False


def _exported(x: Tensor) -> str:
    """By what a traced call is exported: see choice.Use."""
    if not torch.compiler.is_exporting():
        return ""
    if _called_by("torch.onnx"):
        return "onnx"
    return "open" if any(isinstance(n, torch.SymInt) for n in x.shape[2:]) else "fixed"


@constant_in_traces
def _ready_in_trace(
    name: str, device: str, dtype: torch.dtype, grad: bool, exported: str, width: int, window: Window, relative: bool
) -> str:
    use = Use(device, dtype, grad, exported, width=width)
    found = ready_in_trace(name, use, window)
    core = READY[found].core
    if core is not None and (reason := refuses(core, use, window, relative)):
        raise RuntimeError(_refusal(found, reason))
    return found


def _refusal(name: str, reason: str) -> str:
    return f"impl = {name!r}: {reason}; 'auto' chooses one that can"


def _whole(name: str, value: Any, least: int) -> int:
    """`value` as an int, whatever kind of whole number it is."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}: give a whole number, {least} or more") from None
    if number < least:
        raise ValueError(f"{name} = {value!r}: give a whole number, {least} or more")
    return number


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} = {value!r}: give a finite number")
    return number


def _attending(name: str) -> Impl:
    if name in READY:
        return READY[name]
    impl = impls.get(name)
    if impl.attend is None and impl.layer is None and impl.core is None:
        known = ", ".join([AUTO, *(n for n in impls.BUILTIN if n != name and _has_attend(n))])
        raise ValueError(f"implementation {name!r} computes no local attention inside a model: give one of {known}")
    return impl


def _has_attend(name: str) -> bool:
    try:
        return impls.get(name).attend is not None
    except ImportError:
        return False


def _require_portable(impl: Impl) -> None:
    if impl.core is None or not impl.core.portable:
        raise RuntimeError(f"{impl.name!r} has no ONNX operators: export with impl = 'auto' or sasa_bench.export")
