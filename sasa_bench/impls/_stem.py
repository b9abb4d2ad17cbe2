"""The attention stem by the native kernel of csrc/stem.cpp: attention, batch norm, relu and max pool in one pass.

The kernel needs no torch; torch's operators `sasa_bench::stem_top` and `sasa_bench::stem_inference` call it through
ctypes. Query and key projections reach it as one small form per head, and the mixed value projections as one matrix
per place in a block: both are products of parameters, so their gradients are torch's own. Value weights `values` are
these matrices [16, C, 3], or the filters of a convolution [C, 3, 4, 4].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import STEM_HEADS
from sasa_bench.impls import _flops
from sasa_bench.impls._native import ISAS, Library, chosen_isa
from sasa_bench.impls._operator import composite, refuse_transforms
from sasa_bench.networks.layers import STEM_WINDOW
from sasa_bench.networks.stem import Norm, place_weights

CSRC = Path(__file__).parent / "csrc"
HEADERS = ("stem", "stem_forward", "stem_backward")

COLOURS = 3

_WORDS = (
    *("batch", "height", "width", "heads", "channels", "threads"),
    *("x", "x_image", "x_colour", "x_row", "x_pixel", "form", "places", "filters", "shift"),
    *("top", "top_image", "top_channel", "top_row", "top_block", "argmax", "base", "sums"),
    *("gradient", "offset", "slope", "dx", "dform", "dvalues"),
)


class _Problem(ctypes.Structure):
    """The fields of `Problem` in csrc/stem.h, each a whole number or an address."""

    kept: dict[str, Tensor | int | None]
    _fields_ = [(name, ctypes.c_int64) for name in _WORDS]


BUILDS = ("avx512", "avx2", "portable")
"""What the kernel is built for: larger instruction sets have nothing more for it."""


def library(isa: str | None = None) -> Library:
    """The kernel for one instruction set, by default the chosen one."""
    flags = ISAS[isa or chosen_isa()][1]
    isa = next(build for build in BUILDS if ISAS[build][1] <= flags)
    headers = tuple(CSRC / f"{name}.h" for name in HEADERS)
    return Library("stem", CSRC / "stem.cpp", headers, ("-O2", "-fno-math-errno", *ISAS[isa][0]))


@cache
def _loaded(isa: str) -> ctypes.CDLL:
    kernel = ctypes.CDLL(str(library(isa).build()))
    size = kernel.sasa_stem_problem_bytes()
    if size != ctypes.sizeof(_Problem):
        raise RuntimeError(f"{library(isa).path} has a Problem of {size} bytes: delete it and load again")
    return kernel


def _problem(x: Tensor, form: Tensor, values: Tensor, **rest: Tensor | int | None) -> _Problem:
    """`rest`: results, which the kernel writes to, and tensors that are contiguous."""
    batch, _, height, width = x.shape
    heads = form.shape[0]
    words = {
        "batch": batch,
        "height": height,
        "width": width,
        "heads": heads,
        "channels": _channels(values) // heads,
        "threads": torch.get_num_threads(),
        "x": x,
        **dict(zip(("x_image", "x_colour", "x_row", "x_pixel"), x.stride(), strict=True)),
        "form": form.contiguous(),
        "filters" if values.dim() == 4 else "places": values.contiguous(),
        **rest,
    }
    numbers = {n: w.data_ptr() if isinstance(w, Tensor) else w or 0 for n, w in words.items()}
    problem = _Problem(**numbers)
    problem.kept = words  # what it points to
    return problem


def _pooled(x: Tensor, channels: int, channels_last: bool = False) -> Tensor:
    """An unwritten map [B, C, ceil(H / 4), ceil(W / 4)], channels last if x is."""
    batch, _, height, width = x.shape
    shape = (batch, channels, -(-height // STEM_WINDOW), -(-width // STEM_WINDOW))
    last = channels_last or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


def _strides(top: Tensor) -> dict[str, int]:
    return dict(zip(("top_image", "top_channel", "top_row", "top_block"), top.stride(), strict=True))


def _channels(values: Tensor) -> int:
    return values.shape[0 if values.dim() == 4 else 1]


@torch.library.custom_op(
    "sasa_bench::stem_inference_forward", mutates_args=(), device_types="cpu", tags=torch.Tag.flexible_layout
)
def inference_forward(x: Tensor, form: Tensor, values: Tensor, shift: Tensor, channels_last: bool = False) -> Tensor:
    """relu(the largest y of each block + shift); no gradients.

    x [B, 3, H, W]; form [N, 3, 17]; values [16, C, 3] or [C, 3, 4, 4]; shift [C] -> [B, C, H / 4, W / 4], upwards,
    with `channels_last` in that order even where x is not.
    """
    y = _pooled(x, _channels(values), channels_last)
    problem = _problem(x, form, values, shift=shift.contiguous(), top=y, **_strides(y))
    _loaded(chosen_isa()).sasa_stem_forward(ctypes.byref(problem))
    return y


@inference_forward.register_fake
def _(x: Tensor, form: Tensor, values: Tensor, shift: Tensor, channels_last: bool = False) -> Tensor:
    return _pooled(x, _channels(values), channels_last)


@torch.library.custom_op(
    "sasa_bench::stem_top_forward", mutates_args=(), device_types="cpu", tags=torch.Tag.flexible_layout
)
def top_forward(x: Tensor, form: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest y of each block, the pixel of the block that has it, and mean and variance of y in each channel.

    Arguments as in inference_forward -> top [B, C, H / 4, W / 4], argmax [B, H / 4, W / 4, C] uint8, mean and variance
    [C] over all pixels (divided by their number). Differentiable in top, mean and variance.
    """
    channels = _channels(values)
    top = _pooled(x, channels)
    argmax = x.new_empty((top.shape[0], *top.shape[2:], channels), dtype=torch.uint8)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if not pixels:
        # Of no pixels; finite, for a NaN times the gradients of an empty batch would be NaN and not 0.
        return top, argmax, x.new_zeros(channels), x.new_ones(channels)
    kernel = _loaded(chosen_isa())
    # Sums are taken about the largest y of some block, so that a large mean costs the variance no digits.
    base, first = x.new_zeros(channels), x[:1, :, :STEM_WINDOW, :STEM_WINDOW]
    near = _pooled(first, channels)
    kernel.sasa_stem_forward(ctypes.byref(_problem(first, form, values, top=near, **_strides(near), base=base)))
    base.copy_(near.flatten())
    sums = x.new_zeros((torch.get_num_threads(), 2, channels), dtype=torch.float64)
    problem = _problem(x, form, values, top=top, **_strides(top), argmax=argmax, base=base, sums=sums)
    kernel.sasa_stem_forward(ctypes.byref(problem))
    off, squares = sums.sum(0) / pixels
    return top, argmax, (base + off).float(), (squares - off * off).clamp_min(0).float()


