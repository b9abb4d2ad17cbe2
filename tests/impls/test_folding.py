"""A batch norm and a relu behind the fused layer become part of it when Inductor freezes the graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from sasa_bench import LocalAttention2d, impls
from sasa_bench.impls import _folding, fused

pytestmark = pytest.mark.skipif(impls.get("fused").missing() is not None, reason="nothing to build the kernel with")

aten = torch.ops.aten


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for t, spread in ((norm.weight, 1.0), (norm.bias, 0.5), (norm.running_mean, 0.5)):
        nn.init.normal_(t, std=spread)  # type: ignore[arg-type]
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def attention(channels: int = 16, heads: int = 8) -> LocalAttention2d:
    return LocalAttention2d(channels, kernel_size=3, heads=heads, impl="fused").eval()


def frozen(model: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """What a compiled and frozen model computes, and the names of the operators of its frozen graph."""
    from torch._inductor import config
    from torch._inductor.fx_passes import freezing_patterns

    found: list[str] = []
    passes = freezing_patterns.freezing_passes

    def record(graph: fx.GraphModule, inputs: object) -> None:
        passes(graph, inputs)
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")

    with pytest.MonkeyPatch.context() as patch, config.patch(freezing=True), torch.no_grad():
        patch.setattr("torch._inductor.freezing.freezing_passes", record)
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True)(x), found


@pytest.mark.slow
@pytest.mark.parametrize("heads", [8, 2], ids=["whole vectors", "part of a vector"])
def test_a_frozen_graph_has_one_operator_for_attention_norm_and_relu(heads: int) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), attention(16, heads), random_norm(16), nn.ReLU()),
        *(attention(16, heads), nn.AvgPool2d(2, ceil_mode=True), random_norm(16), nn.ReLU(), attention(16, heads)),
    )
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        expected = model.eval()(x)
    y, operators = frozen(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert [n for n in operators if "sasa_bench" in n] == ["sasa_bench.fused_attention_layer_packed.default"] * 3
    assert not [n for n in operators if n.startswith(("aten.mul", "aten.sub", "aten.add"))]
    assert [n for n in operators if n.startswith("aten.relu")] == ["aten.relu.default"]  # the one behind the pool


@pytest.mark.slow
def test_a_frozen_bfloat16_graph_folds_the_norm_too() -> None:
    model = nn.Sequential(attention(), random_norm(16), nn.ReLU()).bfloat16()
    x = torch.randn(2, 16, 9, 7, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.float()(x.float())
    y, operators = frozen(model.bfloat16(), x)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
    assert [n for n in operators if not n.startswith("sasa_bench")] == []


def traced(follow: object, channels: int = 16) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of an attention layer whose parameters are constants, then `follow`; and the layer's node."""
    fused.load()
    layer = attention(channels)
    module = nn.Module()
    for name, t in (("w", layer.w_qkv), ("row", layer.rel_row), ("column", layer.rel_col)):
        module.register_buffer(name, t.detach())
    module.register_buffer("by", torch.randn(channels, 1, 1))
    module.register_buffer("map", torch.randn(channels, 1, 5))
    graph = fx.Graph()
    x = graph.placeholder("x")
    w, row, column, by, each = (graph.get_attr(name) for name in ("w", "row", "column", "by", "map"))
    y = graph.call_function(torch.ops.sasa_bench.fused_attention_layer.default, (x, w, row, column, 3, 8, False))
    y.meta["val"] = torch.empty(1, channels, 5, 5)
    follow(graph, y, by, each)  # type: ignore[operator]
    for node in graph.nodes:
        node.meta.setdefault("val", torch.empty(1, channels, 5, 5))
    return fx.GraphModule(module, graph), y


class Found:
    """A match as the pattern matcher hands it over."""

    def __init__(self, node: fx.Node) -> None:
        self.output_node = lambda: node


def folded(follow: object) -> fx.GraphModule:
    """The graph of `traced` after folding, which gives what it gave before."""
    module, node = traced(follow)
    x = torch.randn(1, 16, 5, 5)
    expected = module(x)
    _folding._fold(Found(node))
    module.recompile()
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    return module


@pytest.mark.parametrize(
    "target", [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor], ids=operator.attrgetter("__name__")
)
@pytest.mark.parametrize("second", [False, True], ids=["first operand", "second operand"])
def test_sums_and_products_with_a_number_a_channel_are_folded(target: torch._ops.OpOverload, second: bool) -> None:
    def follow(graph: fx.Graph, y: fx.Node, by: fx.Node, each: fx.Node) -> None:
        graph.output(graph.call_function(target, (by, y) if second else (y, by)))

    module = folded(follow)
    assert any(n.target is target for n in module.graph.nodes) == (second and target is aten.div.Tensor)


def test_what_is_no_number_a_channel_or_is_needed_elsewhere_stays_behind_the_layer() -> None:
    def follow(graph: fx.Graph, y: fx.Node, by: fx.Node, each: fx.Node) -> None:
        scaled = graph.call_function(aten.mul.Tensor, (y, by))
        shifted = graph.call_function(aten.add.Tensor, (scaled, each))
        graph.output((scaled, graph.call_function(aten.relu.default, (shifted,))))

    module = folded(follow)
    stays = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert stays == [torch.ops.sasa_bench.fused_attention_layer_packed.default, aten.add.Tensor, aten.relu.default]


def test_a_pool_with_padding_is_not_passed() -> None:
    def follow(graph: fx.Graph, y: fx.Node, by: fx.Node, each: fx.Node) -> None:
        pooled = graph.call_function(aten.avg_pool2d.default, (y, [3, 3], [1, 1], [1, 1]))
        graph.output(graph.call_function(aten.add.Tensor, (pooled, by)))

    module = folded(follow)
    assert any(n.target is aten.add.Tensor for n in module.graph.nodes)
