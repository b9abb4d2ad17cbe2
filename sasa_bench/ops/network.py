"""A whole network, or its stem alone, as what an op computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sasa_bench.case import Case
from sasa_bench.networks import describe, image_shape
from sasa_bench.networks.layers import scalars

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def holds(case: Case) -> bool:
    """Whether the case names a network or, at scope "layer", a stem."""
    return case.stem != "none"


def work(case: Case) -> tuple[int, int, int, int, None]:
    """The sums over the layers of the network that the case names: FLOPs, parameters, scalars read and written."""
    network, image = describe(case), image_shape(case)
    read, written = case.batch * scalars(image), case.batch * scalars(network.out(image))
    return case.batch * network.flops(image), network.params(image), read, written, None


def shapes(case: Case) -> dict[str, tuple[tuple[int, ...], float]]:
    """The image "x" and each parameter of the network -> (shape, standard deviation of random values)."""
    from sasa_bench.networks import build

    return build.shapes(case)


def reference(case: Case, tensors: Tensors) -> Tensor:
    """The network with the reference of its attention, its parameters those in `tensors`."""
    from sasa_bench.networks import build

    y: Tensor = build.bind(case, tensors, _ReferenceKernel())(tensors["x"])
    return y


@dataclass(frozen=True)
class _ReferenceKernel:
    """The reference of local attention as the kernel of a network."""

    layer: None = None

    @property
    def stem(self) -> Callable[..., Any]:
        from sasa_bench.ops.stem import reference

        return reference

    def attend(self, case: Case) -> Callable[..., Tensor]:
        from sasa_bench import ops

        local_attention = ops.get("local_attention")

        def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
            tensors = {"q": q, "k": k, "v": v}
            if rel_row is not None and rel_col is not None:
                tensors |= {"rel_row": rel_row, "rel_col": rel_col}
            return local_attention.reference(case, tensors)

        return core
