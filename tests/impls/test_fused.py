"""The fused kernel against a plain float64 reference: every build, border, position, shape and gradient."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from sasa_bench.impls import Window, _native, fused

CSRC = Path(fused.__file__).parent / "csrc"
REASON = fused.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# How much larger than the plain computation's own rounding error in the same dtype the kernel's may be: its
# sums run in another order and its exponential is a polynomial.
ERROR_FACTOR = 8


@pytest.fixture(scope="module", autouse=True)
def _built():
    fused.build(_native.executable_isas())
    yield
    fused.load()


# The others differ from these in their products of matrices alone.
ATTENTION_BUILDS = [build for build in _native.executable_isas() if build not in fused.ATTENTION]


@pytest.fixture(params=ATTENTION_BUILDS)
def isa(request):
    fused.load(request.param)
    return request.param


# avx512_wide and avx512 multiply float32 as these do, and bfloat16 as the builds without AVX-512.
PRODUCT_BUILDS = [
    build
    for build in _native.executable_isas()
    if build not in {fused.ATTENTION.get(b) for b in _native.executable_isas()}
]


@pytest.fixture(params=PRODUCT_BUILDS)
def products(request):
    fused.load(request.param)
    return request.param


@pytest.fixture
def kernel():
    fused.load()
    return torch.ops.sasa_bench.fused_local_attention


def plain_attention(q, k, v, rel_row, rel_col, kernel_size, heads, zero_border):
    """Dense attention over all pairs of pixels with a mask; computes in the dtype of its arguments."""
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


def poison(tensors):
    """Leaves NaN in the memory that the next allocations of these sizes are likely to get."""
    for t in tensors:
        if t is not None:
            junk = [torch.full_like(t, float("nan")) for _ in range(4)]
            del junk


def plain_draws(tensors, g, rest):
    """Plain attention in the tensors' dtype, three times: how large its rounding errors are is a matter of
    luck.

    The function is the same for (q, k + r) and (q s, (k + r) / s), but its roundings are not: the kernel too
    scales q.
    """
    results = []
    for s in (1.0, math.log2(math.e), 0.7) if g.dtype == torch.float32 else (1.0,):
        q, k, v, row, col = tensors
        scaled = [q * s, k / s, v, *(None if t is None else t / s for t in (row, col))]
        y, dq, dk, dv, *drel = with_gradients(plain_attention, scaled, g, *rest)
        results.append([y, dq * s, dk / s, dv, *(t / s for t in drel)])
    return results


def assert_matches(tensors, g, kernel_size, heads, zero_border):
    """y and gradients are as close to float64 as plain attention in the same dtype, times ERROR_FACTOR."""
    rest = (kernel_size, heads, zero_border)
    exact = with_gradients(plain_attention, [None if t is None else t.double() for t in tensors], g.double(), *rest)
    plains = plain_draws(tensors, g, rest)
    poison([g, *tensors])
    ours = with_gradients(torch.ops.sasa_bench.fused_local_attention, tensors, g, *rest)
    inferred = torch.ops.sasa_bench.fused_local_attention(*(None if t is None else t.detach() for t in tensors), *rest)
    names = ["y", "dq", "dk", "dv", "drel_row", "drel_col"]
    compared = [*enumerate(zip(names, exact, ours, strict=False)), (0, ("inference", exact[0], inferred))]
    for i, (name, want, got) in compared:
        assert got.dtype == g.dtype
        assert got.shape == want.shape
        if not want.numel():
            continue
        assert got.isfinite().all(), name
        error = (got.double() - want).abs().max().item()
        rounding = torch.finfo(g.dtype).eps * want.abs().max().item()  # plain attention may be exact by luck
        draws = [(plain[i].double() - want).abs().max().item() for plain in plains]
        budget = ERROR_FACTOR * max(*draws, rounding)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


SHAPES = [  # batch, heads, d, height, width, kernel_size
    (2, 8, 8, 9, 11, 7),
    (1, 2, 3, 5, 6, 3),
    (3, 3, 1, 4, 1, 5),
    (1, 1, 12, 7, 7, 19),
    (2, 8, 16, 14, 14, 7),
    (1, 8, 32, 8, 7, 5),
    (1, 4, 64, 7, 7, 7),
    (1, 2, 8, 3, 63, 7),
    (1, 1, 8, 1, 1, 1),
    (1, 8, 8, 13, 9, 1),
    (1, 3, 16, 20, 21, 19),
    (3, 5, 8, 6, 5, 3),
    (1, 1, 8, 2, 3, 41),
    (1, 1, 8, 1, 95, 101),
    (1, 1, 8, 28, 28, 27),  # several parts of a window's keys, of which some queries have none
]


def shapes_of_builds():
    """Every shape with every position and border on one build, relative with one border on the others."""
    for build in ATTENTION_BUILDS:
        for n, shape in enumerate(SHAPES):
            every = itertools.product([False, True], repeat=2) if build == ATTENTION_BUILDS[0] else [(True, n % 2 == 0)]
            yield from ((build, shape, relative, zero_border) for relative, zero_border in every)


@pytest.mark.parametrize(
    ("isa", "shape", "relative", "zero_border"), list(shapes_of_builds()), indirect=["isa"], ids=str
)
def test_forward_and_gradients(isa, shape, relative, zero_border):
    tensors, g = inputs(*shape, relative)
    assert_matches(tensors, g, shape[-1], shape[1], zero_border)


@pytest.mark.parametrize("zero_border", [False, True], ids=["mask", "zero"])
@pytest.mark.parametrize("shape", [(2, 8, 8, 9, 11, 7), (1, 3, 12, 7, 5, 3), (2, 4, 16, 3, 2, 5)], ids=str)
def test_bfloat16(isa, shape, zero_border):
    tensors, g = inputs(*shape, True, dtype=torch.bfloat16, scale=0.5)
    assert_matches(tensors, g, shape[-1], shape[1], zero_border)


@pytest.mark.parametrize("scale", [2.5, 12.0])
def test_large_logits_do_not_overflow(isa, scale):
    tensors, g = inputs(1, 8, 8, 9, 9, 7, True, scale=scale)
    assert_matches(tensors, g, 7, 8, False)


@settings(max_examples=60, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 9),
    d=st.integers(1, 20),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    half=st.integers(0, 9),
    relative=st.booleans(),
    zero_border=st.booleans(),
    build=st.sampled_from(ATTENTION_BUILDS),
)
def test_any_shape(batch, heads, d, height, width, half, relative, zero_border, build):
    fused.load(build)
    kernel_size = 2 * half + 1
    tensors, g = inputs(batch, heads, d, height, width, kernel_size, relative)
    assert_matches(tensors, g, kernel_size, heads, zero_border)


@pytest.mark.parametrize("relative", [False, True])
def test_empty_batch(kernel, relative):
    tensors, g = inputs(0, 2, 4, 5, 6, 3, relative)
    y, *gradients = with_gradients(kernel, tensors, g, 3, 2, False)
    assert y.shape == (0, 8, 5, 6)
    assert all(not t.any() for t in gradients)


def test_nan_stays_in_its_window(isa):
    tensors, _ = inputs(2, 8, 8, 12, 12, 3, True)
    tensors[1][0, 3, 5, 5] = float("nan")
    y = torch.ops.sasa_bench.fused_local_attention(*tensors, 3, 8, False)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[0, :8, 4:7, 4:7] = True
    assert torch.equal(y.isnan(), hit)


def test_strides_do_not_matter(kernel):
    tensors, g = inputs(2, 4, 8, 9, 10, 5, True)
    want = with_gradients(kernel, tensors, g, 5, 4, False)
    packed = torch.cat(tensors[:3], dim=1)
    views = [
        [*packed.chunk(3, dim=1), *tensors[3:]],
        [t.to(memory_format=torch.channels_last) for t in tensors[:3]] + tensors[3:],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors[:3]] + tensors[3:],
        [t.flip(0).contiguous().flip(0) for t in tensors[:3]]
        + [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[3:]],
        [torch.cat([t, t], dim=3)[..., :10] for t in tensors[:3]] + tensors[3:],
    ]
    inferred = kernel(*tensors, 5, 4, False)
    for view in views:
        assert torch.equal(kernel(*view, 5, 4, False), inferred)
        leaves = [t.detach().requires_grad_() for t in view]
        y = kernel(*leaves, 5, 4, False)
        assert torch.equal(y, want[0])
        for strided in (g, g.to(memory_format=torch.channels_last), g.mT.contiguous().mT):
            got = torch.autograd.grad(y, leaves, strided, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want[1:], strict=True))
    scalar = torch.autograd.grad(kernel(*leaves, 5, 4, False).sum(), leaves)  # an expanded gradient, stride 0
    ones = with_gradients(kernel, tensors, torch.ones_like(g), 5, 4, False)
    assert all(torch.equal(a, b) for a, b in zip(scalar, ones[1:], strict=True))


@pytest.mark.parametrize("shape", [(1, 8, 8, 30, 9, 7), (2, 8, 8, 14, 14, 7), (3, 8, 4, 9, 9, 19), (1, 1, 5, 23, 3, 3)])
def test_thread_count_does_not_change_a_bit(isa, shape):
    tensors, g = inputs(*shape, True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                with_gradients(torch.ops.sasa_bench.fused_local_attention, tensors, g, shape[-1], shape[1], True)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_builds_agree():
    tensors, g = inputs(2, 4, 8, 9, 9, 5, True)
    results = []
    for build in _native.executable_isas():
        fused.load(build)
        results.append(with_gradients(torch.ops.sasa_bench.fused_local_attention, tensors, g, 5, 4, False))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", range(1, 32))
def test_any_mix_of_required_gradients(kernel, wanted):
    tensors, g = inputs(1, 2, 4, 5, 5, 3, True)
    want = with_gradients(kernel, tensors, g, 3, 2, False)[1:]
    leaves = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
    kernel(*leaves, 3, 2, False).backward(g)
    for i, (t, grad) in enumerate(zip(leaves, want, strict=True)):
        if wanted >> i & 1:
            assert torch.equal(t.grad, grad)
        else:
            assert t.grad is None


def test_no_graph_without_grad(kernel):
    tensors, _ = inputs(1, 2, 4, 5, 5, 3, True)
    assert not kernel(*tensors, 3, 2, False).requires_grad
    tensors[0].requires_grad_()
    with torch.no_grad():
        assert not kernel(*tensors, 3, 2, False).requires_grad


def test_double_backward_is_refused(kernel):
    tensors, g = inputs(1, 2, 4, 5, 5, 3, True)
    q = tensors[0].requires_grad_()
    (dq,) = torch.autograd.grad(kernel(*tensors, 3, 2, False), q, g, create_graph=True)
    with pytest.raises(NotImplementedError, match="without create_graph=True"):
        dq.sum().backward()


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 8, 9, 11, 7),
        (1, 16, 3, 30, 5, 5),
        (3, 8, 1, 5, 6, 9),
        (2, 8, 16, 7, 7, 7),
        (1, 3, 5, 4, 6, 3),
        (0, 8, 4, 3, 3, 3),
    ],
    ids=str,
)
def test_layer_is_projections_and_core(shape, border, isa):
    _, heads, d, _, _, kernel_size = shape
    case = SimpleNamespace(kernel_size=kernel_size, heads=heads, border=border)
    (x, _, _, row, col), g = inputs(*shape, True)
    weight = torch.randn(3 * heads * d, heads * d) / (heads * d) ** 0.5

    def separate(x, weight, row, col):
        q, k, v = torch.einsum("oc,bchw->bohw", weight, x).chunk(3, dim=1)
        return torch.ops.sasa_bench.fused_local_attention(q, k, v, row, col, kernel_size, heads, border == "zero")

    want = with_gradients(separate, [x, weight, row, col], g)
    for a, b in zip(with_gradients(fused.IMPL.layer(case), [x, weight, row, col], g), want, strict=True):
        # Each part is held to a derived budget above; this looks for a wrong third.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if isa != ATTENTION_BUILDS[0]:  # the graph is the same for every build
        return
    torch.compiler.reset()
    compiled = torch.compile(fused.IMPL.layer(case), fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, [x, weight, row, col], g), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("heads", [2, 8])
def test_opcheck_layer(heads):
    x, weight = torch.randn(2, 12, 5, 6), torch.randn(3 * 16, 12) / 3
    d = 16 // heads
    rel = torch.randn(heads, d // 2, 3), torch.randn(heads, d - d // 2, 3)
    layer = torch.ops.sasa_bench.fused_attention_layer
    torch.library.opcheck(layer.default, (x, weight, *rel, 3, heads, False))
    torch.library.opcheck(
        layer.default, (x.clone().requires_grad_(), weight.clone().requires_grad_(), *rel, 3, heads, False)
    )
    y, *saved = torch.ops.sasa_bench.fused_attention_layer_forward(x, weight, *rel, 3, heads, False)
    torch.testing.assert_close(layer(x, weight, *rel, 3, heads, False), y)
    torch.library.opcheck(
        torch.ops.sasa_bench.fused_attention_layer_forward.default,
        (x.clone().requires_grad_(), weight, *rel, 3, heads, False),
    )
    torch.library.opcheck(
        torch.ops.sasa_bench.fused_attention_layer_backward.default,
        (torch.randn_like(y), x, weight, *rel, *saved[:1], y, *saved[1:], 3, heads, False),
    )
    for bad in (weight[:47], weight[:, :11], weight[0]):
        with pytest.raises(ValueError, match=r"3 \* output channels, 12"):
            layer(x, bad, *rel, 3, heads, False)
    with pytest.raises(TypeError, match="convert it with"):
        layer(x, weight.double(), *rel, 3, heads, False)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf, weight, *rel, 3, heads, False).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="without create_graph=True"):
        dx.sum().backward()


@pytest.mark.parametrize("heads", [8, 16, 24])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 9), (90, 5)])
def test_layer_projected_in_parts_equals_plain_attention(isa, heads, height, width):
    x, weight = torch.randn(2, 12, height, width), torch.randn(3 * heads * 4, 12) / 3
    rel = torch.randn(heads, 2, 7), torch.randn(heads, 2, 7)
    layer = torch.ops.sasa_bench.fused_attention_layer

    def plain(x, weight, *rel):
        return plain_attention(*torch.einsum("oc,bchw->bohw", weight, x).chunk(3, 1), *rel, 7, heads, False)

    tensors, g = [x, weight, *rel], torch.randn(2, heads * 4, height, width)
    want = with_gradients(plain, [t.double() for t in tensors], g.double())
    got = with_gradients(layer, tensors, g, 7, heads, False)
    for y in (layer(*tensors, 7, heads, False), got[0]):
        torch.testing.assert_close(y.double(), want[0], rtol=1e-3, atol=1e-4)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def projected(x, weight, row, col, kernel_size, heads, zero_border):
    q, k, v = torch.einsum("oc,bchw->bohw", weight, x).chunk(3, dim=1)
    return plain_attention(q, k, v, row, col, kernel_size, heads, zero_border)


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
    plain = with_gradients(projected, tensors, g, *rest)
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
    pairs |= {"inference": (ops.fused_attention_layer(x, *parameters, *rest), exact[0]), "packed": (plainly, exact[0])}
    pairs |= {"stored": (stored, after.relu() if relu else after)}
    errors = dict(zip(pairs, plain, strict=False))
    for name, (y, want) in pairs.items():
        assert y.dtype == g.dtype, name
        assert y.shape == want.shape, name
        if y.dim() == 4:
            assert y.is_contiguous(memory_format=suggest_memory_format(x)), name
        if not want.numel():
            continue
        assert y.isfinite().all(), name
        reference, true = (errors[name], want) if name in errors else (plain[0], exact[0])
        rounding = torch.finfo(g.dtype).eps * want.abs().max().item()
        budget = ERROR_FACTOR * max((reference.double() - true).abs().max().item(), rounding)
        error = (y.double() - want).abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


LAYERS = [  # batch, input channels, heads, head width, height, width, kernel_size
    (2, 64, 8, 8, 9, 11, 7),
    (1, 20, 16, 3, 30, 5, 5),
    (3, 8, 8, 1, 5, 6, 9),
    (2, 33, 8, 4, 33, 20, 5),
    (1, 15, 3, 5, 4, 6, 3),
    (0, 32, 8, 4, 3, 3, 3),
    (2, 192, 24, 8, 28, 3, 7),
    (2, 512, 8, 64, 7, 7, 7),  # weights too large for the cache: one product for the batch
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_equals_plain_attention(products, shape, dtype, channels_last):
    tensors, g = layer_inputs(*shape, dtype)
    heads, d = shape[2:4]
    assert_layer_matches(tensors, g, shape[-1], heads, False, channels_last, torch.randn(heads * d), True)


@settings(max_examples=40, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 70))),
    heads=st.sampled_from([1, 3, 4, 8, 16]),
    d=st.integers(1, 9),
    image=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    half=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    flags=st.tuples(*[st.booleans()] * 4),
    build=st.sampled_from(_native.executable_isas()),
)
def test_any_layer(sizes, heads, d, image, half, dtype, flags, build):
    fused.load(build)
    zero_border, channels_last, biased, relu = flags
    tensors, g = layer_inputs(*sizes, heads, d, *image, 2 * half + 1, dtype)
    bias = torch.randn(heads * d) if biased else None
    assert_layer_matches(tensors, g, 2 * half + 1, heads, zero_border, channels_last, bias, relu)


def test_thread_count_does_not_change_a_bit_of_a_layer(products):
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        (x, weight, *rel), g = layer_inputs(2, 40, 8, 12, 9, 9, 5, dtype)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(
                    with_gradients(torch.ops.sasa_bench.fused_attention_layer, [x, weight, *rel], g, 5, 8, False)
                )
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", fused.HEADERS)
def test_a_build_is_named_after_every_header_that_it_includes(kind):
    included, todo = set(), [CSRC / f"{kind}.cpp"]
    while todo:
        names = re.findall(r'#include "(\w+)\.h"', todo.pop().read_text())
        todo += [CSRC / f"{name}.h" for name in set(names) - included]
        included |= set(names)
    assert included == {*fused.SHARED_HEADERS, *fused.HEADERS[kind]}


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_and_relu_are_folded_in(affine, border):
    (x, weight, *rel), _ = layer_inputs(2, 12, 8, 4, 9, 10, 5, torch.float32)
    norm = torch.nn.BatchNorm2d(32, affine=affine)
    norm(torch.randn(4, 32, 5, 5) * 3 + 1)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    norm.eval()
    case = SimpleNamespace(kernel_size=5, heads=8, border=border)
    whole = fused.pack(Window.of(case), weight, *rel, norm, True)
    want = norm(fused.IMPL.layer(case)(x, weight, *rel)).relu()
    torch.testing.assert_close(whole(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="track_running_stats"):
        fused.pack(Window.of(case), weight, *rel, torch.nn.BatchNorm2d(32, track_running_stats=False))


def test_packed_weights_are_checked(kernel):
    (x, weight, *rel), _ = layer_inputs(1, 12, 8, 4, 5, 6, 3, torch.float32)
    packed = torch.ops.sasa_bench.fused_pack_weights(weight, 8)
    layer = torch.ops.sasa_bench.fused_attention_layer_packed
    torch.library.opcheck(layer.default, (x, packed, *rel, torch.randn(32), 32, 3, 8, False, True))
    torch.library.opcheck(torch.ops.sasa_bench.fused_pack_weights.default, (weight, 8))
    for w, channels, error, message in [
        (packed[..., :31], 32, ValueError, "pack the weights again"),
        (packed, 40, ValueError, "pack the weights again"),
        (weight, 32, ValueError, "pack the weights again"),
        (packed.bfloat16(), 32, TypeError, "x's dtype"),
        (packed, 33, ValueError, "divide the channels"),
    ]:
        with pytest.raises(error, match=message):
            layer(x, w, *rel, None, channels, 3, 8, False, False)
    with pytest.raises(ValueError, match="bias must be"):
        layer(x, packed, *rel, torch.randn(31), 32, 3, 8, False, False)
    with pytest.raises(ValueError, match="multiple of heads"):
        torch.ops.sasa_bench.fused_pack_weights(weight[:-1], 8)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        torch.ops.sasa_bench.fused_pack_weights(weight.double(), 8)


def test_a_frozen_graph_packs_weights_once_and_copies_no_images(kernel):
    import torch._inductor.config
    from torch._inductor.utils import run_and_get_code

    ops = torch.ops.sasa_bench

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(96, 32) / 6)
            self.row = torch.nn.Parameter(torch.randn(8, 2, 3))
            self.col = torch.nn.Parameter(torch.randn(8, 2, 3))
            self.before = torch.nn.Conv2d(32, 32, 3, padding=1)
            self.after = torch.nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            packed = ops.fused_pack_weights(self.weight, 8)
            y = ops.fused_attention_layer_packed(
                self.before(x), packed, self.row, self.col, None, 32, 3, 8, False, True
            )
            return self.after(y)

    block, x = Block().eval(), torch.randn(2, 32, 9, 10).to(memory_format=torch.channels_last)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        y, (code, *_) = run_and_get_code(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)
    assert "fused_attention_layer_packed" in code
    assert "fused_pack_weights" not in code


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel, relative, dtype):
    tensors, g = inputs(2, 2, 4, 5, 6, 3, relative, dtype=dtype)
    torch.library.opcheck(kernel.default, (*tensors, 3, 2, False))
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(kernel.default, (*tensors, 3, 2, False))
    forward = torch.ops.sasa_bench.fused_local_attention_forward
    torch.library.opcheck(forward.default, (*tensors, 3, 2, False))
    with torch.no_grad():
        y, *saved = forward(*tensors, 3, 2, False)
        tensors = [None if t is None else t.detach() for t in tensors]
        torch.library.opcheck(
            torch.ops.sasa_bench.fused_local_attention_backward.default, (g, *tensors, y, *saved, 3, 2, False)
        )


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_saved_statistics_are_those_of_the_softmax(kernel, scale):
    tensors, _ = inputs(2, 3, 4, 5, 6, 3, False, scale=scale)
    _, top, total = torch.ops.sasa_bench.fused_local_attention_forward(*tensors, 1, 3, False)
    q, k = (t.reshape(2, 3, 4, 5, 6) for t in tensors[:2])
    torch.testing.assert_close(top, (q * k).sum(2))
    assert torch.equal(total, torch.ones_like(total))


def test_one_pixel_with_large_logits_among_small_ones(isa):
    tensors, g = inputs(1, 8, 8, 9, 14, 5, True)
    for t in tensors[:2]:
        t[0, 8:16, 4, 5] *= 100  # one head of one pixel
    assert_matches(tensors, g, 5, 8, False)


def test_compiles_without_graph_breaks():
    core = fused.IMPL.attend(SimpleNamespace(kernel_size=5, heads=4, border="mask"))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(48, 16) / 4)
            self.row = torch.nn.Parameter(torch.randn(4, 2, 5))
            self.col = torch.nn.Parameter(torch.randn(4, 2, 5))

        def forward(self, x):
            q, k, v = torch.einsum("oc,bchw->bohw", self.weight, x).chunk(3, dim=1)
            return core(q, k, v, self.row, self.col)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (8, 9):
        x = torch.randn(2, 16, size, 7)
        g = torch.randn(2, 16, size, 7)
        want = torch.autograd.grad(layer(x), list(layer.parameters()), g)
        got = torch.autograd.grad(compiled(x), list(layer.parameters()), g)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_compiles_with_the_default_backend():
    core = fused.IMPL.attend(SimpleNamespace(kernel_size=3, heads=2, border="zero"))
    tensors, _ = inputs(1, 2, 4, 6, 5, 3, True)
    compiled = torch.compile(lambda q, k, v, row, col: core(q * 2, k, v, row, col) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), core(tensors[0] * 2, *tensors[1:]) + 1)


def bad(**changes):
    names = ["q", "k", "v", "rel_row", "rel_col"]
    tensors, _ = inputs(1, 2, 4, 5, 6, 3, True)
    arguments = dict(zip(names, tensors, strict=True)) | {"kernel_size": 3, "heads": 2, "zero_border": False}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(8, 5, 6)}, ValueError, "4|dimensions"),
        ({"k": torch.randn(1, 8, 5, 7)}, ValueError, "one shape"),
        ({"v": torch.randn(2, 8, 5, 6)}, ValueError, "one shape"),
        ({"v": torch.randn(1, 8, 5, 6).double()}, TypeError, "v must have q's dtype"),
        ({"k": torch.randn(1, 8, 5, 6).bfloat16()}, TypeError, "k must have q's dtype"),
        ({"rel_row": torch.randn(2, 2, 3).bfloat16()}, TypeError, "rel_row must have q's dtype"),
        ({"rel_row": None}, ValueError, "only one"),
        ({"rel_col": None}, ValueError, "only one"),
        ({"rel_row": torch.randn(2, 2, 5)}, ValueError, r"\[2, 2, 3\]"),
        ({"rel_col": torch.randn(2, 1, 3)}, ValueError, r"\[2, 2, 3\]"),
        ({"rel_col": torch.randn(2, 2)}, ValueError, r"\[2, 2, 3\]"),
        ({"heads": 3}, ValueError, "divide the channels"),
        ({"heads": 0}, ValueError, "divide the channels"),
        ({"heads": -2}, ValueError, "divide the channels"),
        ({"kernel_size": 4}, ValueError, "odd"),
        ({"kernel_size": 0}, ValueError, "odd"),
        ({"kernel_size": -3}, ValueError, "odd"),
        ({n: torch.randn(1, 8, 5, 6).double() for n in "qkv"}, TypeError, "float32 or bfloat16"),
        ({n: torch.randn(1, 8, 0, 6) for n in "qkv"}, ValueError, "height and width"),
        ({n: torch.zeros(1, 8, 5, 6, dtype=torch.int64) for n in "qkv"}, TypeError, "float32 or bfloat16"),
        ({n: torch.randn(1, 0, 5, 6) for n in "qkv"}, ValueError, "divide the channels"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(kernel, changes, error, message, device):
    arguments = bad(**changes)
    arguments = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(error, match=message):
        kernel(**arguments)


def test_bad_backward_input(kernel):
    tensors, g = inputs(1, 2, 4, 5, 6, 3, True)
    y, *saved = torch.ops.sasa_bench.fused_local_attention_forward(*tensors, 3, 2, False)
    backward = torch.ops.sasa_bench.fused_local_attention_backward
    with pytest.raises(ValueError, match="dy must have q's shape"):
        backward(g[:, :4], *tensors, y, *saved, 3, 2, False)
    with pytest.raises(TypeError, match="y must have q's dtype"):
        backward(g, *tensors, y.bfloat16(), *saved, 3, 2, False)
    top, total = saved
    with pytest.raises(ValueError, match="top must be"):
        backward(g, *tensors, y, top[..., :3], total, 3, 2, False)
    with pytest.raises(TypeError, match="sum must be float32"):
        backward(g, *tensors, y, top, total.double(), 3, 2, False)


def test_forced_build(monkeypatch):
    for build in _native.executable_isas():
        monkeypatch.setenv("SASA_BENCH_ISA", build)
        assert _native.chosen_isa() == build
        assert fused.missing() is None
    monkeypatch.setenv("SASA_BENCH_ISA", "neon")
    with pytest.raises(ValueError, match="avx512_amx, avx512_wide, avx512_bf16, avx512, avx2, portable"):
        _native.chosen_isa()
    monkeypatch.setattr(_native, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setenv("SASA_BENCH_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"lacks; choose one of avx2, portable"):
        fused.load()
    monkeypatch.delenv("SASA_BENCH_ISA")
    assert _native.chosen_isa() == "avx2"


def test_missing_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    assert fused.missing() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in fused.missing()
    assert "apt-get install" in fused.missing()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        fused.load()
    assert not list(tmp_path.iterdir())


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from sasa_bench.impls import _native, fused
fused.load()
torch.set_num_threads(2)
ops = torch.ops.sasa_bench
tensors = [torch.randn(6, 64, 112, 112) for _ in range(3)] + [torch.randn(8, 4, 7), torch.randn(8, 4, 7)]
small = [t[:1, :, :8, :8] for t in tensors[:3]] + tensors[3:]
rest = (7, 8, False)
y, *saved = ops.fused_local_attention_forward(*small, *rest)
ops.fused_local_attention_backward(y, *small, y, *saved, *rest)
def status(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) * 1024
def high_water(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = function()
    return kept, status("VmHWM") - before
size = sum(t.nbytes for t in tensors[:3])
(y, *saved), peak = high_water(lambda: ops.fused_local_attention_forward(*tensors, *rest))
print((peak - y.nbytes) / size)
g = torch.randn_like(y)
grads, peak = high_water(lambda: ops.fused_local_attention_backward(g, *tensors, y, *saved, *rest))
print((peak - sum(t.nbytes for t in grads)) / size)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to reset VmHWM")
def test_memory_stays_under_a_quarter_of_qkv(kernel):
    script = PEAK.format(root=str(Path(fused.__file__).parents[2]))
    # Freed tensors go back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    shares = [float(line) for line in run.stdout.split()]
    assert len(shares) == 2
    assert max(shares) < 0.25, shares


SHIMS = {"shim_amx": ["-DSASA_SHIM", "-DSASA_SHIM_TILES"], "shim_bf16": ["-DSASA_SHIM"]}
"""Products on tiles and in pairs whose instructions are plain C++, for machines that have none."""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the sanitized kernel with")
@pytest.mark.parametrize("build", [*SHIMS, *PRODUCT_BUILDS])
def test_products_are_right_and_clean_under_sanitizers(tmp_path, build):
    program = tmp_path / "products"
    command = ["g++", "-std=c++20", "-O1", "-g1", "-Wno-psabi", "-Wno-ignored-attributes"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSASA_SANITIZE", f"-DSASA_ISA={build}"]
    command += SHIMS.get(build) or _native.ISAS[build][0]
    command += [f"-I{CSRC}", str(Path(__file__).parent / "sanitize_products.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok" in run.stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the sanitized kernel with")
@pytest.mark.parametrize("build", ATTENTION_BUILDS)
def test_kernels_are_clean_under_sanitizers(tmp_path, build):
    program = tmp_path / "sanitized"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O0",
            "-g1",
            "-Wno-psabi",
            "-Wno-ignored-attributes",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-DSASA_SANITIZE",
            f"-DSASA_ISA={build}",
            *_native.ISAS[build][0],
            f"-I{CSRC}",
            str(Path(__file__).parent / "sanitize_fused.cpp"),
            "-o",
            str(program),
        ],
        check=True,
        timeout=300,
    )
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok" in run.stdout


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("program", ["sanitize_fused", "sanitize_products"])
def test_kernels_are_right_on_aarch64(tmp_path, program):
    built = tmp_path / program
    command = [
        "aarch64-linux-gnu-g++",
        "-static",
        "-std=c++20",
        "-O1",
        "-Wno-psabi",
        "-DSASA_SANITIZE",
        "-DSASA_ISA=portable",
    ]
    command += [f"-I{CSRC}", str(Path(__file__).parent / f"{program}.cpp"), "-o", str(built)]
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run(["qemu-aarch64", built, "5"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok" in run.stdout
