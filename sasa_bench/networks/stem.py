"""The attention stem as torch modules: attention alone, and the whole stem, which a kernel may run in one pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import STEM_HEADS
from sasa_bench.networks.layers import STEM_MIXTURES, STEM_WINDOW


class Norm(NamedTuple):
    """A batch norm: weight and bias [C], and the mean and variance [C] that it uses, or None for those of the batch."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None
    eps: float


StemKernel = Callable[[Tensor, Mapping[str, Tensor], Norm], tuple[Tensor, Tensor | None, Tensor | None] | None]
"""(x [B, C_in, H, W], parameters of an AttentionStem by name, norm) -> (relu and 4 x 4 max pool of the normalised
attention [B, C, H / 4, W / 4], upwards; mean and variance [C] of the batch, where the norm uses those), or None where
the kernel cannot compute it and the plain modules shall."""


class Stem(nn.Sequential):
    """attention, norm, relu and pool of a stem, by their names; in one pass where `kernel` can.

    One after the other where a module was replaced, added or taken away, or has hooks.
    """

    def __init__(self, kernel: StemKernel | None) -> None:
        super().__init__()
        self.kernel = kernel

    attention: AttentionStem
    norm: nn.BatchNorm2d

    def __getitem__(self, index: slice | int) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None or not self._standard():
            return super().forward(x)
        norm = self.norm
        batch = norm.training or norm.running_mean is None
        used = (None, None) if batch else (norm.running_mean, norm.running_var)
        parameters = {name: getattr(self.attention, name) for name in self.attention.names}
        found = self.kernel(x, parameters, Norm(norm.weight, norm.bias, *used, norm.eps))
        if found is None:
            return super().forward(x)
        y, mean, variance = found
        if batch and norm.track_running_stats and mean is not None and variance is not None:
            self._track(mean, variance, x.shape[0] * x.shape[2] * x.shape[3])
        return y

    def _standard(self) -> bool:
        """Whether the modules are those that a kernel computes, with nothing around them."""
        if tuple((name, type(module)) for name, module in self._modules.items()) != _PARTS:
            return False
        pool = self._modules["pool"]
        assert isinstance(pool, nn.MaxPool2d)
        blocks = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
        return (
            self.norm.affine
            and blocks == (STEM_WINDOW, STEM_WINDOW, 0, 1, True, False)
            and not any(hooked(module) for module in self._modules.values())
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards those of the batch, as nn.BatchNorm2d does: an empty one moves none."""
        norm = self.norm
        assert norm.num_batches_tracked is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.num_batches_tracked.add_(1)
        if count == 0:
            return
        momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def hooked(module: nn.Module | None) -> bool:
    """Whether a module has hooks of its own, which see what goes in and out."""
    if module is None:
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


class AttentionStem(nn.Module):
    """Attention inside 4 x 4 blocks of an image: x [B, C_in, H, W] -> y [B, C, H, W]; see layers.AttentionStem.

    Parameters: w_qk [2 C, C_in]; w_v [C, C_in], [C, C_in, 4, 4] or [M C, C_in]; rel_row [N, d // 2, 7] and rel_col
    [N, d - d // 2, 7]; with aware_values emb_row [C, 4], emb_col [C, 4] and nu [M, C].
    A map whose sides are no multiples of 4 is filled up, and what was filled in takes no part in a softmax.
    """

    def __init__(self, channels: int, out_channels: int, values: str) -> None:
        super().__init__()
        self.channels, self.out_channels, self.values = channels, out_channels, values
        self.head_dim = out_channels // STEM_HEADS
        half, offsets = self.head_dim // 2, 2 * STEM_WINDOW - 1
        shape_v = {
            "stand_alone": (out_channels, channels),
            "conv_values": (out_channels, channels, STEM_WINDOW, STEM_WINDOW),
            "aware_values": (STEM_MIXTURES * out_channels, channels),
        }[values]
        self.w_qk = nn.Parameter(torch.empty(2 * out_channels, channels))
        self.w_v = nn.Parameter(torch.empty(shape_v))
        self.rel_row = nn.Parameter(torch.empty(STEM_HEADS, half, offsets))
        self.rel_col = nn.Parameter(torch.empty(STEM_HEADS, self.head_dim - half, offsets))
        if values == "aware_values":
            self.emb_row = nn.Parameter(torch.empty(out_channels, STEM_WINDOW))
            self.emb_col = nn.Parameter(torch.empty(out_channels, STEM_WINDOW))
            self.nu = nn.Parameter(torch.empty(STEM_MIXTURES, out_channels))
        self.names = tuple(name for name, _ in self.named_parameters())
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(std=self.random_scales()[name])

    def random_scales(self) -> dict[str, float]:
        """Standard deviations that give logits of unit variance for an input of unit variance."""
        scale, mixing = self.head_dim**-0.25, self.out_channels**-0.25
        fan_in = self.w_v[0].numel()
        projections = {"w_qk": self.channels**-0.5 * scale, "w_v": fan_in**-0.5, "rel_row": scale, "rel_col": scale}
        return projections | {"emb_row": mixing, "emb_col": mixing, "nu": mixing}

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = -height % STEM_WINDOW, -width % STEM_WINDOW
        x = F.pad(x, (0, right, 0, bottom))
        down, across = x.shape[-2] // STEM_WINDOW, x.shape[-1] // STEM_WINDOW
        pixels = _blocks(x)
        q, k = (self._heads(t) for t in F.linear(pixels, self.w_qk).chunk(2, dim=2))
        v = self._heads(self._values(x, pixels))
        logits = q @ k.transpose(2, 3) + self._positions(q)
        batch = x.shape[0]
        if bottom or right:
            inside = F.pad(x.new_ones(1, 1, height, width), (0, right, 0, bottom))
            logits = logits.masked_fill(_blocks(inside).repeat(batch, 1, 1).transpose(1, 2)[:, None] == 0, -torch.inf)
        y = (logits.softmax(3) @ v).view(batch, down, across, STEM_HEADS, STEM_WINDOW, STEM_WINDOW, self.head_dim)
        y = y.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, self.out_channels, *x.shape[-2:])
        return y[:, :, :height, :width]

    def _heads(self, t: Tensor) -> Tensor:
        """[blocks, 16, C] -> [blocks, N, 16, d]."""
        return t.unflatten(2, (STEM_HEADS, self.head_dim)).transpose(1, 2)

    def _positions(self, q: Tensor) -> Tensor:
        """q . r of each query and key of a block, [blocks, N, 16, 16]."""
        half, grid = self.head_dim // 2, q.unflatten(2, (STEM_WINDOW, STEM_WINDOW))
        step = torch.arange(STEM_WINDOW, device=q.device)
        offset = step - step[:, None] + STEM_WINDOW - 1
        by_row = torch.einsum("xnijd,ndia->xnija", grid[..., :half], self.rel_row[:, :, offset])
        by_column = torch.einsum("xnijd,ndjb->xnijb", grid[..., half:], self.rel_col[:, :, offset])
        return (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    def _values(self, x: Tensor, pixels: Tensor) -> Tensor:
        """v [blocks, 16, C] of x [B, C_in, H, W], or of its `pixels` [blocks, 16, C_in]."""
        if self.values == "conv_values":
            return _blocks(F.conv2d(F.pad(x, same_padding()), self.w_v))
        if self.values == "stand_alone":
            return F.linear(pixels, self.w_v)
        mixed = place_weights({name: getattr(self, name) for name in self.names})
        return torch.einsum("xpc,poc->xpo", pixels, mixed)


_PARTS = (("attention", AttentionStem), ("norm", nn.BatchNorm2d), ("relu", nn.ReLU), ("pool", nn.MaxPool2d))


def place_weights(parameters: Mapping[str, Tensor]) -> Tensor:
    """The value projection [16, C, C_in] of each place in a block, from the parameters of an AttentionStem without a
    convolution.

    A pixel's place in its block decides its mixture, so the weights are mixed, once a place, and not the values.
    """
    w_v = parameters["w_v"]
    if "nu" not in parameters:
        return w_v.expand(STEM_WINDOW**2, -1, -1)
    position = (parameters["emb_row"][:, :, None] + parameters["emb_col"][:, None, :]).flatten(1)
    share = (parameters["nu"] @ position).softmax(0)
    return torch.einsum("mp,moc->poc", share, w_v.unflatten(0, (STEM_MIXTURES, -1)))


def same_padding() -> tuple[int, int, int, int]:
    """What a 4 x 4 convolution of the values needs to keep the size of the map."""
    before = (STEM_WINDOW - 1) // 2
    after = STEM_WINDOW - 1 - before
    return before, after, before, after


def _blocks(t: Tensor) -> Tensor:
    """[B, C, H, W] -> [blocks, 16, C], the images' blocks one after the other."""
    side = STEM_WINDOW
    t = t.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return t.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