@top_forward.register_fake
def _(x: Tensor, form: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = _channels(values)
    top = _pooled(x, channels)
    argmax = x.new_empty((top.shape[0], *top.shape[2:], channels), dtype=torch.uint8)
    return top, argmax, x.new_empty(channels), x.new_empty(channels)


def _refusing(name: str, forward: Any) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        refuse_transforms(name, "the stem", *(t for t in arguments if isinstance(t, Tensor)))
        return forward(*arguments)

    return call


_IN = "(Tensor x, Tensor form, Tensor values"
stem_top = composite("stem_top", f"{_IN}) -> (Tensor, Tensor, Tensor, Tensor)", _refusing("stem_top", top_forward))
stem_inference = composite(
    "stem_inference",
    f"{_IN}, Tensor shift, bool channels_last=False) -> Tensor",
    _refusing("stem_inference", inference_forward),
)


@torch.library.custom_op("sasa_bench::stem_backward", mutates_args=(), device_types="cpu")
def stem_backward(
    gradient: Tensor,
    offset: Tensor | None,
    slope: Tensor | None,
    x: Tensor,
    form: Tensor,
    values: Tensor,
    argmax: Tensor,
    image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty without `image`), form and values from those that arrive at every y.

    gradient [B, H / 4, W / 4, C] arrives at the pixel in `argmax`, and offset [C] + slope [C] y at every pixel.
    """
    threads, overlapping = torch.get_num_threads(), values.dim() == 4
    make = torch.zeros_like if overlapping else torch.empty_like
    dx = make(x, memory_format=torch.contiguous_format) if image else x.new_empty(0)
    dform = form.new_zeros((threads, *form.shape), dtype=torch.float64)
    dvalues = form.new_zeros((threads, *values.shape), dtype=torch.float64)
    if x.numel():
        outputs = {"dx": dx if image else None, "dform": dform, "dvalues": dvalues}
        problem = _problem(x, form, values, argmax=argmax, gradient=gradient, offset=offset, slope=slope, **outputs)
        _loaded(chosen_isa()).sasa_stem_backward(ctypes.byref(problem))
    return dx, dform.sum(0).float(), dvalues.sum(0).float()


@stem_backward.register_fake
def _(
    gradient: Tensor,
    offset: Tensor | None,
    slope: Tensor | None,
    x: Tensor,
    form: Tensor,
    values: Tensor,
    argmax: Tensor,
    image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if image else x.new_empty(0)
    return dx, torch.empty_like(form), torch.empty_like(values)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, argmax, mean, _ = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(*inputs, argmax, mean)


def _differentiate(ctx, d_top, _argmax, d_mean, d_variance):  # type: ignore[no-untyped-def]
    x, form, values, argmax, mean = ctx.saved_tensors
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    slope = 2 / max(pixels, 1) * d_variance
    offset = d_mean / max(pixels, 1) - slope * mean
    gradient = d_top.permute(0, 2, 3, 1).contiguous()
    image = ctx.needs_input_grad[0]
    dx, dform, dvalues = stem_backward(gradient, offset, slope, x, form, values, argmax, image)
    return dx if image else None, dform, dvalues


top_forward.register_autograd(_differentiate, setup_context=_keep)
for _name, _formula in (
    ("stem_inference_forward", _flops.stem),
    ("stem_top_forward", _flops.stem),
    ("stem_backward", _flops.stem_backward),
):
    _flops.count(_name, _formula)


def run(x: Tensor, parameters: Mapping[str, Tensor], norm: Norm) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The stem x [B, 3, H, W] -> y [B, C, H / 4, W / 4], upwards, and mean and variance [C] of the batch where `norm`
    uses those; None where this kernel cannot: on another device, in another dtype, for another number of colours.

    parameters  those of networks.stem.AttentionStem by name
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or x.shape[1] != COLOURS:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        p = {name: t.float() for name, t in parameters.items()}
        y, mean, variance = _run(x.float(), p, norm)
        return y.to(dtype), mean, variance


def _run(x: Tensor, p: Mapping[str, Tensor], norm: Norm) -> tuple[Tensor, Tensor | None, Tensor | None]:
    form = _form(p["w_qk"], p["rel_row"], p["rel_col"])
    weight, bias = norm.weight.float(), norm.bias.float()
    if norm.mean is not None and norm.variance is not None:
        scale = weight * (norm.variance.float() + norm.eps).rsqrt()
        shift = bias - scale * norm.mean.float()
        values = _values(p, scale)
        if not torch.is_grad_enabled():
            return stem_inference(x, form, values, shift), None, None
        top, *_ = stem_top(x, form, values)
        return (top + shift[:, None, None]).relu(), None, None
    # The largest y is the largest of the normalised ones where the weight is positive: elsewhere -y takes its place.
    sign = torch.where(weight < 0, -1.0, 1.0)
    top, _, mean, variance = stem_top(x, form, _values(p, sign))
    scale = weight * sign * (variance + norm.eps).rsqrt()
    shift = bias - scale * mean
    y = (top * scale[:, None, None] + shift[:, None, None]).relu()
    return y, (mean * sign).detach(), variance.detach()


def _form(w_qk: Tensor, rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """[N, 3, 3 + 7 + 7]: W_Q^T times W_K, the row and the column embeddings."""
    d = w_qk.shape[0] // 2 // STEM_HEADS
    w_q, w_k = w_qk.unflatten(0, (2, STEM_HEADS, d))
    half = rel_row.shape[1]
    right = torch.cat([w_k, F.pad(rel_row, (0, 0, 0, d - half)), F.pad(rel_col, (0, 0, half, 0))], dim=2)
    return w_q.transpose(1, 2) @ right


def _values(p: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """[16, C, 3] or [C, 3, 4, 4], each channel times `scale` [C]."""
    if p["w_v"].dim() == 4:
        return (p["w_v"] * scale[:, None, None, None]).contiguous()
    return (place_weights(p) * scale[:, None]).contiguous()
