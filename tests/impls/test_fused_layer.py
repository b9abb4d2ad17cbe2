"""The fused layer: projections, weights packed ahead, and what is folded in, against a plain float64 reference."""

from types import SimpleNamespace

import pytest
import torch
from fused_builds import ATTENTION_BUILDS
from fused_reference import assert_layer_matches, inputs, layer_inputs, plain_attention, with_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasa_bench.impls import Window, _native, fused

pytestmark = pytest.mark.usefixtures("builds")


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


@pytest.mark.parametrize("heads", [8, 16, 24])
@pytest.mark.parametrize(("height", "width"), [(23, 40), (30, 9), (90, 5)])
def test_layer_projected_in_parts_equals_plain_attention(heads, height, width):
    x, weight = torch.randn(2, 12, height, width), torch.randn(3 * heads * 4, 12) / 3
    rel = torch.randn(heads, 2, 7), torch.randn(heads, 2, 7)
    layer = torch.ops.sasa_bench.fused_attention_layer

    def plain(x, weight, *rel):
        return plain_attention(*torch.einsum("oc,bchw->bohw", weight, x).chunk(3, 1), *rel, 7, heads, False)

    tensors, g = [x, weight, *rel], torch.randn(2, heads * 4, height, width)
    want = with_gradients(plain, [t.double() for t in tensors], g.double())
    for build in ATTENTION_BUILDS:
        fused.load(build)
        got = with_gradients(layer, tensors, g, 7, heads, False)
        for y in (layer(*tensors, 7, heads, False), got[0]):
            torch.testing.assert_close(y.double(), want[0], rtol=1e-3, atol=1e-4)
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


LAYERS = [  # batch, input channels, heads, head width, height, width, kernel_size
    (2, 64, 8, 8, 9, 11, 7),
    (1, 20, 16, 3, 30, 5, 5),
    (3, 8, 8, 1, 5, 6, 9),
    (2, 33, 8, 4, 33, 5, 5),
    (1, 33, 8, 4, 5, 20, 5),
    (1, 15, 3, 5, 4, 6, 3),
    (0, 32, 8, 4, 3, 3, 3),
    (2, 192, 24, 8, 28, 3, 7),
    (2, 512, 8, 64, 7, 7, 7),  # weights too large for the cache: one product for the batch
    (1, 48, 8, 24, 6, 7, 5),  # multiples of 8 that share a kernel
    (2, 40, 8, 40, 5, 9, 3),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_equals_plain_attention(products, shape, dtype, channels_last):
    tensors, g = layer_inputs(*shape, dtype)
    heads, d = shape[2:4]
    assert_layer_matches(tensors, g, shape[-1], heads, False, channels_last, torch.randn(heads * d), True)


@settings(max_examples=40, derandomize=False, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 70))),
    heads=st.sampled_from([1, 3, 4, 8, 16]),
    d=st.integers(1, 9),
    image=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    half=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
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
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
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
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        torch.ops.sasa_bench.fused_pack_weights(weight.double(), 8)


@pytest.mark.parametrize("heads", [4, 8])
def test_operators_keep_the_dtype_of_their_tensors_under_autocast(heads, kernel):
    """Where heads do not fill the lanes the product is torch's own, which autocast would make bfloat16."""
    (x, weight, *rel), _ = layer_inputs(1, 12, heads, 3, 5, 6, 3, torch.float32)
    ops = torch.ops.sasa_bench
    packed = ops.fused_pack_weights(weight, heads)
    channels = weight.shape[0] // 3
    expected = ops.fused_attention_layer_packed(x, packed, *rel, None, channels, 3, heads, False, False)
    y, *saved = ops.fused_attention_layer_forward(x, weight, *rel, 3, heads, False)
    gradients = ops.fused_attention_layer_backward(
        torch.ones_like(y), x, weight, *rel, saved[0], y, *saved[1:], 3, heads, False
    )
    with torch.autocast("cpu"):
        found = ops.fused_attention_layer_packed(x, packed, *rel, None, channels, 3, heads, False, False)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(ops.fused_attention_layer_forward(x, weight, *rel, 3, heads, False)[0], y)
        again = ops.fused_attention_layer_backward(
            torch.ones_like(y), x, weight, *rel, saved[0], y, *saved[1:], 3, heads, False
        )
    for one, other in zip(gradients, again, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_layer_of_no_channels_and_saved_tensors_of_another_dtype_are_refused(kernel):
    ops = torch.ops.sasa_bench
    with pytest.raises(ValueError, match="a channel or more"):
        ops.fused_attention_layer(torch.randn(1, 0, 4, 4), torch.randn(24, 0), None, None, 3, 8, False)
    (x, weight, *rel), _ = layer_inputs(1, 12, 8, 4, 5, 6, 3, torch.bfloat16)
    y, qkv, *saved = ops.fused_attention_layer_forward(x, weight, *rel, 3, 8, False)
    rel32 = [t.float() for t in rel]
    with pytest.raises(TypeError, match="y must have x's dtype"):
        ops.fused_attention_layer_backward(y.float(), x, weight, *rel32, qkv, y.float(), *saved, 3, 8, False)
