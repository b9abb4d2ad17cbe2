"""What tests of the fused kernel share: plain attention as the reference, random inputs, and budgets of error."""

from __future__ import annotations

import math

import torch
from torch._prims_common import suggest_memory_format

# How much larger than the plain computation's own rounding error in the same dtype the kernel's may be: its
# sums run in another order and its exponential is a polynomial.
ERROR_FACTOR = 8


def plain_attention(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border, probabilities=None):
    """Dense attention over all pairs of pixels with a mask; computes in the dtype of its arguments.

    `probabilities` is a list that gets the softmax, [batch, heads, pixels, keys].
    """
    batch, channels, height, width = q.shape
    d, r, n = channels // heads, kernel_size // 2, height * width
    q, k, v = (t.reshape(batch, heads, d, n) for t in (q, k, v))
    pixel = torch.arange(n)
    y, x = pixel // width, pixel % width
    row, col = y[None] - y[:, None] + r, x[None] - x[:, None] + r
    inside = (row >= 0) & (row < kernel_size) & (col >= 0) & (col < kernel_size)
    logits = torch.einsum("bhci,bhcj->bhij", q, k)
    offset = torch.arange(kernel_size) - r
    outside_row = (y[:, None] + offset < 0) | (y[:, None] + offset >= height)
    outside_col = (x[:, None] + offset < 0) | (x[:, None] + offset >= width)
    outside = outside_row[:, :, None] | outside_col[:, None, :]
    window = torch.zeros(batch, heads, n, kernel_size, kernel_size, dtype=q.dtype)
    if rel_row is not None:
        rows = torch.einsum("bhci,hca->bhia", q[:, :, : d // 2], rel_row)
        cols = torch.einsum("bhci,hca->bhia", q[:, :, d // 2 :], rel_col)
        window = rows[..., :, None] + cols[..., None, :]
        at = row.clamp(0, kernel_size - 1) * kernel_size + col.clamp(0, kernel_size - 1)
        logits = logits + window.flatten(3).gather(3, at.expand(batch, heads, n, n))
    logits = logits.masked_fill(~inside, float("-inf"))
    if zero_border:
        padding = window.masked_fill(~outside, float("-inf")).flatten(3)
        logits = torch.cat([logits, padding], dim=3)
    weights = logits.softmax(-1)[..., :n]
    if probabilities is not None:
        probabilities.append(weights)
    return torch.einsum("bhij,bhcj->bhci", weights, v).reshape(batch, channels, height, width)


def inputs(batch, heads, d, height, width, kernel_size, relative, dtype=torch.float32, scale=1.0):
    """q, k, v, rel_row, rel_col and the gradient of y, fresh and random."""

    def random(*shape):
        return (torch.randn(*shape) * scale).to(dtype)

    q, k, v, g = (random(batch, heads * d, height, width) for _ in range(4))
    rel = [random(heads, d // 2, kernel_size), random(heads, d - d // 2, kernel_size)] if relative else [None, None]
    return [q, k, v, *rel], g


def with_gradients(function, tensors, g, *rest):
    """[y, *gradients of the tensors that are not None]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, *rest)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], g)]


def moved_draws(function, tensors, g, rest):
    """Exact results for float32 tensors whose numbers moved by as much as they are rounded, three times.

    However well an algorithm rounds, its results differ from the exact ones by about as much: where large terms
    cancel, that is far more than the last bit of the result, and plain attention may meet it by luck.
    """
    if g.dtype != torch.float32:
        return []

    def moved(t):
        return None if t is None else t.double() * (1 + torch.finfo(t.dtype).eps * torch.randn(t.shape))

    return [with_gradients(function, [moved(t) for t in tensors], moved(g), *rest) for _ in range(3)]


def terms_of_embedding(q, k, v, row, col, g, rest):
    """How large what the gradient of the relative embedding sums up is: P_ij |dy_i| |v_j| max|q_i|, of one head.

    Where a window has one row or column of keys the sum is exactly nothing, and its rounding error is not.
    """
    found = []
    plain_attention(q, k, v, row, col, *rest, found)
    heads = rest[1]
    v, q, g = (t.unflatten(1, (heads, -1)).flatten(3) for t in (v, q, g))
    size = g.norm(dim=2) * q.abs().amax(2)
    terms = found[0] * size[..., None] * v.norm(dim=2)[:, :, None]
    return terms.square().sum((0, 2, 3)).sqrt().max().item()


def terms_of_queries_and_keys(q, k, v, row, col, g, rest):
    """How large what dq and dk sum up is, number by number: P_ij |dy_i v_j| |k_j|, and |q_i| for dk.

    The kernel takes dy_i . y_i from dy_i . v_j. Where one key has all the weight nothing is left of them but rounding
    errors, which plain attention does not have: it multiplies by a weight of exactly 1.
    """
    found, heads, shape = [], rest[1], q.shape
    plain_attention(q, k, v, row, col, *rest, found)
    q, k, v, g = (t.unflatten(1, (heads, -1)).flatten(3).square() for t in (q, k, v, g))
    weights = found[0].square() * torch.einsum("bhci,bhcj->bhij", g, v)
    sums = torch.einsum("bhij,bhcj->bhci", weights, k), torch.einsum("bhij,bhci->bhcj", weights, q)
    return [t.sqrt().reshape(shape) for t in sums]


def poison(tensors):
    """Leaves NaN in the memory that the next allocations of these sizes are likely to get."""
    for t in tensors:
        if t is not None:
            junk = [torch.full_like(t, float("nan")) for _ in range(4)]
            del junk


def scales(dtype):
    return (1.0, math.log2(math.e), 0.7) if dtype == torch.float32 else (1.0,)


def plain_draws(tensors, g, rest):
    """Plain attention in the tensors' dtype, three times: how large its rounding errors are is a matter of
    luck.

    The function is the same for (q, k + r) and (q s, (k + r) / s), but its roundings are not: the kernel too
    scales q.
    """
    results = []
    for s in scales(g.dtype):
        q, k, v, row, col = tensors
        scaled = [q * s, k / s, v, *(None if t is None else t / s for t in (row, col))]
        y, dq, dk, dv, *drel = with_gradients(plain_attention, scaled, g, *rest)
        results.append([y, dq * s, dk / s, dv, *(t / s for t in drel)])
    return results


def assert_matches(tensors, g, kernel_size, heads, zero_border):
    """y and gradients are as close to float64 as plain attention in the same dtype, times ERROR_FACTOR."""
    rest = (kernel_size, heads, zero_border)
    exact = with_gradients(plain_attention, [None if t is None else t.double() for t in tensors], g.double(), *rest)
    draws = plain_draws(tensors, g, rest) + moved_draws(plain_attention, tensors, g, rest)
    poison([g, *tensors])
    ours = with_gradients(torch.ops.sasa_bench.fused_local_attention, tensors, g, *rest)
    inferred = torch.ops.sasa_bench.fused_local_attention(*(None if t is None else t.detach() for t in tensors), *rest)
    names = ["y", "dq", "dk", "dv", "drel_row", "drel_col"]
    terms = {}
    if g.numel():
        doubles = [None if t is None else t.double() for t in tensors]
        terms = dict(zip(("dq", "dk"), terms_of_queries_and_keys(*doubles, g.double(), rest), strict=True))
        terms |= dict.fromkeys(("drel_row", "drel_col"), torch.tensor(terms_of_embedding(*doubles, g.double(), rest)))
    compared = [*enumerate(zip(names, exact, ours, strict=False)), (0, ("inference", exact[0], inferred))]
    for i, (name, want, got) in compared:
        assert got.dtype == g.dtype
        assert got.shape == want.shape
        if not want.numel():
            continue
        assert got.isfinite().all(), name
        error = (got.double() - want).abs()
        around = torch.stack([(draw[i].double() - want).abs().max() for draw in draws]).max()
        size = want.abs().max()
        if name in terms:
            size = terms[name] if name.startswith("drel") else terms[name].maximum(size)
        budget = (ERROR_FACTOR * (torch.finfo(g.dtype).eps * size).maximum(around)).expand_as(error)
        at = (error - budget).argmax()
        assert (error <= budget).all(), f"{name}: error {error.flatten()[at]:.2e}, budget {budget.flatten()[at]:.2e}"


def projected(x, weight, row, col, kernel_size, heads, zero_border):
    q, k, v = torch.einsum("oc,bchw->bohw", weight, x).chunk(3, dim=1)
    return plain_attention(q, k, v, row, col, kernel_size, heads, zero_border)


def projected_draws(tensors, g, rest):
    """The same for the layer, whose weights make q and k."""
    results = []
    for s in scales(g.dtype):
        x, weight, row, col = tensors
        third = torch.ones(weight.shape[0] // 3, 1, dtype=g.dtype)
        by = torch.cat([s * third, third / s, third])
        y, dx, dw, *drel = with_gradients(projected, [x, weight * by, row / s, col / s], g, *rest)
        results.append([y, dx, dw * by, *(t / s for t in drel)])
    return results


def layer_inputs(batch, inputs, heads, d, height, width, kernel_size, dtype):
    """x, w_qkv, rel_row, rel_col and the gradient of y, fresh and random."""
    shapes = [(batch, inputs, height, width), (3 * heads * d, inputs), (heads, d // 2, kernel_size)]
    x, weight, row = (torch.randn(shape).to(dtype) for shape in shapes)
    col, g = (
        torch.randn(heads, d - d // 2, kernel_size).to(dtype),
        torch.randn(batch, heads * d, height, width).to(dtype),
    )
    return [x, weight / max(1, inputs) ** 0.5, row, col], g


def assert_layer_matches(tensors, g, kernel_size, heads, zero_border, channels_last, bias, relu):
    """The layer with its gradients, at inference, and with packed weights, held to the budget of `assert_matches`."""
    rest = (kernel_size, heads, zero_border)
    exact = with_gradients(projected, [t.double() for t in tensors], g.double(), *rest)
    draws = projected_draws(tensors, g, rest) + moved_draws(projected, tensors, g, rest)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, *parameters = (t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors)
    ops = torch.ops.sasa_bench
    poison([g, *tensors])
    got = with_gradients(ops.fused_attention_layer, [x, *parameters], g.contiguous(memory_format=memory_format), *rest)
    weight, *rel = parameters
    packed = ops.fused_pack_weights(weight, heads)
    channels = g.shape[1]
    stored = ops.fused_attention_layer_packed(x, packed, *rel, bias, channels, *rest, relu)
    plainly = ops.fused_attention_layer_packed(x, packed, *rel, None, channels, *rest, False)
    after = exact[0] if bias is None else exact[0] + bias.double()[:, None, None]
    pairs = dict(zip(["y", "dx", "dw", "drel_row", "drel_col"], zip(got, exact, strict=True), strict=True))
    numbers = {name: i for i, name in enumerate(pairs)}
    q, k, v = torch.einsum("oc,bchw->bohw", weight.double(), x.double()).chunk(3, dim=1)
    terms = terms_of_embedding(q, k, v, *(t.double() for t in rel), g.double(), rest) if g.numel() else 0
    pairs |= {"inference": (ops.fused_attention_layer(x, *parameters, *rest), exact[0]), "packed": (plainly, exact[0])}
    pairs |= {"stored": (stored, after.relu() if relu else after)}
    for name, (y, want) in pairs.items():
        assert y.dtype == g.dtype, name
        assert y.shape == want.shape, name
        if y.dim() == 4:
            assert y.is_contiguous(memory_format=suggest_memory_format(x)), name
        if not want.numel():
            continue
        assert y.isfinite().all(), name
        number = numbers.get(name, 0)
        size = terms if name.startswith("drel") else want.abs().max().item()
        rounding = torch.finfo(g.dtype).eps * size
        around = [(draw[number].double() - exact[number]).abs().max().item() for draw in draws]
        budget = ERROR_FACTOR * max(rounding, *around)
        error = (y.double() - want).abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
