"""The convolutions that attention is compared with: stride 1, same padding, no bias.

`conv3x3` is torch's own as most models call it. The strongest ones are what a user gets who tunes it: channels-last for
every pass, and, for inference, weights packed ahead, which is what freezing a model emits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.impls import Impl, _compiled, _onnx, layers_only
from sasa_bench.networks.build import bind
from sasa_bench.ops.network import holds
from sasa_bench.ops.tensors import Call, Tensors


def _build(case: Case, tensors: Tensors) -> Call:
    x = tensors["x"]
    if holds(case):
        network = bind(case, tensors, None)
        return lambda: network(x)
    weight = tensors["weight"]
    groups = case.channels // weight.shape[1]
    return lambda: F.conv2d(x, weight, padding=case.kernel_size // 2, groups=groups)


def _build_packed(case: Case, tensors: Tensors) -> Call:
    """A layer calls oneDNN with weights in the layout that it prefers; a network or a stem is compiled and frozen."""
    x = tensors["x"]
    if holds(case):
        return _frozen(case, bind(case, tensors, None), x)
    padding, ones = [case.radius] * 2, [1, 1]
    weight = tensors["weight"].detach().to_mkldnn()
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight, padding, ones, ones, 1, list(x.shape))
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    return lambda: convolve(x, packed, None, padding, ones, ones, 1, "none", [], "")


def _frozen(case: Case, network: nn.Module, x: Tensor) -> Call:
    """The network compiled with its parameters as constants: batch norms folded into convolutions, weights packed."""
    import torch._inductor.config

    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(images: Tensor) -> Tensor:
        y: Tensor = network(images)
        return y

    graph = _compiled.one_graph(forward)
    with _compiled.compiler(case), torch._inductor.config.patch(freezing=True), torch.no_grad():
        graph(x)
    return lambda: graph(x)


def _packable(case: Case) -> str | None:
    if case.mode != "forward":
        return "weights are packed ahead for inference: forward only"
    if case.device != "cpu":
        return "packed weights are oneDNN's, on the CPU; cuDNN takes conv3x3_channels_last"
    if case.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN packs bfloat16 weights only for a CPU with AVX-512"
    if case.dtype == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN packs float16 weights only for a CPU with AVX-512 FP16 or AMX FP16"
    return _compiled.missing() if holds(case) else None


def _no_onednn() -> str | None:
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN: install another build"


def _function(case: Case) -> _onnx.Function:
    return lambda tensors: F.conv2d(tensors["x"], tensors["weight"], padding=case.kernel_size // 2)


def _with_window(kernel_size: int) -> Callable[[Case], Case]:
    return lambda case: case.with_(kernel_size=kernel_size)


def _counterpart(case: Case) -> Case:
    """A 3 x 3 convolution; of a network or a stem, the same one with convolutions everywhere."""
    if not holds(case):
        return case.with_(kernel_size=3)
    return case.with_(kernel_size=3, position="none", stem="conv", attention_groups="none")


def _channels_last(case: Case) -> Case:
    return _counterpart(case).with_(memory_format="channels_last")


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
CONV3X3_CHANNELS_LAST = Impl(
    name="conv3x3_channels_last",
    op=ops.get("convolution"),
    summary="3 x 3 convolution in channels-last memory: images in, images out",
    build=_build,
    computes=_channels_last,
)
CONV3X3_PACKED = Impl(
    name="conv3x3_packed",
    op=ops.get("convolution"),
    summary="3 x 3 convolution, channels-last, weights packed ahead: what a compiled, frozen model runs",
    build=_build_packed,
    supports=_packable,
    missing=_no_onednn,
    computes=_channels_last,
    poisoned=False,
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
