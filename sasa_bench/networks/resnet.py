"""ResNet-26, -38 and -50 of bottlenecks, with convolution or local attention in each group; He et al. 2015, section 4.1
of Ramachandran et al. 2019."""

from __future__ import annotations

from dataclasses import dataclass

from sasa_bench.networks.layers import (
    STEM_WINDOW,
    Attention,
    AttentionStem,
    BatchNorm,
    Chain,
    Conv,
    GlobalPool,
    Layer,
    Linear,
    Pool,
    Relu,
    Residual,
    chain,
)

BLOCKS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}
"""Depth -> bottlenecks of groups 1 to 4."""

WIDTH, EXPANSION, CLASSES = 64, 4, 1000
"""Channels of the stem and of the middle of a bottleneck in group 1; output channels of a bottleneck as a multiple of
its middle; ImageNet's classes."""


@dataclass(frozen=True)
class Spatial:
    """What takes the place of a 3 x 3 convolution: `attention`, or the convolution itself, with `bias` or without."""

    attention: Attention | None = None
    bias: bool = False

    def layers(self, channels: int, stride: int = 1) -> dict[str, Layer]:
        """The layers by name: the convolution, or attention with a 2 x 2 average pool where it had stride 2."""
        if self.attention is None:
            return {"conv": Conv(channels, 3, stride, self.bias)}
        pool: dict[str, Layer] = {"pool": Pool("avg", 2, 2)} if stride == 2 else {}
        return {"attention": self.attention, **pool}


def stem(kind: str, width: int | None = None) -> Chain:
    """`width` channels, by default 64, at a quarter of the resolution.

    "conv" is a 7 x 7 convolution with stride 2 and a 3 x 3 max pool, any other kind attention with those values and a
    4 x 4 max pool.
    """
    width = width or WIDTH
    if kind == "conv":
        return chain(conv=Conv(width, 7, 2), norm=BatchNorm(), relu=Relu(), pool=Pool("max", 3, 2))
    return chain(
        attention=AttentionStem(width, kind),
        norm=BatchNorm(),
        relu=Relu(),
        pool=Pool("max", STEM_WINDOW, STEM_WINDOW),
    )


def bottleneck(channels_in: int, width: int, stride: int, spatial: Spatial) -> Residual:
    """1 x 1 convolution to `width`, a spatial layer, 1 x 1 convolution to 4 x `width`, added to the (projected) input.

    The stride is in the spatial layer, as everyone has trained ResNet-50 since 2016.
    """
    out = EXPANSION * width
    body = chain(
        conv1=Conv(width),
        norm1=BatchNorm(),
        relu1=Relu(),
        **spatial.layers(width, stride),
        norm2=BatchNorm(),
        relu2=Relu(),
        conv3=Conv(out),
        norm3=BatchNorm(),
    )
    projected = stride != 1 or channels_in != out
    return Residual(body, chain(conv=Conv(out, stride=stride), norm=BatchNorm()) if projected else chain())


def groups(depth: int, attention: Attention | None, attention_groups: str) -> list[Chain]:
    """The four groups of bottlenecks; those named in `attention_groups` use `attention`."""
    found, channels = [], WIDTH
    for index, blocks in enumerate(BLOCKS[depth]):
        width = WIDTH << index
        spatial = Spatial(attention if str(index + 1) in attention_groups else None)
        members = []
        for block in range(blocks):
            stride = 2 if index and not block else 1
            members.append((f"block{block + 1}", bottleneck(channels, width, stride, spatial)))
            channels = EXPANSION * width
        found.append(Chain(tuple(members)))
    return found


def resnet(depth: int, stem_kind: str, attention: Attention | None, attention_groups: str) -> Chain:
    """Image [3, H, W] -> scores [1000, 1, 1] of ImageNet's classes."""
    members = groups(depth, attention, attention_groups)
    return chain(
        stem=stem(stem_kind),
        **{f"group{number}": group for number, group in enumerate(members, 1)},
        pool=GlobalPool(),
        classifier=Linear(CLASSES),
    )
