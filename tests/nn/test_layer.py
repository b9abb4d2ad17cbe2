"""LocalAttention2d and network(): the layer for other people's models."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from torch.autograd import forward_ad

from sasa_bench import LocalAttention2d, impls, network, ops
from sasa_bench.case import Case
from sasa_bench.nn.choice import constant_in_traces

LOCAL_ATTENTION = ops.get("local_attention")

LOCAL = [name for name in impls.names() if impls.get(name).attend is not None and impls.get(name).missing() is None]


def test_the_layer_is_the_op_of_that_name() -> None:
    heads, window = random.choice([1, 2, 4]), random.choice([1, 3, 7])
    height, width = random.randrange(1, 12), random.randrange(1, 12)
    of = Case(kernel_size=window, channels=16, heads=heads, resolution=f"{height}x{width}", batch=3)
    for name in LOCAL:
        layer = LocalAttention2d(16, kernel_size=window, heads=heads, impl=name)
        x = torch.randn(3, 16, height, width)
        with torch.no_grad():
            tensors = {"x": x} | dict(layer.named_parameters())
            expected = LOCAL_ATTENTION.reference(of, {n: t.double() for n, t in tensors.items()})
            torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)


def test_maps_of_any_size_go_through_one_layer() -> None:
    layer = LocalAttention2d(8, kernel_size=5, heads=2, position="absolute")
    for shape in ((1, 8, 1, 1), (2, 8, 3, 9), (4, 8, 12, 2)):
        assert layer(torch.randn(shape)).shape == shape


def test_the_output_can_have_other_channels_than_the_input() -> None:
    layer = LocalAttention2d(12, 16, 3, heads=4)
    assert layer(torch.randn(2, 12, 5, 6)).shape == (2, 16, 5, 6)


def test_relative_only_is_attention_with_keys_of_zero() -> None:
    alone, full = (LocalAttention2d(16, kernel_size=5, heads=4, position=p) for p in ("relative_only", "relative"))
    q, v = alone.w_qkv.detach().chunk(2)
    full.load_state_dict(alone.state_dict() | {"w_qkv": torch.cat([q, torch.zeros_like(q), v])})
    x = torch.randn(1, 16, 7, 6)
    torch.testing.assert_close(alone(x), full(x))


@pytest.mark.parametrize("position", ["none", "absolute", "relative", "relative_only"])
def test_every_parameter_gets_a_gradient(position: str) -> None:
    layer = LocalAttention2d(8, kernel_size=3, heads=2, position=position)
    layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_parameters_do_not_depend_on_the_implementation_and_it_may_change() -> None:
    first = LocalAttention2d(8, kernel_size=3, heads=2, impl=LOCAL[0])
    x = torch.randn(1, 8, 6, 6)
    y = first(x)
    for name in LOCAL[1:]:
        other = LocalAttention2d(8, kernel_size=3, heads=2, impl=name)
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close(other(x), y, atol=1e-5, rtol=1e-4)
        first.impl = name
        torch.testing.assert_close(first(x), y, atol=1e-5, rtol=1e-4)


def test_a_layer_survives_copying_and_pickling() -> None:
    layer = LocalAttention2d(8, kernel_size=3, heads=2)
    x = torch.randn(1, 8, 4, 4)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x), layer(x))


def test_absolute_positions_tell_pixels_apart() -> None:
    layer = LocalAttention2d(8, kernel_size=3, heads=2, position="absolute")
    y = layer(torch.ones(1, 8, 6, 6))
    assert (y[..., 2, 2] - y[..., 3, 4]).abs().max() > 1e-4


def test_the_repr_says_what_was_asked_for() -> None:
    said = repr(LocalAttention2d(16, kernel_size=5, heads=4, impl=LOCAL[0], out_channels=8))
    assert said == (
        f"LocalAttention2d(16, kernel_size=5, heads=4, position='relative', border='mask', impl='{LOCAL[0]}', "
        "out_channels=8)"
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"kernel_size": 4}, "give an odd number such as 3 or 5"),
        ({"heads": 3}, "give a number of heads that divides it"),
        ({"position": "rotary"}, "none, absolute, relative"),
        ({"border": "wrap"}, "mask, zero"),
        ({"out_channels": 7}, "out_channels = 7 do not split into heads = 8: give a multiple of 8"),
        ({"impl": "conv3x3"}, "computes no local attention inside a model"),
        ({"impl": "nothing"}, "unknown implementation 'nothing'"),
        ({"channels": 0, "out_channels": 8}, "1 or more"),
        ({"scale": "x"}, "scale = 'x': give a finite number"),
        ({"scale": float("nan")}, "give a finite number"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments: dict[str, object], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        LocalAttention2d(**{"channels": 16} | arguments)  # type: ignore[arg-type]


def test_an_input_of_another_shape_or_dtype_is_refused() -> None:
    layer = LocalAttention2d(8)
    with pytest.raises(ValueError, match=r"give \[batch, 8, height, width\]"):
        layer(torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"give \[batch, 8, height, width\]"):
        layer(torch.randn(8, 5, 5))
    with pytest.raises(ValueError, match="float32, bfloat16, float16, float64"):
        layer(torch.ones(1, 8, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"module.to\(x.dtype\)"):
        layer(torch.randn(1, 8, 5, 5, dtype=torch.bfloat16))


def compiled(layer: LocalAttention2d, x: torch.Tensor) -> torch.Tensor:
    return torch.compile(layer, backend="eager", fullgraph=True)(x)


def exported(layer: LocalAttention2d, x: torch.Tensor) -> torch.Tensor:
    return torch.export.export(layer, (x,)).module()(x)


@pytest.mark.skipif(impls.get("fused").missing() is not None, reason="nothing to build the kernel with")
@pytest.mark.parametrize("traced", [compiled, exported], ids=["compile", "export"])
@pytest.mark.parametrize("position", ["none", "relative"])
def test_what_an_implementation_refuses_it_refuses_in_a_trace_too(traced, position: str) -> None:  # type: ignore[no-untyped-def]
    layer = LocalAttention2d(8, kernel_size=(3, 7), heads=2, position=position, impl="fused")
    x = torch.randn(1, 8, 6, 9)
    with pytest.raises(RuntimeError, match="the fused kernel has square windows, not 3 x 7"):
        layer(x)
    with pytest.raises(Exception, match="the fused kernel has square windows, not 3 x 7"):
        traced(layer, x)
    layer.impl = "auto"
    torch.testing.assert_close(traced(layer, x), layer(x))


@pytest.mark.parametrize("name", [name for name in LOCAL if name != "sdpa_dense"])
@pytest.mark.parametrize(("shape", "column"), [((6, 7), 5), ((18, 20), 4)])
def test_a_product_that_overflows_outside_of_a_window_changes_nothing_in_it(
    name: str, shape: tuple[int, int], column: int
) -> None:
    """Inf less Inf is NaN, so a mask of -inf must not be added to a logit. torch's own dense attention adds its."""
    layer = LocalAttention2d(2, kernel_size=3, heads=1, position="none", impl=name)
    w_qkv = torch.zeros(6, 2)
    w_qkv[0, 0] = w_qkv[2, 1] = w_qkv[4, 0] = w_qkv[5, 1] = 1.0  # q = x_0, k = x_1, v = x
    layer.load_state_dict({"w_qkv": w_qkv})
    x = torch.randn(1, 2, *shape)
    x[0, :, 0, 0] = torch.tensor([1e20, 0.0])
    x[0, :, 0, column] = torch.tensor([0.0, 1e20])
    with torch.no_grad():
        y = layer(x)
        layer.impl = "naive"
        expected = layer(x)
    assert expected[0, :, 0, 0].isfinite().all()
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_a_dual_bias_chooses_what_has_its_derivative() -> None:
    layer = LocalAttention2d(8, kernel_size=3, heads=2, bias=True)
    x, tangent = torch.randn(2, 8, 5, 5), torch.randn(24)
    found = []
    for name in ("auto", "naive"):
        layer.impl = name
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(layer.b_qkv.detach(), tangent)
            found.append(forward_ad.unpack_dual(torch.func.functional_call(layer, {"b_qkv": dual}, x)).tangent)
    torch.testing.assert_close(*found)


def test_a_network_loads_the_state_of_one_with_another_implementation() -> None:
    one = network("resnet26", attention_groups="4", impl=LOCAL[0]).eval()
    other = network("resnet26", attention_groups="4", impl=LOCAL[-1]).eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        y = one(x)
        assert y.shape == (1, 1000)
        torch.testing.assert_close(other(x), y, atol=1e-3 * y.abs().max().item(), rtol=1e-3)


def test_a_detector_scores_six_anchors_a_pixel_of_five_levels() -> None:
    model = network("retinanet26", "aware_values", "4+heads", 3).eval()
    with torch.no_grad():
        y = model(torch.randn(1, 3, 64, 96))
    assert y.shape == (1, 6 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1), 95)


def test_a_function_that_is_constant_in_traces_is_marked_as_torch_marks_it() -> None:
    ours, theirs = constant_in_traces(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}
