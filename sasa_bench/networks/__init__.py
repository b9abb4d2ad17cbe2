"""Whole networks: the paper's ResNets and RetinaNets, described once and read by the cost model and by torch."""

from __future__ import annotations

from collections.abc import Iterator

from sasa_bench.case import Case
from sasa_bench.networks import resnet, retinanet
from sasa_bench.networks.layers import Attention, Layer, Shape, attentions

FAMILIES = ("resnet", "retinanet")
"""A network is named by its family and the depth of its ResNet."""


def describe(case: Case) -> Layer:
    """The network of a case, or its stem at scope "layer". Raises ValueError for a case that names neither."""
    if case.scope == "layer" and case.stem != "none":
        return resnet.stem(case.stem, case.channels)
    family = next((f for f in FAMILIES if case.network.startswith(f)), None)
    if family is None:
        raise ValueError(f"{case.describe()} names no network: give scope = 'network' and network = 'resnet50'")
    depth = int(case.network.removeprefix(family))
    groups, _, heads = case.attention_groups.partition("+")
    groups = groups.replace("none", "")
    attention = Attention(case.kernel_size, case.heads, case.position, case.border) if groups or heads else None
    if family == "resnet":
        return resnet.resnet(depth, case.stem, attention, groups)
    return retinanet.retinanet(depth, case.stem, attention, groups, bool(heads))


def image_shape(case: Case) -> Shape:
    """The shape of one image of a case: three colours."""
    return 3, case.height, case.width


def attention_cases(case: Case) -> Iterator[Case]:
    """The core of each attention layer in the network of a case, as a case of its own."""
    for layer, (channels, height, width) in attentions(describe(case), image_shape(case)):
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
