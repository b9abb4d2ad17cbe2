"""The fused core against a plain float64 reference: every build, border, position, shape and gradient."""

import itertools

import pytest
import torch
from fused_builds import ATTENTION_BUILDS
from fused_reference import assert_matches, inputs, with_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasa_bench.impls import _native, fused

pytestmark = pytest.mark.usefixtures("builds")

SHAPES = [  # batch, heads, d, height, width, kernel_size
    (2, 8, 8, 9, 11, 7),
    (1, 2, 3, 5, 6, 3),
    (2, 8, 4, 9, 6, 5),
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(isa, shape, zero_border, dtype):
    tensors, g = inputs(*shape, True, dtype=dtype, scale=0.5)
    assert_matches(tensors, g, shape[-1], shape[1], zero_border)


@pytest.mark.parametrize("scale", [2.5, 12.0])
def test_large_logits_do_not_overflow(isa, scale):
    tensors, g = inputs(1, 8, 8, 9, 9, 7, True, scale=scale)
    assert_matches(tensors, g, 7, 8, False)


def test_keys_outside_the_image_count_however_large_their_logits(isa):
    """They are the relative ones alone: 100 above the image, 0 inside."""
    q, k, v = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 1, 4)
    q[:, 0] = 100
    rel_row = torch.tensor([[[1.0, 0.0, 0.0]]])
    y = torch.ops.sasa_bench.fused_local_attention(q, k, v, rel_row, torch.zeros(1, 1, 3), 3, 1, True)
    assert y.abs().max() < 1e-30


@settings(max_examples=60, derandomize=False, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("build", _native.executable_isas())
def test_every_build_that_runs_here_is_within_the_budget(build):
    tensors, g = inputs(2, 4, 8, 9, 9, 5, True)
    fused.load(build)
    assert_matches(tensors, g, 5, 4, False)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_saved_statistics_are_those_of_the_softmax(kernel, scale):
    tensors, _ = inputs(2, 3, 4, 5, 6, 3, False, scale=scale)
    _, top, total = torch.ops.sasa_bench.fused_local_attention_forward(*tensors, 1, 3, False)
    products = torch.mul(*(t.reshape(2, 3, 4, 5, 6).double() for t in tensors[:2]))
    rounding = 4 * torch.finfo(torch.float32).eps * products.abs().sum(2)  # of four products and their sum
    assert ((top - products.sum(2)).abs() <= rounding).all()
    assert torch.equal(total, torch.ones_like(total))


def test_one_pixel_with_large_logits_among_small_ones(isa):
    tensors, g = inputs(1, 8, 8, 9, 14, 5, True)
    for t in tensors[:2]:
        t[0, 8:16, 4, 5] *= 100  # one head of one pixel
    assert_matches(tensors, g, 5, 8, False)
