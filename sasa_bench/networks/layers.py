"""The layers of a network as plain descriptions: the shape each gives, its FLOPs for one image, its parameters.

A description is read twice: the cost model sums `flops` and `params`, and networks.build builds the same layers in
torch. Shapes are (channels, height, width). FLOPs follow Ramachandran et al. 2019 (arXiv 1906.05909): a multiply and
an add are two operations, every window counts whole, and elementwise work counts: a batch norm subtracts, scales,
multiplies and adds (4), a softmax takes the maximum, subtracts, exponentiates, adds and divides (5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sasa_bench.case import STEM_HEADS

Shape = tuple[int, int, int]

SOFTMAX = 5
"""Operations of a softmax for each logit."""

STEM_WINDOW, STEM_MIXTURES = 4, 4
"""Side of the blocks of an attention stem, and the value projections it mixes (left open by the paper)."""


class Layer(Protocol):
    """What every description answers; `shape` is that of one image at the input."""

    def out(self, shape: Shape) -> Shape:
        """The shape of one image at the output."""

    def flops(self, shape: Shape) -> int:
        """Operations of a forward pass of one image."""

    def params(self, shape: Shape) -> int:
        """Learned scalars."""


class _Elementwise:
    """A layer without parameters that keeps the shape and does `OPERATIONS` for each scalar."""

    OPERATIONS: ClassVar[int] = 1

    def out(self, shape: Shape) -> Shape:
        return shape

    def flops(self, shape: Shape) -> int:
        return self.OPERATIONS * scalars(shape)

    def params(self, shape: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Conv:
    """A K x K convolution with "same" padding: 2 K^2 C_in C_out for each pixel of its output."""

    channels: int
    kernel_size: int = 1
    stride: int = 1
    bias: bool = False

    def out(self, shape: Shape) -> Shape:
        _, height, width = shape
        return self.channels, -(-height // self.stride), -(-width // self.stride)

    def flops(self, shape: Shape) -> int:
        return (2 * self.kernel_size**2 * shape[0] + self.bias) * scalars(self.out(shape))

    def params(self, shape: Shape) -> int:
        return (self.kernel_size**2 * shape[0] + self.bias) * self.channels


@dataclass(frozen=True)
class BatchNorm(_Elementwise):
    """(x - mean) / deviation * weight + bias in each channel: 4 for each scalar."""

    OPERATIONS = 4

    def params(self, shape: Shape) -> int:
        return 2 * shape[0]


@dataclass(frozen=True)
class Relu(_Elementwise):
    """max(x, 0): 1 for each scalar."""


@dataclass(frozen=True)
class Pool:
    """The mean ("avg") or the maximum ("max") of K x K pixels, every `stride` pixels: K^2 for each scalar it gives.

    What a window has outside the map takes no part.
    """

    kind: str
    kernel_size: int
    stride: int

    def out(self, shape: Shape) -> Shape:
        channels, height, width = shape
        return channels, -(-height // self.stride), -(-width // self.stride)

    def flops(self, shape: Shape) -> int:
        return self.kernel_size**2 * scalars(self.out(shape))

    def params(self, shape: Shape) -> int:
        return 0


@dataclass(frozen=True)
class GlobalPool:
    """The mean of the map: 1 for each scalar."""

    def out(self, shape: Shape) -> Shape:
        return shape[0], 1, 1

    def flops(self, shape: Shape) -> int:
        return scalars(shape)

    def params(self, shape: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Linear:
    """A matrix and a bias over the C scalars of a pooled map: 2 C_in C_out + C_out."""

    channels: int

    def out(self, shape: Shape) -> Shape:
        return self.channels, 1, 1

    def flops(self, shape: Shape) -> int:
        return (2 * scalars(shape) + 1) * self.channels

    def params(self, shape: Shape) -> int:
        return (scalars(shape) + 1) * self.channels


@dataclass(frozen=True)
class Attention:
    """Local self-attention over K x K windows at full resolution, equation 3 of the paper; C channels come out.

    channels: C, or 0 for as many as go in. Without q . k (position "relative_only") there is no W_K.
    """

    kernel_size: int
    heads: int
    position: str = "relative"
    border: str = "mask"
    channels: int = 0

    def out(self, shape: Shape) -> Shape:
        return self.channels or shape[0], shape[1], shape[2]

    def products(self, shape: Shape) -> int:
        """Operations but for the softmax, of one image; what the cost of a single layer counts.

        Of each query: 2 C_in C for each projection, then for each of K^2 neighbours and C channels 2 for q . k, 2 for
        a . v and, with relative positions, 1 that adds r to k. Absolute positions (sines) add C_in at the input. Where
        no logit depends on the key, they are K row and K column products of 2 C / 2 each, and a sum for each head and
        neighbour.
        """
        c_in, c, k = shape[0], self.out(shape)[0], self.kernel_size
        core = {
            "none": 4 * k * k * c,
            "absolute": 4 * k * k * c + c_in,
            "relative": 5 * k * k * c,
            "relative_only": 2 * k * k * c + 2 * k * c + k * k * self.heads,
        }[self.position]
        return (2 * self.projections * c_in * c + core) * shape[1] * shape[2]

    def flops(self, shape: Shape) -> int:
        return self.products(shape) + SOFTMAX * self.kernel_size**2 * self.heads * shape[1] * shape[2]

    def params(self, shape: Shape) -> int:
        c = self.out(shape)[0]
        embeddings = c * self.kernel_size if self.position in ("relative", "relative_only") else 0
        return self.projections * shape[0] * c + embeddings

    @property
    def projections(self) -> int:
        """Of q, k and v, how many there are."""
        return 2 if self.position == "relative_only" else 3


@dataclass(frozen=True)
class AttentionStem:
    """Attention inside 4 x 4 blocks of the image that do not overlap, 4 heads, relative positions; section 3.2.

    values: "stand_alone" v = W_V x; "conv_values" v = a 4 x 4 convolution of x (the paper does not give its size; this
    is the block's); "aware_values" v_ab = sum over m of p(a, b, m) W_V^m x_ab with p(a, b, m) =
    softmax_m((emb_row(a) + emb_col(b)) . nu_m), shared by the heads (appendix A.1).
    Of each pixel: 2 C_in C for each projection, 5 x 16 C for q . (k + r) and a . v over its block, 2 M C for the
    mixture.
    """

    channels: int
    values: str

    def out(self, shape: Shape) -> Shape:
        return self.channels, shape[1], shape[2]

    def flops(self, shape: Shape) -> int:
        c, block = self.channels, STEM_WINDOW**2
        mixing = 2 * STEM_MIXTURES * c if self.values == "aware_values" else 0
        attending = 5 * block * c + SOFTMAX * block * STEM_HEADS
        return (2 * (2 + self._value_taps) * shape[0] * c + mixing + attending) * shape[1] * shape[2]

    def params(self, shape: Shape) -> int:
        c = self.channels
        aware = (2 * STEM_WINDOW + STEM_MIXTURES) * c if self.values == "aware_values" else 0
        return (2 + self._value_taps) * shape[0] * c + (2 * STEM_WINDOW - 1) * c + aware

    @property
    def _value_taps(self) -> int:
        return {"stand_alone": 1, "conv_values": STEM_WINDOW**2, "aware_values": STEM_MIXTURES}[self.values]


@dataclass(frozen=True)
class Chain:
    """Named layers one after the other."""

    layers: tuple[tuple[str, Layer], ...]

    def out(self, shape: Shape) -> Shape:
        for _, layer in self.layers:
            shape = layer.out(shape)
        return shape

    def flops(self, shape: Shape) -> int:
        return sum(layer.flops(at) for _, layer, at in self.steps(shape))

    def params(self, shape: Shape) -> int:
        return sum(layer.params(at) for _, layer, at in self.steps(shape))

    def steps(self, shape: Shape) -> Iterator[tuple[str, Layer, Shape]]:
        """(name, layer, shape at its input) in order."""
        for name, layer in self.layers:
            yield name, layer, shape
            shape = layer.out(shape)


@dataclass(frozen=True)
class Residual:
    """relu(body(x) + shortcut(x)); an empty shortcut is x itself. The sum and the relu: 2 for each scalar."""

    body: Chain
    shortcut: Chain

    def out(self, shape: Shape) -> Shape:
        return self.body.out(shape)

    def flops(self, shape: Shape) -> int:
        return self.body.flops(shape) + self.shortcut.flops(shape) + 2 * scalars(self.out(shape))

    def params(self, shape: Shape) -> int:
        return self.body.params(shape) + self.shortcut.params(shape)


def chain(**layers: Layer) -> Chain:
    """Layers by name, in the order given."""
    return Chain(tuple(layers.items()))


def attentions(layer: object, shape: Shape) -> Iterator[tuple[Attention, Shape]]:
    """Every Attention in `layer`, a description, with the shape at its input, once for each time it runs."""
    if isinstance(layer, Attention):
        yield layer, shape
    elif isinstance(layer, Residual):
        yield from attentions(layer.body, shape)
        yield from attentions(layer.shortcut, shape)
    elif steps := getattr(layer, "steps", None):
        for _, inner, at in steps(shape):
            yield from attentions(inner, at)


def scalars(shape: Shape) -> int:
    """How many scalars a map of that shape has."""
    channels, height, width = shape
    return channels * height * width
