"""Kernels of local attention as torch operators: checks of arguments, fake tensors, gradients.

An implementation hands over functions that fill given tensors; `define` makes two differentiable operators of them, one
of q, k and v and one of the whole projection qkv, whose gradient is one tensor too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sasa_bench.impls import _flops
from sasa_bench.networks.core import has_tangent

RunForward = Callable[..., None]
"""(q, k, v, rel_row, rel_col, y, log2_sum, kernel_size, heads, zero_border): fills y [B, C, H, W] and log2_sum
[B, heads, H, W], the base-2 logarithm of the softmax's denominator."""

RunBackward = Callable[..., None]
"""(dy, q, k, v, rel_row, rel_col, y, log2_sum, dq, dk, dv, drel_row, drel_col, kernel_size, heads, zero_border): fills
dq, dk, dv [B, C, H, W], drel_row and drel_col; the last two are None without positions."""


@dataclass(frozen=True)
class Operators:
    """What `define` makes.

    attend         (q, k, v, rel_row, rel_col, kernel_size, heads, zero_border) -> y, differentiable once
    attend_qkv     the same of qkv [B, 3C, H, W]
    forward, backward, forward_qkv, backward_qkv
                   the torch operators beneath, for torch.library.opcheck
    """

    attend: Callable[..., Tensor]
    attend_qkv: Callable[..., Tensor]
    forward: Any
    backward: Any
    forward_qkv: Any
    backward_qkv: Any


