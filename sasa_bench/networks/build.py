"""Networks in torch: each description as a module, with local attention run by whatever kernel is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.networks import describe, image_shape, layers
from sasa_bench.networks.attention import Function, Kernel, KernelAttention, WindowAttention
from sasa_bench.networks.layers import Shape
from sasa_bench.networks.retinanet import BOX, CLASSES, RetinaNet
from sasa_bench.networks.stem import AttentionStem, Stem, StemKernel

MakeAttention = Callable[[layers.Attention, int], nn.Module]
"""(description, input channels) -> the module that computes it."""


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
            return torch.cat(
                [module(t).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, scalars)) for t in levels], dim=1
            )

        return torch.cat([head("classes", CLASSES), head("boxes", BOX)], dim=2)


def build(
    layer: layers.Layer,
    shape: Shape,
    attention: MakeAttention,
    stem: StemKernel | None = None,
    inplace: bool = True,
) -> nn.Module:
    """The module of a description for images of `shape`; parameters are named after the layers of the description.

    `stem` runs attention stems in one pass; `inplace` allows a relu to overwrite its input.
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
            stemmed = any(isinstance(inner, layers.AttentionStem) for _, inner in layer.layers)
            chain = Stem(stem) if stemmed else nn.Sequential()
            before: layers.Layer | None = None
            for name, inner, at in layer.steps(shape):
                # An attention kernel may keep its output for the backward pass.
                chain.add_module(name, build(inner, at, attention, stem, not isinstance(before, layers.Attention)))
                before = inner
            return chain
        case layers.Residual(body, shortcut):
            return Residual(build(body, shape, attention, stem), build(shortcut, shape, attention, stem))
        case RetinaNet():
            parts = {name: (inner, at) for name, inner, at in layer.steps(shape)}
            return Detector({name: build(inner, at, attention, stem) for name, (inner, at) in parts.items()})
    raise TypeError(f"no module for a layer of type {type(layer).__name__}")


def bind(case: Case, tensors: Mapping[str, Tensor], kernel: Kernel | None) -> nn.Module:
    """The network or stem of a case with `tensors` (by parameter name, as `shapes` has them) as its very parameters.

    At mode "forward" batch norms use their statistics (mean 0, variance 1); in training those of the batch.
    `kernel` runs the attention, and the stem where it has one; None is enough for a network without attention.
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
    stem: StemKernel | None = None


def _network(case: Case, kernel: Kernel | None) -> nn.Module:
    chosen = kernel or _NoKernel()

    def make(layer: layers.Attention, channels: int) -> nn.Module:
        return KernelAttention(
            chosen, channels, layer.kernel_size, layer.heads, layer.position, layer.border, layer.channels or None
        )

    return build(describe(case), image_shape(case), make, getattr(chosen, "stem", None))
