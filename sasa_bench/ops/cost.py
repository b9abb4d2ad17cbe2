"""The cost model: useful FLOPs, least bytes and parameters of a case, one formula per op.

Convention of Ramachandran et al. 2019 (arXiv 1906.05909): a multiply and an add are two operations, every window counts
K x K pixels whether or not they lie inside the image, and a softmax counts nothing. B images of H x W pixels give
P = B H W queries. A whole network also counts its elementwise work, softmax and batch norm among it
(networks.layers says how much), as the paper's tables do.

An implementation that does more work than the formula (copies, masked products, recomputation) is not credited for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.networks import describe, image_shape
from sasa_bench.networks.layers import scalars


@dataclass(frozen=True)
class Cost:
    """flops: operations; min_bytes: every input read once and every output written once; params: scalars."""

    flops: int
    min_bytes: int
    params: int


def cost(op: str, case: Case) -> Cost:
    """What `op` costs on `case` in its mode.

    A backward pass costs twice the forward pass: each product has two factors and so two gradients. Training is both.
    Raises KeyError for an op without a formula.
    """
    forward, params, inputs, output = (_network if case.scope == "network" else FORMULAS[op])(case)
    passes = {"forward": 1, "backward": 2, "training": 3}[case.mode]
    if case.mode == "forward":
        scalars = inputs + params + output
    elif case.mode == "backward":
        scalars = 2 * (inputs + params) + output
    else:
        scalars = 2 * (inputs + params) + 2 * output
    return Cost(passes * forward, scalars * DTYPE_BYTES[case.dtype], params)


def _pixels(case: Case) -> int:
    return case.batch * case.height * case.width


def _local_attention(case: Case) -> tuple[int, int, int, int]:
    """6 C^2 P for three projections, K^2 C P times 4 (q . k and a . v) or 5 (the paper adds r to k first).

    Absolute positions add C P at the input of the layer. Parameters: 3 C^2, and C K relative or
    (C // 2) H + (C - C // 2) W absolute embeddings.
    """
    c, p, k = case.channels, _pixels(case), case.kernel_size
    relative = case.position == "relative"
    core = (5 if relative else 4) * k * k * c * p
    embeddings = c * k if relative else 0
    if case.scope == "core":
        return core, embeddings, 3 * c * p, c * p
    if case.position == "absolute":
        core += c * p
        embeddings = (c // 2) * case.height + (c - c // 2) * case.width
    return 6 * c * c * p + core, 3 * c * c + embeddings, c * p, c * p


def _global_attention(case: Case) -> tuple[int, int, int, int]:
    """6 C^2 P for three projections and 4 (H W) C P for q . k and a . v over the whole map, no positions."""
    c, p = case.channels, _pixels(case)
    core = 4 * case.height * case.width * c * p
    if case.scope == "core":
        return core, 0, 3 * c * p, c * p
    return 6 * c * c * p + core, 3 * c * c, c * p, c * p


def _convolution(case: Case) -> tuple[int, int, int, int]:
    """2 K^2 C^2 P; parameters K^2 C^2; stride 1, same padding, no bias."""
    c, p, k = case.channels, _pixels(case), case.kernel_size
    return 2 * k * k * c * c * p, k * k * c * c, c * p, c * p


def _depthwise_convolution(case: Case) -> tuple[int, int, int, int]:
    """2 K^2 C P; parameters K^2 C: each channel is convolved with its own window."""
    c, p, k = case.channels, _pixels(case), case.kernel_size
    return 2 * k * k * c * p, k * k * c, c * p, c * p


def squeezed(channels: int) -> int:
    """Channels in the middle of squeeze-and-excitation: C / 16, at least 1."""
    return max(1, channels // 16)


def _squeeze_excitation(case: Case) -> tuple[int, int, int, int]:
    """Hu et al. 2018 (arXiv 1709.01507): C P for the mean, C P for the scaling, 4 C h for each image's two matrices."""
    c, p, h = case.channels, _pixels(case), squeezed(case.channels)
    return 2 * c * p + 4 * c * h * case.batch, 2 * c * h, c * p, c * p


def halved(channels: int) -> int:
    """Channels of the embeddings of a non-local block: C / 2, at least 1."""
    return max(1, channels // 2)


def _non_local(case: Case) -> tuple[int, int, int, int]:
    """Wang et al. 2018 (arXiv 1711.07971), embedded Gaussian, h = C / 2.

    8 C h P for four projections, 4 (H W) h P for the products over the whole map, C P for the sum with the input.
    """
    c, p, h = case.channels, _pixels(case), halved(case.channels)
    return 8 * c * h * p + 4 * case.height * case.width * h * p + c * p, 4 * c * h, c * p, c * p


def eighth(channels: int) -> int:
    """Channels of queries and keys of criss-cross attention: C / 8, at least 1."""
    return max(1, channels // 8)


def _criss_cross(case: Case) -> tuple[int, int, int, int]:
    """Huang et al. 2019 (arXiv 1811.11721), one pass, h = C / 8.

    4 C h P + 2 C^2 P for queries, keys and values, 2 (h + C) P for each of the H + W - 1 pixels in a pixel's row and
    column, 2 C P for gamma and the sum with the input.
    """
    c, p, h = case.channels, _pixels(case), eighth(case.channels)
    seen = case.height + case.width - 1
    return (4 * c * h + 2 * c * c + 2 * (h + c) * seen + 2 * c) * p, 2 * c * h + c * c + 1, c * p, c * p


def _neighborhood_attention(case: Case) -> tuple[int, int, int, int]:
    """Hassani et al. 2023 (arXiv 2204.07143): local attention without a position term; every window is whole."""
    return _local_attention(case)


def _per_channel_attention(case: Case) -> tuple[int, int, int, int]:
    """6 C^2 P for three projections, K^2 C P times 3 (q k, and a v added up), or 4 with embeddings added to k first.

    A product of q and k is not added up over the channels of a head. Parameters: 3 C^2, and C K embeddings.
    """
    c, p, k = case.channels, _pixels(case), case.kernel_size
    relative = case.position == "relative"
    core, embeddings = (4 if relative else 3) * k * k * c * p, c * k if relative else 0
    if case.scope == "core":
        return core, embeddings, 3 * c * p, c * p
    return 6 * c * c * p + core, 3 * c * c + embeddings, c * p, c * p


def halo_block(case: Case) -> int:
    """S, the side of a block of queries in halo attention: the largest number up to 8 that divides height and width."""
    return max(s for s in range(1, 9) if case.height % s == 0 and case.width % s == 0)


def _halo_attention(case: Case) -> tuple[int, int, int, int]:
    """Vaswani et al. 2021 (arXiv 2103.12731) with a halo of K // 2: every query sees h^2 keys, h = S + K - 1.

    6 C^2 P for three projections, h^2 C P times 5 for q . (k + r) and a v. Parameters: 3 C^2 and two tables of 2 h - 1
    embeddings of a head's d channels, shared by the heads.
    """
    c, p, h = case.channels, _pixels(case), halo_block(case) + case.kernel_size - 1
    return 6 * c * c * p + 5 * h * h * c * p, 3 * c * c + 2 * (2 * h - 1) * case.head_dim, c * p, c * p


def _network(case: Case) -> tuple[int, int, int, int]:
    """The sums over the layers of the network that the case names."""
    network, image = describe(case), image_shape(case)
    read, written = case.batch * scalars(image), case.batch * scalars(network.out(image))
    return case.batch * network.flops(image), network.params(image), read, written


FORMULAS: dict[str, Callable[[Case], tuple[int, int, int, int]]] = {
    "local_attention": _local_attention,
    "global_attention": _global_attention,
    "convolution": _convolution,
    "depthwise_convolution": _depthwise_convolution,
    "squeeze_excitation": _squeeze_excitation,
    "non_local": _non_local,
    "criss_cross": _criss_cross,
    "neighborhood_attention": _neighborhood_attention,
    "halo_attention": _halo_attention,
    "per_channel_attention": _per_channel_attention,
}
"""Op -> (forward FLOPs, parameters, input scalars, output scalars) of a case."""


def equal_flops_kernel_size(channels: int) -> int:
    """The largest odd K at which a local attention layer costs no more FLOPs than a 3 x 3 convolution.

    6 C^2 + 4 K^2 C <= 18 C^2 gives K^2 <= 3 C; the paper's k = 19 at 128 channels counts projections, q . k and a . v.
    """
    k = int((3 * channels) ** 0.5)
    return k if k % 2 else k - 1
