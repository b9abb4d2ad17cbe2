"""Local self-attention as a torch module, run by whatever kernel is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import DTYPE_BYTES, Case

Function = Callable[..., Tensor]


class Kernel(Hashable, Protocol):
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
    positions rel_row [N, d // 2, K] and rel_col [N, d - d // 2, K]. There is no bias.
    """

    def __init__(
        self, channels: int, kernel_size: int, heads: int, position: str, border: str, out_channels: int | None = None
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.kernel_size, self.heads, self.position, self.border = kernel_size, heads, position, border
        c, half = self.out_channels, self.head_dim // 2
        projections = 2 if position == "relative_only" else 3
        self.w_qkv = nn.Parameter(torch.empty(projections * c, channels))
        if position in ("relative", "relative_only"):
            self.rel_row = nn.Parameter(torch.empty(heads, half, kernel_size))
            self.rel_col = nn.Parameter(torch.empty(heads, self.head_dim - half, kernel_size))
        else:
            self.rel_row = self.rel_col = None  # type: ignore[assignment]
        self.reset_parameters()

    @property
    def head_dim(self) -> int:
        """d, channels a head."""
        return self.out_channels // self.heads

    def random_scales(self) -> dict[str, float]:
        """Standard deviations that give logits of unit variance for an input of unit variance."""
        scale = self.head_dim**-0.25
        return {"w_qkv": self.channels**-0.5 * scale, "rel_row": scale, "rel_col": scale}

    def reset_parameters(self) -> None:
        """Draw parameters anew: logits of unit variance, values of the variance of the input."""
        scales = self.random_scales()
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                parameter.normal_(std=scales[name])
            self.w_qkv[-self.out_channels :] *= self.head_dim**0.25

    def kernel(self) -> Kernel:
        """What runs the attention."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if self.position == "absolute":
            x = x + sines(self.channels, height, width, x.dtype, x.device)
        key = (self.kernel_size, self.out_channels, self.heads, self.rel_row is not None, self.border)
        prepare = (*key, height, width, batch, x.dtype, x.device.type, torch.is_grad_enabled())
        if self.position == "relative_only":
            q, v = F.conv2d(x, self.w_qkv[:, :, None, None]).chunk(2, dim=1)
            return prepared(self.kernel(), False, *prepare)(q, torch.zeros_like(q), v, self.rel_row, self.rel_col)
        kernel = self.kernel()
        if kernel.layer is not None and self.channels == self.out_channels:
            return prepared(kernel, True, *prepare)(x, self.w_qkv, self.rel_row, self.rel_col)
        q, k, v = F.conv2d(x, self.w_qkv[:, :, None, None]).chunk(3, dim=1)
        return prepared(kernel, False, *prepare)(q, k, v, self.rel_row, self.rel_col)


@lru_cache(maxsize=256)
def prepared(
    kernel: Kernel,
    whole: bool,
    kernel_size: int,
    channels: int,
    heads: int,
    relative: bool,
    border: str,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    grad: bool,
) -> Function:
    """The layer (`whole`) or the core of `kernel` for tensors of that shape, prepared once and kept.

    Raises RuntimeError with the reason of an implementation that cannot do it.
    """
    name = str(dtype).removeprefix("torch.")
    case = Case(
        scope="layer" if whole else "core",
        kernel_size=kernel_size,
        channels=channels,
        heads=heads,
        resolution=f"{height}x{width}",
        batch=batch,
        position="relative" if relative else "none",
        border=border,
        dtype=name if name in DTYPE_BYTES else "float32",
        device=device,
        mode="training" if grad else "forward",
    )
    reasons: list[Callable[[], str | None]] = []
    if supports := getattr(kernel, "supports", None):
        reasons = [lambda: supports(case), kernel.missing]  # type: ignore[attr-defined]
    for reason in reasons:
        if said := reason():
            raise RuntimeError(said)
    make = kernel.layer if whole else kernel.attend
    if make is None:
        label = getattr(kernel, "name", kernel)
        raise RuntimeError(f"{label} computes no local attention inside a model: it has no `attend`")
    return make(case)


@lru_cache(maxsize=64)
def sines(channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Absolute positions [C, H, W] without parameters, after Vaswani et al. 2017, section 3.5.

    Sines and cosines of the row in the first C // 2 channels, of the column in the rest, wavelengths from 2 pi to
    10000 * 2 pi.
    """

    def axis(pixels: int, count: int) -> Tensor:
        index = torch.arange(count, device=device)
        wavelength = 10000.0 ** ((index - index % 2).double() / max(count, 1))
        angle = torch.arange(pixels, device=device).double() / wavelength[:, None]
        return torch.where((index % 2 == 0)[:, None], angle.sin(), angle.cos())

    rows = axis(height, channels // 2)[:, :, None].expand(-1, -1, width)
    columns = axis(width, channels - channels // 2)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns]).to(dtype)


class KernelAttention(WindowAttention):
    """Window attention by a kernel that is given as an object, such as the reference."""

    def __init__(self, kernel: Kernel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel = kernel

    def kernel(self) -> Kernel:
        return self._kernel
