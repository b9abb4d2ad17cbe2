"""The native operators of ONNX Runtime: right at any size, weights constant or not, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fused_reference import plain_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasa_bench.impls import onnx_fused

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(onnx_fused.missing() is not None, reason=str(onnx_fused.missing()))


def run(
    operator: str,
    inputs: dict[str, Tensor],
    constants: set[str],
    kernel_size: int,
    heads: int,
    zero_border: bool = False,
) -> Tensor:
    """The output of one node, some of its inputs constants of the graph."""
    floats = onnx.TensorProto.FLOAT
    attributes = {"kernel_size": kernel_size, "heads": heads, "zero_border": int(zero_border)}
    node = onnx.helper.make_node(operator, list(inputs), ["y"], domain="sasa_bench", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(n, floats, t.shape) for n, t in inputs.items() if n not in constants],
        [onnx.helper.make_tensor_value_info("y", floats, None)],
        [onnx.numpy_helper.from_array(inputs[n].numpy(), n) for n in constants],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("sasa_bench", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(onnx_fused.library())
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {name: t.numpy() for name, t in inputs.items() if name not in constants}
    first, second = (session.run(None, given)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    return torch.from_numpy(first)


def layer_inputs(
    batch: int, inputs: int, heads: int, d: int, height: int, width: int, kernel_size: int, relative: bool = True
) -> dict[str, Tensor]:
    scale = d**-0.25
    found = {
        "x": torch.randn(batch, inputs, height, width),
        "w_qkv": torch.randn(3 * heads * d, inputs) * scale * inputs**-0.5,
    }
    if relative:
        found["rel_row"] = torch.randn(heads, d // 2, kernel_size) * scale
        found["rel_col"] = torch.randn(heads, d - d // 2, kernel_size) * scale
    return found


def assert_layer_is_right(
    tensors: dict[str, Tensor], kernel_size: int, heads: int, zero_border: bool, constants: set[str]
) -> None:
    y = run("LocalAttentionLayer", tensors, constants, kernel_size, heads, zero_border)
    exact = {name: t.double() for name, t in tensors.items()}
    q, k, v = torch.einsum("oc,bchw->bohw", exact["w_qkv"], exact["x"]).chunk(3, 1)
    rel = exact.get("rel_row"), exact.get("rel_col")
    want = plain_attention(q, k, v, *rel, kernel_size, heads, zero_border)
    assert y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=2e-5)


CONSTANTS = [set(), {"w_qkv"}, {"w_qkv", "rel_row", "rel_col"}]


@pytest.mark.parametrize("constants", CONSTANTS, ids=["inputs", "constant weights", "constant parameters"])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 64, 8, 8, 9, 11, 7),
        (1, 20, 16, 3, 30, 5, 5),
        (3, 7, 3, 5, 6, 4, 3),  # heads that fill no vector
        (1, 16, 8, 4, 60, 9, 3),  # rows for several tasks
        (2, 512, 8, 64, 7, 7, 7),  # weights too large for the cache: one product for the batch
        (1, 300, 5, 60, 3, 3, 3),
    ],
    ids=str,
)
def test_the_layer_is_right(sizes: tuple[int, ...], constants: set[str]) -> None:
    _, _, heads, _, _, _, kernel_size = sizes
    assert_layer_is_right(layer_inputs(*sizes), kernel_size, heads, False, constants)


@settings(max_examples=25, derandomize=False, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3),
    inputs=st.integers(1, 40),
    heads=st.sampled_from([1, 3, 8, 16]),
    d=st.integers(1, 9),
    image=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    half=st.integers(0, 4),
    relative=st.booleans(),
    zero_border=st.booleans(),
    constant=st.booleans(),
)
def test_any_layer_is_right(
    batch: int,
    inputs: int,
    heads: int,
    d: int,
    image: tuple[int, int],
    half: int,
    relative: bool,
    zero_border: bool,
    constant: bool,
) -> None:
    relative = relative and d > 1  # ONNX Runtime takes no empty constant
    tensors = layer_inputs(batch, inputs, heads, d, *image, 2 * half + 1, relative)
    assert_layer_is_right(tensors, 2 * half + 1, heads, zero_border, {"w_qkv"} if constant else set())


def test_what_does_not_fit_is_refused_in_words() -> None:
    tensors = layer_inputs(1, 6, 2, 4, 5, 5, 3)
    for changes, heads, kernel_size, message in [
        ({}, 2, 4, "kernel_size must be odd"),
        ({}, 0, 3, "heads must be at least 1"),
        ({"w_qkv": torch.randn(23, 6)}, 2, 3, "channels a multiple of heads"),
        ({"x": torch.randn(1, 5, 5, 5)}, 2, 3, r"x must be \[B, 6, H, W\]"),
        ({"rel_row": torch.randn(2, 2, 5)}, 2, 3, "rel_row must be"),
    ]:
        with pytest.raises(Exception, match=f"LocalAttentionLayer: .*{message}"):
            run("LocalAttentionLayer", tensors | changes, set(), kernel_size, heads)
    q, k, v = (torch.randn(1, 8, 5, width) for width in (5, 5, 4))
    with pytest.raises(Exception, match="LocalAttention: q, k and v must have one shape"):
        run("LocalAttention", {"q": q, "k": k, "v": v}, set(), 3, 2)


def test_one_embedding_alone_is_refused() -> None:
    q, k, v = (torch.randn(1, 8, 5, 6) for _ in range(3))
    with pytest.raises(Exception, match="give both of rel_row and rel_col, or neither"):
        run("LocalAttention", {"q": q, "k": k, "v": v, "rel_row": torch.randn(2, 2, 3)}, set(), 3, 2)
