"""The fused layer at inference: weights packed once, and a batch norm and a relu behind it made part of it.

The layer is linear in the rows of its weights that make values, and the weights of a softmax sum to one. So what a
batch norm multiplies by goes into these rows, and what it adds is a bias of the output. An average pool between them
changes nothing: its weights sum to one too.

In a graph that Inductor freezes parameters are constants, and a batch norm has become sums and products with a number a
channel: `register` teaches Inductor to do the same there, and to let a stem write channels-last, as frozen convolutions
read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

aten, prims = torch.ops.aten, torch.ops.prims


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics multiplies each channel by, and then adds: float32 [C] each.

    Raises ValueError for one without running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the batch norm has no running statistics to fold: use track_running_stats=True")
    scale = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().float()
    shift = -norm.running_mean.float() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().float()
    return scale, shift


def packed(w_qkv: Tensor, heads: int, scale: Tensor | None) -> Tensor:
    """Packed weights of the layer whose output is multiplied by `scale` [C], or not."""
    if scale is not None:
        channels = w_qkv.shape[0] // 3
        values = w_qkv[2 * channels :].float() * scale[:, None]
        w_qkv = torch.cat([w_qkv[: 2 * channels], values.to(w_qkv.dtype)])
    found: Tensor = torch.ops.sasa_bench.fused_pack_weights(w_qkv, heads)
    return found


@cache
def register() -> None:
    """Teach Inductor the above. Without effect where torch's version has no such patterns."""
    try:
        from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
        from torch._inductor.pattern_matcher import CallFunctionVarArgs
    except ImportError:
        return
    operators = torch.ops.sasa_bench
    layer = CallFunctionVarArgs(operators.fused_attention_layer.default)
    register_freezing_graph_pattern(layer, extra_check=_has_constants)(_fold)
    stem = CallFunctionVarArgs(operators.stem_inference_forward.default)
    register_freezing_graph_pattern(stem, extra_check=lambda match: not _node(match).kwargs)(_channels_last)


@dataclass(frozen=True)
class _Tail:
    """What follows a layer up to the node `end`: y scale + shift by channel, average pools, then perhaps a relu."""

    end: fx.Node
    scale: Tensor
    shift: Tensor
    pools: list[fx.Node] = field(default_factory=list)
    relu: bool = False


def _node(match: Any) -> fx.Node:
    found: fx.Node = match.output_node()
    return found


def _has_constants(match: Any) -> bool:
    return all(t is None or (isinstance(t, fx.Node) and t.op == "get_attr") for t in _node(match).args[1:4])


def _fold(match: Any, *_: Any, **__: Any) -> None:
    node = _node(match)
    graph = node.graph
    x, w, rel_row, rel_col, kernel_size, heads, zero_border = cast("Any", node.args)
    with _real_tensors():
        tail = _tail(node)
        weights, bias = packed(_constant(w), heads, tail.scale.float()), tail.shift.float()
        channels = node.meta["val"].shape[1]
    with graph.inserting_before(node):
        constants = [_add_constant(node, name, t) for name, t in (("weights", weights), ("bias", bias))]
        rest = (channels, kernel_size, heads, zero_border, tail.relu)
        folded = graph.call_function(
            torch.ops.sasa_bench.fused_attention_layer_packed.default,
            (x, constants[0], rel_row, rel_col, constants[1], *rest),
        )
    folded.meta.update(node.meta)
    with graph.inserting_before(tail.end):
        for pool in tail.pools:
            pooled = graph.call_function(pool.target, (folded, *pool.args[1:]), pool.kwargs)  # type: ignore[arg-type]
            pooled.meta.update(pool.meta)
            folded = pooled
    tail.end.replace_all_uses_with(folded)
    behind = [node]
    while behind[-1] is not tail.end:
        behind.extend(behind[-1].users)
    for each in reversed(behind):
        graph.erase_node(each)


def _channels_last(match: Any, *_: Any, **__: Any) -> None:
    _node(match).kwargs = {"channels_last": True}


def _tail(node: fx.Node) -> _Tail:
    """The longest tail of `node` that has its dtype, such as a batch norm computed in float32 behind bfloat16."""
    like = node.meta["val"]
    one = torch.ones(like.shape[1], dtype=torch.float64)
    found = longest = _Tail(node, one, torch.zeros_like(one))
    while not found.relu and len(found.end.users) == 1:
        following = _extended(found, next(iter(found.end.users)))
        if following is None:
            break
        found = following
        if found.end.meta["val"].dtype == like.dtype:
            longest = found
    return longest


def _extended(tail: _Tail, user: fx.Node) -> _Tail | None:
    """`tail` and the node behind it, or None where that is something else."""
    match user.target:
        case prims.convert_element_type.default if user.args[1] in (torch.float32, torch.bfloat16, torch.float16):
            return replace(tail, end=user)
        case aten.avg_pool2d.default if not (len(user.args) > 3 and any(user.args[3])) and len(user.args) < 7:  # type: ignore[arg-type]
            return replace(tail, end=user, pools=[*tail.pools, user])
        case aten.relu.default if not tail.pools:
            return replace(tail, end=user, relu=True)
        case aten.add.Tensor | aten.sub.Tensor | aten.mul.Tensor | aten.div.Tensor if not user.kwargs:
            first = user.args[0] is tail.end
            by = _of_channels(user.args[1] if first else user.args[0], len(tail.scale))
            if by is None or (not first and user.target is aten.div.Tensor):
                return None
            scale, shift = _applied(user.target, tail, by, first)
            return replace(tail, end=user, scale=scale, shift=shift)
    return None


def _applied(target: Any, tail: _Tail, by: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """scale and shift after a sum or product with `by`, whose first operand the tail is, or the second."""
    if target is aten.mul.Tensor or target is aten.div.Tensor:
        factor = by if target is aten.mul.Tensor else 1 / by
        return tail.scale * factor, tail.shift * factor
    if target is aten.add.Tensor:
        return tail.scale, tail.shift + by
    sign = 1 if first else -1
    return sign * tail.scale, sign * (tail.shift - by)


def _of_channels(value: Any, channels: int) -> Tensor | None:
    """A number, or a constant [C, 1, 1] or [1, C, 1, 1], as float64 [C]; None for anything else."""
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), dtype=torch.float64)
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    constant = _constant(value)
    if constant.numel() == 1:
        return constant.double().flatten().expand(channels)
    if constant.shape in ((channels, 1, 1), (1, channels, 1, 1)):
        return constant.double().flatten()
    return None


def _constant(node: Any) -> Tensor:
    found: Tensor = operator.attrgetter(node.target)(node.graph.owning_module)
    return found.detach()


def _add_constant(node: fx.Node, name: str, value: Tensor) -> fx.Node:
    module = node.graph.owning_module
    assert module is not None
    target = f"_{node.name}_{name}"
    module.register_buffer(target, value)
    made = node.graph.get_attr(target)
    made.meta["val"] = value
    return made


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Computes with constants, not with their shapes alone."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        yield
