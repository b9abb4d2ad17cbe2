"""An op: what is computed, with its shapes, its cost and its float64 reference.

Cost: useful FLOPs, least bytes and parameters of a case, one formula per op.

Convention of Ramachandran et al. 2019 (arXiv 1906.05909): a multiply and an add are two operations, every window counts
K x K pixels whether or not they lie inside the image, and a softmax counts nothing. B images of H x W pixels give
P = B H W queries. A whole network also counts its elementwise work, softmax and batch norm among it
(networks.layers says how much), as the paper's tables do.

An implementation that does more work than the formula (copies, masked products, recomputation) is not credited for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from sasa_bench.case import DTYPE_BYTES, Case
from sasa_bench.ops import network

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors

Draw = tuple[tuple[int, ...], float]
"""(shape, standard deviation of random values)."""

Shapes = dict[str, Draw]
"""Name of each input and parameter -> its shape and scale."""


class Work(NamedTuple):
    """Of one forward pass: operations, learned scalars, scalars of the inputs, scalars of the output.

    `needed` are the operations that nobody can do without; None where they are those of the convention.
    """

    flops: int
    params: int
    inputs: int
    output: int
    needed: int | None = None


@dataclass(frozen=True)
class Cost:
    """flops: operations; min_bytes: every input read once and every output written once; params: scalars.

    needed_flops are what is left of flops where windows are clipped at the border and position terms are factorised:
    what a time may be held against as the least work.
    """

    flops: int
    min_bytes: int
    params: int
    needed_flops: int


@dataclass(frozen=True)
class Op:
    """A function of a case. Shapes and cost need no torch; a reference imports it when it is called.

    shapes    case -> name of each input and parameter -> (shape, standard deviation of its random values)
    work      case -> what a forward pass takes, at scopes "layer" and "core"
    reference (case, tensors) -> y [B, C, H, W]; plain, differentiable, in the dtype of the tensors
    """

    name: str
    shapes: Callable[[Case], Shapes]
    work: Callable[[Case], Work]
    reference: Callable[[Case, Tensors], Tensor]

    def cost(self, case: Case) -> Cost:
        """What the op costs on `case` in its mode; of a network or a stem, what all of its layers cost.

        A backward pass costs twice the forward pass: each product has two factors and so two gradients. Training is
        both.
        """
        forward, params, inputs, output, needed = network.work(case) if network.holds(case) else self.work(case)
        passes = {"forward": 1, "backward": 2, "training": 3}[case.mode]
        if case.mode == "forward":
            scalars = inputs + params + output
        elif case.mode == "backward":
            scalars = 2 * (inputs + params) + output
        else:
            scalars = 2 * (inputs + params) + 2 * output
        least = passes * (forward if needed is None else needed)
        return Cost(passes * forward, scalars * DTYPE_BYTES[case.dtype], params, least)


def also_in_networks(op: Op) -> Op:
    """`op`, and the network or the stem that a case names.

    There the tensors are the image and the parameters, y is what the network gives, and the reference is the same
    network with the references of its attention and its stem.
    """
    return replace(
        op,
        shapes=lambda case: network.shapes(case) if network.holds(case) else op.shapes(case),
        reference=lambda case, t: network.reference(case, t) if network.holds(case) else op.reference(case, t),
    )


def pixels(case: Case) -> int:
    return case.batch * case.height * case.width


def in_windows(case: Case) -> int:
    """Pairs of a pixel of one image and a pixel of the image in its window: K^2 H W less what lies outside."""

    def along(side: int) -> int:
        return sum(min(i + case.radius, side - 1) - max(i - case.radius, 0) + 1 for i in range(side))

    return along(case.height) * along(case.width)


def image(case: Case) -> Draw:
    return (case.batch, case.channels, case.height, case.width), 1.0


def input_shapes(case: Case) -> Shapes:
    shape = (case.batch, case.channels, case.height, case.width)
    if case.scope == "core":
        return {"q": (shape, case.head_dim**-0.5), "k": (shape, 1.0), "v": (shape, 1.0)}
    scale = case.channels**-0.5 * case.head_dim**-0.25
    return {"x": (shape, 1.0), "w_qkv": ((3 * case.channels, case.channels), scale)}
