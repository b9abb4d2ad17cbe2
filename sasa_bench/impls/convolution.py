"""The convolutions that attention is compared with: torch's own, stride 1, same padding, no bias."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, _onnx, layers_only
from sasa_bench.networks.build import bind
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    x = tensors["x"]
    if case.scope == "network":
        network = bind(case, tensors, None)
        return lambda: network(x)
    weight = tensors["weight"]
    groups = case.channels // weight.shape[1]
    return lambda: F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)


def _function(case: Case) -> _onnx.Function:
    return lambda tensors: F.conv2d(tensors["x"], tensors["weight"], padding=case.kernel_size // 2)


def _with_window(kernel_size: int) -> Callable[[Case], Case]:
    return lambda case: case.with_(kernel_size=kernel_size)


def _counterpart(case: Case) -> Case:
    """A 3 x 3 convolution; of a network, the same one with convolutions everywhere."""
    if case.scope != "network":
        return case.with_(kernel_size=3)
    return case.with_(kernel_size=3, position="none", stem="conv", attention_groups="none")


def _convolution(name: str, summary: str, op: str = "convolution", kernel_size: int | None = None) -> Impl:
    computes = _with_window(kernel_size) if kernel_size else lambda case: case
    return Impl(name=name, op=ops.get(op), summary=summary, build=_build, supports=layers_only, computes=computes)


CONV3X3 = Impl(
    name="conv3x3",
    op=ops.get("convolution"),
    summary="3 x 3 convolution whatever the window: the paper's baseline",
    build=_build,
    computes=_counterpart,
)
CONV_KXK = _convolution("conv_kxk", "convolution with the window of the case")
DEPTHWISE_KXK = _convolution(
    "depthwise_kxk", "depthwise convolution with the window of the case", "depthwise_convolution"
)
CONV1X1 = _convolution("conv1x1", "1 x 1 convolution: the floor that one projection sets", kernel_size=1)
ONNX_CONV3X3 = _onnx.exported(
    "onnx_conv3x3",
    "3 x 3 convolution in ONNX Runtime",
    ops.get("convolution"),
    _function,
    exports="conv3x3",
    computes=_with_window(3),
)
