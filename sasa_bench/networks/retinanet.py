"""RetinaNet: a feature pyramid on a ResNet and two heads; Lin et al. 2017 (arXiv 1612.03144 and 1708.02002), and for
attention in place of its 3 x 3 convolutions appendix A.3 of Ramachandran et al. 2019."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sasa_bench.networks.layers import Attention, Chain, Conv, Layer, Relu, Shape, chain, scalars
from sasa_bench.networks.resnet import Spatial, groups, stem

WIDTH, TOWER = 256, 4
"""Channels of the pyramid and of the heads; spatial layers of a head before its prediction."""

ANCHORS, CLASSES, BOX = 6, 91, 4
"""Anchors of a pixel (2 scales x 3 aspect ratios), COCO's category numbers (0 for background to 90), scalars of a box.
A common recipe for RetinaNet at 640 pixels; 9 anchors would be 7 % over the published FLOPs."""


@dataclass(frozen=True)
class RetinaNet:
    """Image [3, H, W] -> 91 class scores and 4 box offsets for each of A anchors, [A, 1, 95].

    Pyramid levels 3 to 5 are laterals of groups 2 to 4, each added to the enlarged level above, then smoothed by a
    spatial layer. Level 6 is a spatial layer with stride 2 on level 5, and level 7 one on relu(level 6). The levels
    share the two heads.
    """

    stem: Chain
    groups: tuple[Chain, ...]
    lateral: Layer
    smooth: Chain
    down: Chain
    classes: Chain
    boxes: Chain

    def steps(self, shape: Shape) -> Iterator[tuple[str, Layer, Shape]]:
        """(name, layer, shape at its input) of all that runs; what has the same name has the same parameters."""
        maps = []
        for name, layer in (("stem", self.stem), *((f"group{n}", g) for n, g in enumerate(self.groups, 1))):
            yield name, layer, shape
            shape = layer.out(shape)
            maps.append(shape)
        levels = []
        for number, at in enumerate(maps[2:], 3):
            yield f"lateral{number}", self.lateral, at
            levels.append(self.lateral.out(at))
            yield f"smooth{number}", self.smooth, levels[-1]
        for number in (6, 7):
            yield f"down{number}", self.down, levels[-1]
            levels.append(self.down.out(levels[-1]))
        for level in levels:
            yield "classes", self.classes, level
            yield "boxes", self.boxes, level

    def out(self, shape: Shape) -> Shape:
        anchors = sum(scalars(at) for name, _, at in self.steps(shape) if name == "classes") * ANCHORS // WIDTH
        return anchors, 1, CLASSES + BOX

    def flops(self, shape: Shape) -> int:
        """All layers, and one sum for each scalar of levels 3 and 4 and one relu for each of level 6."""
        sums = sum(scalars(at) for name, _, at in self.steps(shape) if name in ("smooth3", "smooth4", "down7"))
        return sums + sum(layer.flops(at) for _, layer, at in self.steps(shape))

    def params(self, shape: Shape) -> int:
        return sum({name: layer.params(at) for name, layer, at in self.steps(shape)}.values())


def retinanet(
    depth: int, stem_kind: str, attention: Attention | None, attention_groups: str, attention_heads: bool
) -> RetinaNet:
    """RetinaNet on ResNet-`depth`; with `attention_heads` pyramid and heads use `attention` too.

    Then the laterals are attention that projects to 256 channels (the published figures hold three projections of each
    group's output, not one), and the convolution that predicts is attention and a 1 x 1 convolution that mixes its
    heads.
    """
    spatial = Spatial(attention if attention_heads else None, bias=True)

    def head(outputs: int) -> Chain:
        tower = [
            (f"{name}{number}", layer)
            for number in range(1, TOWER + 1)
            for name, layer in {**spatial.layers(WIDTH), "relu": Relu()}.items()
        ]
        predict: dict[str, Layer] = {"predict": Conv(ANCHORS * outputs, 1 if attention_heads else 3, bias=True)}
        if attention_heads:
            predict = {**spatial.layers(WIDTH), **predict}
        return Chain((*tower, *predict.items()))

    return RetinaNet(
        stem=stem(stem_kind),
        groups=tuple(groups(depth, attention, attention_groups)),
        lateral=replace(attention, channels=WIDTH) if attention_heads and attention else Conv(WIDTH, bias=True),
        smooth=chain(**spatial.layers(WIDTH)),
        down=chain(**spatial.layers(WIDTH, stride=2)),
        classes=head(CLASSES),
        boxes=head(BOX),
    )
