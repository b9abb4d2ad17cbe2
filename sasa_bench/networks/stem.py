"""The attention stem as a torch module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.networks.layers import STEM_HEADS, STEM_MIXTURES, STEM_WINDOW


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
        step = torch.arange(STEM_WINDOW)
        self.register_buffer("offset", step - step[:, None] + STEM_WINDOW - 1, persistent=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(std=self.random_scales()[name])

    offset: Tensor

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
        if bottom or right:
            inside = F.pad(x.new_ones(1, 1, height, width), (0, right, 0, bottom))
            logits = logits.masked_fill(_blocks(inside).repeat(len(x), 1, 1).transpose(1, 2)[:, None] == 0, -torch.inf)
        y = (logits.softmax(3) @ v).view(len(x), down, across, STEM_HEADS, STEM_WINDOW, STEM_WINDOW, self.head_dim)
        y = y.permute(0, 3, 6, 1, 4, 2, 5).reshape(len(x), self.out_channels, *x.shape[-2:])
        return y[:, :, :height, :width]

    def _heads(self, t: Tensor) -> Tensor:
        """[blocks, 16, C] -> [blocks, N, 16, d]."""
        return t.unflatten(2, (STEM_HEADS, self.head_dim)).transpose(1, 2)

    def _positions(self, q: Tensor) -> Tensor:
        """q . r of each query and key of a block, [blocks, N, 16, 16]."""
        half, grid = self.head_dim // 2, q.unflatten(2, (STEM_WINDOW, STEM_WINDOW))
        by_row = torch.einsum("xnijd,ndia->xnija", grid[..., :half], self.rel_row[:, :, self.offset])
        by_column = torch.einsum("xnijd,ndjb->xnijb", grid[..., half:], self.rel_col[:, :, self.offset])
        return (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    def _values(self, x: Tensor, pixels: Tensor) -> Tensor:
        """v [blocks, 16, C] of x [B, C_in, H, W], or of its `pixels` [blocks, 16, C_in]."""
        if self.values == "conv_values":
            before = (STEM_WINDOW - 1) // 2
            after = STEM_WINDOW - 1 - before
            return _blocks(F.conv2d(F.pad(x, (before, after, before, after)), self.w_v))
        if self.values == "stand_alone":
            return F.linear(pixels, self.w_v)
        position = (self.emb_row[:, :, None] + self.emb_col[:, None, :]).flatten(1)
        share = (self.nu @ position).softmax(0)
        # A pixel's place in its block decides its mixture, so the weights are mixed, once a place, and not the values.
        mixed = torch.einsum("mp,moc->poc", share, self.w_v.unflatten(0, (STEM_MIXTURES, -1)))
        return torch.einsum("xpc,poc->xpo", pixels, mixed)


def _blocks(t: Tensor) -> Tensor:
    """[B, C, H, W] -> [blocks, 16, C], the images' blocks one after the other."""
    side = STEM_WINDOW
    t = t.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return t.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
