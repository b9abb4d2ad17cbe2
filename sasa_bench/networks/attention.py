"""Local self-attention as a torch module, run by whatever kernel is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.networks.core import Core, Window, sizes, transforms_run
from sasa_bench.networks.kept import Kept, is_traced

Function = Callable[..., Tensor]

RELATIVE = ("relative", "relative_only")
"""The positions that have embeddings of rows and columns."""

PARAMETERS = ("w_qkv", "b_qkv", "rel_row", "rel_col", "w_out", "b_out")
"""In the order in which a forward pass takes them."""


class Kernel(Protocol):
    """How local attention runs, as an implementation says it; see sasa_bench.impls.Impl."""

    @property
    def attend(self) -> Callable[[Case], Function] | None:
        """Case -> (q, k, v, rel_row, rel_col) -> y."""

    @property
    def layer(self) -> Callable[[Case], Function] | None:
        """Case -> (x, w_qkv, rel_row, rel_col) -> y, or None."""


class WindowAttention(nn.Module):
    """Local self-attention x [B, C_in, H, W] -> y [B, C, H, W]; a subclass says which kernel runs it.

    Parameters, d = C / N: w_qkv [3 C, C_in] ([2 C, C_in] for q and v with position "relative_only"); with relative
    positions rel_row [N, d // 2, Kh] and rel_col [N, d - d // 2, Kw]; with `bias` b_qkv, as long as w_qkv; with `proj`
    w_out [C, C], and b_out [C] if there is a bias.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        heads: int,
        position: str,
        border: str,
        out_channels: int | None = None,
        *,
        bias: bool = False,
        scale: float = 1.0,
        proj: bool = False,
        dropout: float = 0.0,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        rows, columns = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        self.window = Window(rows, columns, heads, border)
        self.position, self.scale, self.dropout, self.stride = position, scale, dropout, stride
        c, half = self.out_channels, self.head_dim // 2
        projections = 2 if position == "relative_only" else 3
        self.w_qkv = nn.Parameter(torch.empty(projections * c, channels))
        relative = position in RELATIVE
        self.rel_row = nn.Parameter(torch.empty(heads, half, rows)) if relative else None
        self.rel_col = nn.Parameter(torch.empty(heads, self.head_dim - half, columns)) if relative else None
        self.b_qkv = nn.Parameter(torch.empty(projections * c)) if bias else None
        self.w_out = nn.Parameter(torch.empty(c, c)) if proj else None
        self.b_out = nn.Parameter(torch.empty(c)) if proj and bias else None
        self._kept = Kept()
        self.reset_parameters()

    @property
    def kernel_size(self) -> int | tuple[int, int]:
        """K, or (Kh, Kw) of a window that is not square."""
        rows, columns = self.window.rows, self.window.columns
        return rows if rows == columns else (rows, columns)

    @property
    def heads(self) -> int:
        """N."""
        return self.window.heads

    @property
    def border(self) -> str:
        """mask or zero."""
        return self.window.border

    @property
    def head_dim(self) -> int:
        """d, channels a head."""
        return self.out_channels // self.window.heads

    @property
    def one_product(self) -> bool:
        """Whether q, k and v, C channels each, are w_qkv x, as the layers of kernels compute them."""
        return self.channels == self.out_channels and self.b_qkv is None and self.position != "relative_only"

    def random_scales(self) -> dict[str, float]:
        """Standard deviations that give logits of unit variance for an input of unit variance."""
        scale = self.head_dim**-0.25
        projections = {"w_qkv": self.channels**-0.5 * scale, "w_out": self.out_channels**-0.5}
        return projections | {"rel_row": scale, "rel_col": scale, "b_qkv": 0.0, "b_out": 0.0}

    def reset_parameters(self) -> None:
        """Draw new parameters: logits of unit variance, values of the variance of the input, biases of 0."""
        scales = self.random_scales()
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                parameter.normal_(std=scales[name])
            self.w_qkv[-self.out_channels :] *= self.head_dim**0.25

    def kernel(self, x: Tensor) -> Kernel:
        """What runs the attention of x, already in the dtype in which it is computed."""
        raise NotImplementedError

    def _check(self, x: Tensor, w_qkv: Tensor) -> None:
        """Raises ValueError for an input that the layer does not take."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> y [B, C, H, W]."""
        held = self._parameters  # as attributes they are looked up in Python, a microsecond each
        parameters: list[Any] = [held[name] if name in held else getattr(self, name) for name in PARAMETERS]
        self._check(x, parameters[0])
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return self._forward(x, *parameters)
        # As a convolution does: everything in the dtype of autocast, nothing beneath it is cast again.
        dtype = torch.get_autocast_dtype(device)
        w_qkv, *others = (None if p is None else p.to(dtype) for p in parameters)
        assert w_qkv is not None
        with torch.autocast(device, enabled=False):
            return self._forward(x.to(dtype), w_qkv, *others)

    def _forward(
        self,
        x: Tensor,
        w_qkv: Tensor,
        b_qkv: Tensor | None,
        rel_row: Tensor | None,
        rel_col: Tensor | None,
        w_out: Tensor | None,
        b_out: Tensor | None,
    ) -> Tensor:
        kernel = self.kernel(x)
        core: Core | None = getattr(kernel, "core", None)
        given = x
        if self.position == "absolute":
            x = x + self._kept.get(sines, x, self.channels, *sizes(x)[2:])
        if self.scale != 1.0:
            w_qkv, b_qkv = self._scaled(w_qkv), None if b_qkv is None else self._scaled(b_qkv)
        whole = self.one_product
        if core is not None and whole and core.layer is not None:
            y = core.layer(self.window, x, w_qkv, rel_row, rel_col)
        elif core is None and whole and kernel.layer is not None:
            y = self._prepared(kernel, kernel.layer, "layer", x)(x, w_qkv, rel_row, rel_col)
        else:
            q, k, v = self._project(x.contiguous(), w_qkv, b_qkv)
            if core is not None:
                tables = core.tables and self._kept.get(core.tables, q, self.window, *sizes(q)[2:])
                y = core.run(self.window, tables, q, k, v, rel_row, rel_col)
            elif q.shape[0] == 0:
                y = q + k + v  # prepared for one image at least
            else:
                y = self._prepared(kernel, kernel.attend, "core", q)(q, k, v, rel_row, rel_col)
            if not x.is_contiguous() and followed_by_autograd(y):
                y.register_hook(Tensor.contiguous)  # a gradient that is channels-last is slow to read
        return self._output(given, y, core, w_out, b_out)

    def _project(self, x: Tensor, w_qkv: Tensor, b_qkv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        projected = F.conv2d(x, w_qkv[:, :, None, None], b_qkv)
        if self.position == "relative_only":
            q, v = projected.chunk(2, dim=1)
            return q, torch.zeros_like(q), v
        q, k, v = projected.chunk(3, dim=1)
        return q, k, v

    def _scaled(self, t: Tensor) -> Tensor:
        """A weight or bias with its part for the queries scaled, so that every logit is."""
        return torch.cat([t[: self.out_channels] * self.scale, t[self.out_channels :]])

    def _output(self, x: Tensor, y: Tensor, core: Core | None, w_out: Tensor | None, b_out: Tensor | None) -> Tensor:
        """What follows the attention: projection, pool, dropout, and the memory format of x."""
        attended = y
        if w_out is not None:
            y = F.conv2d(y, w_out[:, :, None, None], b_out)
        if self.stride > 1:
            y = F.avg_pool2d(y, self.stride, ceil_mode=True)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        if y is attended and y.requires_grad and not self._successors_keep and _must_stay(core, y):
            return y if torch.jit.is_tracing() else y.clone()  # a trace is made with gradients and checked without
        return y

    _successors_keep = False
    """Whether no module writes to what this one returns, as in the networks of `build`."""

    def _prepared(self, kernel: Kernel, make: Callable[[Case], Function] | None, scope: str, x: Tensor) -> Function:
        """`make(case)` for tensors of one size, of a kernel that prepares for it."""
        if make is None:
            raise RuntimeError(f"{_name(kernel)} computes no local attention inside a model: it has no `attend`")
        batch, _, height, width = sizes(x)
        if not all(isinstance(n, int) for n in (batch, height, width)):
            raise RuntimeError(f"{_name(kernel)} prepares for one size: export it with fixed sizes, or give a `core`")
        if self.window.rows != self.window.columns:
            raise RuntimeError(f"{_name(kernel)} has square windows, not {self.window.rows} x {self.window.columns}")
        layer = self.window, self.out_channels, self.rel_row is not None
        prepared: Function = self._kept.get(
            _prepare, x, kernel, make, scope, *layer, max(batch, 1), height, width, torch.is_grad_enabled()
        )
        return prepared


def _prepare(
    kernel: Kernel, make: Callable[[Case], Function], scope: str, window: Window, channels: int, relative: bool,
    batch: int, height: int, width: int, grad: bool, like: Tensor,
) -> Function:  # fmt: skip
    """Raises RuntimeError with the reason of an implementation that cannot do it."""
    name = str(like.dtype).removeprefix("torch.")
    supports = getattr(kernel, "supports", None)
    if supports and name not in DTYPE_BYTES:
        raise RuntimeError(f"{_name(kernel)} prepares for {', '.join(DTYPE_BYTES)}, not {name}: convert the module")
    case = Case(
        scope=scope,
        kernel_size=window.rows,
        channels=channels,
        heads=window.heads,
        resolution=f"{height}x{width}",
        batch=batch,
        position="relative" if relative else "none",
        border=window.border,
        dtype=name if name in DTYPE_BYTES else "float32",
        device="cuda" if like.device.type == "cuda" else "cpu",
        mode="training" if grad else "forward",
    )
    if supports:
        reason = supports(case) or kernel.missing()  # type: ignore[attr-defined]
        if reason:
            raise RuntimeError(reason)
    return make(case)


def _must_stay(core: Core | None, y: Tensor) -> bool:
    """Whether the backward pass reads y as it is now, so that no module behind may write to it."""
    return core is None or (core.keeps_output and (not core.recomputes or is_traced(y)))


def followed_by_autograd(t: Tensor) -> bool:
    """Whether a backward pass of eager mode will go through `t`, so that a hook on it runs."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_run()
    return t.requires_grad and not traced


def _name(kernel: Kernel) -> Any:
    return getattr(kernel, "name", kernel)


def sines(channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Absolute positions [C, H, W] without parameters, after Vaswani et al. 2017, section 3.5.

    Sines and cosines of the row in the first C // 2 channels, of the column in the rest, wavelengths from 2 pi to
    10000 * 2 pi.
    """
    device = like.device

    def axis(pixels: int, count: int) -> Tensor:
        index = torch.arange(count, device=device)
        wavelength = 10000.0 ** ((index - index % 2).double() / max(count, 1))
        angle = torch.arange(pixels, device=device).double() / wavelength[:, None]
        return torch.where((index % 2 == 0)[:, None], angle.sin(), angle.cos())

    rows = axis(height, channels // 2)[:, :, None].expand(-1, -1, width)
    columns = axis(width, channels - channels // 2)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns]).to(like.dtype)


class KernelAttention(WindowAttention):
    """Window attention by a kernel that is given as an object, such as the reference."""

    def __init__(self, kernel: Kernel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel = kernel
        self._successors_keep = True

    def kernel(self, x: Tensor) -> Kernel:
        return self._kernel