def check(
    q: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int, heads: int,
    dtypes: Sequence[torch.dtype], what: str, **maps: Tensor,
) -> None:  # fmt: skip
    """Raises ValueError where shapes, dtypes or devices do not fit together; the message states which are allowed.

    Args:
        maps: k and v, where they are not thirds of one tensor with q.
    """
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [batch, channels, height, width].")
    if q.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"q is {q.dtype}; the {what} kernels take {allowed}: convert the inputs.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and at least 1.")
    if heads < 1 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} channels do not divide into {heads} heads: choose a divisor.")
    width = q.shape[1] // heads
    others: list[tuple[str, Tensor, tuple[int, ...]]] = [(name, tensor, q.shape) for name, tensor in maps.items()]
    if (rel_row is None) != (rel_col is None):
        raise ValueError("only one of rel_row and rel_col is given: pass both, or None for both.")
    if rel_row is not None and rel_col is not None:
        others.append(("rel_row", rel_row, (heads, width // 2, kernel_size)))
        others.append(("rel_col", rel_col, (heads, width - width // 2, kernel_size)))
    dtype, device = q.dtype, q.device
    for name, tensor, shape in others:
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; next to this q it must be {tuple(shape)}.")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, q is {dtype} on {device}: make them match.")
    if max(3 * q.shape[1], kernel_size) * (q.shape[2] + kernel_size) * q.shape[3] >= 2**31:
        raise ValueError(f"an image of {q.shape[1]} x {q.shape[2]} x {q.shape[3]} has too many elements: split it.")


def thirds(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of the projection [B, 3C, H, W]. Raises ValueError."""
    if qkv.dim() != 4 or qkv.shape[1] % 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be [batch, 3 * channels, height, width].")
    q, k, v = qkv.chunk(3, dim=1)
    return q, k, v


def define(
    name: str,
    what: str,
    dtypes: Sequence[torch.dtype],
    run_forward: RunForward,
    run_backward: RunBackward,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Operators:
    """Registers sasa_bench::NAME, NAME_qkv and the passes of each; outputs and gradients have `memory_format`.

    Args:
        name: of the operators.
        what: names the kernels in messages, as in "the CUDA kernels take float32".
        dtypes: which q may have.
        run_forward, run_backward: launch the kernels.
    """

    def fresh(like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=memory_format)

    def flat(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)

    def outputs(q: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        batch, _, height, width = q.shape
        return fresh(q), q.new_empty((batch, heads, height, width), dtype=torch.float32)

    def no_position(q: Tensor, drel: Tensor | None) -> Tensor:
        return q.new_empty(0) if drel is None else drel

    def backward_into(dq, dk, dv, dy, q, k, v, rel_row, rel_col, y, log2_sum, axes):  # type: ignore[no-untyped-def]
        drel_row, drel_col = flat(rel_row), flat(rel_col)
        if q.numel():
            gradients = (dq, dk, dv, drel_row, drel_col)
            run_backward(dy, q, k, v, rel_row, rel_col, y, log2_sum, *gradients, *axes)
        elif drel_row is not None and drel_col is not None:
            drel_row.zero_()
            drel_col.zero_()
        return no_position(q, drel_row), no_position(q, drel_col)

    def computed(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
        y, log2_sum = outputs(q, heads)
        if q.numel():
            run_forward(q, k, v, rel_row, rel_col, y, log2_sum, kernel_size, heads, zero_border)
        return y, log2_sum

    def forward(
        q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
        heads: int, zero_border: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check(q, rel_row, rel_col, kernel_size, heads, dtypes, what, k=k, v=v)
        return computed(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)

    def forward_qkv(
        qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int, heads: int, zero_border: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = thirds(qkv)
        check(q, rel_row, rel_col, kernel_size, heads, dtypes, what)
        return computed(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border)

    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor,
        log2_sum: Tensor, kernel_size: int, heads: int, zero_border: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check(q, rel_row, rel_col, kernel_size, heads, dtypes, what, k=k, v=v)
        maps = (fresh(q), fresh(k), fresh(v))
        axes = (kernel_size, heads, zero_border)
        return *maps, *backward_into(*maps, dy, q, k, v, rel_row, rel_col, y, log2_sum, axes)

    def backward_qkv(
        dy: Tensor, qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, y: Tensor, log2_sum: Tensor,
        kernel_size: int, heads: int, zero_border: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = thirds(qkv)
        check(q, rel_row, rel_col, kernel_size, heads, dtypes, what)
        dqkv = fresh(qkv)
        axes = (kernel_size, heads, zero_border)
        return dqkv, *backward_into(*thirds(dqkv), dy, q, k, v, rel_row, rel_col, y, log2_sum, axes)

    def fake_forward(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
        check(q, rel_row, rel_col, kernel_size, heads, dtypes, what, k=k, v=v)
        return outputs(q, heads)

    def fake_forward_qkv(qkv, rel_row, rel_col, kernel_size, heads, zero_border):  # type: ignore[no-untyped-def]
        return fake_forward(*thirds(qkv), rel_row, rel_col, kernel_size, heads, zero_border)

    def fake_backward(dy, q, k, v, rel_row, rel_col, *_):  # type: ignore[no-untyped-def]
        return fresh(q), fresh(k), fresh(v), no_position(q, flat(rel_row)), no_position(q, flat(rel_col))

    def fake_backward_qkv(dy, qkv, rel_row, rel_col, *_):  # type: ignore[no-untyped-def]
        return fresh(qkv), no_position(qkv, flat(rel_row)), no_position(qkv, flat(rel_col))

    def no_second_gradient(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"{name} has no second derivative: call backward without create_graph, or use another "
            "implementation of local attention for double backward."
        )

    def register(maps: int, suffix: str, functions: tuple[Callable[..., Any], ...]) -> tuple[Any, Any]:
        """The passes as operators; the first `maps` arguments of the forward are maps, then come rel_row, rel_col."""
        there, fake_there, back, fake_back = functions
        forward_op = _opaque(f"{name}{suffix}_forward", there, fake_there)
        backward_op = _opaque(f"{name}{suffix}_backward", back, fake_back)

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.axes = inputs[maps + 2 :]
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(*inputs[: maps + 2], *output)

        def gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
            *inputs, y, log2_sum = ctx.saved_tensors
            found = backward_op(dy, *inputs, y, log2_sum, *ctx.axes)
            rel = (None, None) if inputs[maps] is None else found[maps:]
            return *found[:maps], *rel, None, None, None

        differentiate = torch.library.register_autograd
        differentiate(forward_op, gradients, setup_context=save, lib=library)
        differentiate(backward_op, no_second_gradient, lib=library)
        return forward_op, backward_op

    forward_op, backward_op = register(3, "", (forward, fake_forward, backward, fake_backward))
    qkv_op, qkv_backward_op = register(1, "_qkv", (forward_qkv, fake_forward_qkv, backward_qkv, fake_backward_qkv))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int,
        heads: int, zero_border: bool,
    ) -> Tensor:  # fmt: skip
        refuse_transforms(name, "local attention", q, k, v, rel_row, rel_col)
        return _output(forward_op, (q, k, v, rel_row, rel_col), kernel_size, heads, zero_border)

    def attend_qkv(
        qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int, heads: int, zero_border: bool,
    ) -> Tensor:  # fmt: skip
        refuse_transforms(name, "local attention", qkv, rel_row, rel_col)
        return _output(qkv_op, (qkv, rel_row, rel_col), kernel_size, heads, zero_border)

    rest = "Tensor? rel_row, Tensor? rel_col, int kernel_size, int heads, bool zero_border) -> Tensor"
    for suffix, maps, function in (("", "Tensor q, Tensor k, Tensor v", attend), ("_qkv", "Tensor qkv", attend_qkv)):
        composite(f"{name}{suffix}", f"({maps}, {rest}", function)
        autocast(f"{name}{suffix}", "CUDA")
    counted = (
        ("_forward", _flops.forward),
        ("_backward", _flops.backward),
        ("_qkv_forward", _flops.forward_qkv),
        ("_qkv_backward", _flops.backward_qkv),
    )
    for suffix, formula in counted:
        _flops.count(f"{name}{suffix}", formula)
    return Operators(attend, attend_qkv, forward_op, backward_op, qkv_op, qkv_backward_op)


def _opaque(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator sasa_bench::NAME that `function` computes into fresh tensors.

    torch.library.custom_op does the same, and looks in each call whether an output is an input: 6 microseconds.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sasa_bench::{name}", fake, lib=library)
    return getattr(torch.ops.sasa_bench, name).default


def _output(operator: Any, tensors: tuple[Tensor | None, ...], *axes: int) -> Tensor:
    """The first output of an operator, without torch's wrapper for gradients where none is asked for: it is Python."""
    y: Tensor
    asked = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    # Under vmap a tensor does not show that the one beneath it needs a gradient.
    if asked or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        y = operator(*tensors, *axes)[0]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = operator(*tensors, *axes)[0]
    return y


def composite(name: str, signature: str, function: Callable[..., Any]) -> Any:
    """The operator sasa_bench::NAME that consists of others, with what a function checks before it calls them."""
    library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.sasa_bench, name)


def autocast(name: str, device: str) -> None:
    """Under torch.autocast the operator sasa_bench::NAME runs in its dtype on CPU or CUDA, as convolutions do."""
    operator = getattr(torch.ops.sasa_bench, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def run(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device.lower())
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*(a.to(dtype) if _is_cast(a) else a for a in arguments))

    library.impl(name, run, f"Autocast{device}")


def _is_cast(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64


def refuse_transforms(name: str, what: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError where torch would lose a derivative of operator `name`, which computes `what`."""
    given = [t for t in tensors if t is not None]
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    if (in_functorch and any(t.requires_grad for t in given)) or has_tangent(*given):
        raise NotImplementedError(
            f"torch.func and forward-mode derivatives do not go through {name}: use another implementation of "
            f"{what}, such as unfold"
        )


library = torch.library.Library("sasa_bench", "FRAGMENT")
