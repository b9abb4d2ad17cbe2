"""Networks in torch: each description as a module, with local attention run by whatever kernel is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.networks import describe, image_shape, layers
from sasa_bench.networks.layers import STEM_HEADS, STEM_MIXTURES, STEM_WINDOW, Shape
from sasa_bench.networks.retinanet import BOX, CLASSES, RetinaNet

Function = Callable[..., Tensor]


class Kernel(Hashable, Protocol):
    """How local attention runs, as an implementation says it; see sasa_bench.impls.Impl."""

    @property
    def attend(self) -> Callable[[Case], Function] | None:
        """Case -> (q, k, v, rel_row, rel_col) -> y."""

    @property
    def layer(self) -> Callable[[Case], Function] | None:
        """Case -> (x, w_qkv, rel_row, rel_col) -> y, or None."""


MakeAttention = Callable[[layers.Attention, int], nn.Module]
"""(description, input channels) -> the module that computes it."""


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


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return y.relu_()


class Classifier(nn.Linear):
    """A pooled map [B, C, 1, 1] -> scores [B, classes]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class Detector(nn.Module):
    """The modules of a RetinaNet by name: image [B, 3, H, W] -> [B, A, 95], 91 class scores then 4 box offsets for each
    of A anchors; the anchors of level 3 first, row by row, six to a pixel."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        part = self.get_submodule
        x, maps = part("stem")(x), []
        for number in (1, 2, 3, 4):
            x = part(f"group{number}")(x)
            maps.append(x)
        merged = [part("lateral5")(maps[3])]
        for number in (4, 3):
            lateral = part(f"lateral{number}")(maps[number - 2])
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:]))
        levels = [part(f"smooth{number}")(level) for number, level in enumerate(merged, 3)]
        levels.append(part("down6")(levels[-1]))
        levels.append(part("down7")(levels[-1].relu()))

        def head(name: str, scalars: int) -> Tensor:
            module = part(name)
            return torch.cat([module(t).permute(0, 2, 3, 1).reshape(len(t), -1, scalars) for t in levels], dim=1)

        return torch.cat([head("classes", CLASSES), head("boxes", BOX)], dim=2)


def build(layer: layers.Layer, shape: Shape, attention: MakeAttention, inplace: bool = True) -> nn.Module:
    """The module of a description for images of `shape`; parameters are named after the layers of the description.

    `inplace` allows a relu to overwrite its input.
    """
    channels = shape[0]
    match layer:
        case layers.Conv(out, kernel_size, stride, bias):
            return nn.Conv2d(channels, out, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        case layers.BatchNorm():
            return nn.BatchNorm2d(channels)
        case layers.Relu():
            return nn.ReLU(inplace=inplace)
        case layers.Pool(kind, kernel_size, stride):
            overlap = kernel_size > stride
            padding = kernel_size // 2 if overlap else 0
            if kind == "max":
                return nn.MaxPool2d(kernel_size, stride, padding, ceil_mode=not overlap)
            return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode=not overlap)
        case layers.GlobalPool():
            return nn.AdaptiveAvgPool2d(1)
        case layers.Linear(out):
            return Classifier(layers.scalars(shape), out)
        case layers.Attention():
            return attention(layer, channels)
        case layers.AttentionStem(out, values):
            return AttentionStem(channels, out, values)
        case layers.Chain():
            chain = nn.Sequential()
            before: layers.Layer | None = None
            for name, inner, at in layer.steps(shape):
                # An attention kernel may keep its output for the backward pass.
                chain.add_module(name, build(inner, at, attention, not isinstance(before, layers.Attention)))
                before = inner
            return chain
        case layers.Residual(body, shortcut):
            return Residual(build(body, shape, attention), build(shortcut, shape, attention))
        case RetinaNet():
            parts = {name: (inner, at) for name, inner, at in layer.steps(shape)}
            return Detector({name: build(inner, at, attention) for name, (inner, at) in parts.items()})
    raise TypeError(f"no module for a layer of type {type(layer).__name__}")


def bind(case: Case, tensors: Mapping[str, Tensor], kernel: Kernel | None) -> nn.Module:
    """The network of a case with `tensors` (by parameter name, as `shapes` has them) as its very parameters.

    At mode "forward" batch norms use their statistics (mean 0, variance 1); in training those of the batch.
    `kernel` runs the attention; None is enough for a network without any.
    """
    x = tensors["x"]
    network = _network(case, kernel).to(device=x.device, dtype=x.dtype).train(case.mode != "forward")
    for name, tensor in tensors.items():
        if name == "x":
            continue
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        delattr(owner, leaf)
        setattr(owner, leaf, tensor)
    return network


def shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    """Name of the input "x" and of each parameter -> (shape, standard deviation of random values).

    The scales keep activations near unit variance through a deep network: He et al. 2015 for convolutions, half the
    weight for the batch norm that ends a residual branch.
    """
    with torch.device("meta"):
        network = _network(case, None)
    found: dict[str, tuple[tuple[int, ...], float]] = {"x": ((case.batch, *image_shape(case)), 1.0)}
    for name, parameter in network.named_parameters():
        path, _, leaf = name.rpartition(".")
        found[name] = (tuple(parameter.shape), _scale(network.get_submodule(path), path, leaf))
    return found


def _scale(owner: nn.Module, path: str, leaf: str) -> float:
    if isinstance(owner, (WindowAttention, AttentionStem)):
        return owner.random_scales()[leaf]
    if leaf == "bias":
        return 0.1
    if isinstance(owner, nn.BatchNorm2d):
        return 0.5 if path.endswith(("norm3", "shortcut.norm")) else 1.0
    return math.sqrt(2 / owner.weight[0].numel())  # type: ignore[index]


@dataclass(frozen=True)
class _NoKernel:
    attend: Callable[[Case], Function] | None = None
    layer: Callable[[Case], Function] | None = None


def _network(case: Case, kernel: Kernel | None) -> nn.Module:
    chosen = kernel or _NoKernel()

    def make(layer: layers.Attention, channels: int) -> nn.Module:
        return KernelAttention(
            chosen, channels, layer.kernel_size, layer.heads, layer.position, layer.border, layer.channels or None
        )

    return build(describe(case), image_shape(case), make)


def attention_cases(case: Case) -> Iterator[Case]:
    """The core of each attention layer in the network of a case, as a case of its own."""
    for layer, (channels, height, width) in layers.attentions(describe(case), image_shape(case)):
        relative = layer.position in ("relative", "relative_only")
        yield case.with_(
            scope="core",
            network="none",
            stem="none",
            attention_groups="none",
            channels=layer.channels or channels,
            resolution=f"{height}x{width}",
            position="relative" if relative else "none",
        )
