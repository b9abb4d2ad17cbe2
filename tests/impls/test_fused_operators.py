"""The torch operators of the fused kernel: graphs, gradients on demand, what they refuse."""

from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from fused_reference import inputs, with_gradients

from sasa_bench import LocalAttention2d
from sasa_bench.impls import fused

pytestmark = pytest.mark.usefixtures("builds")


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


def whole_layer(q, *rest):
    """The layer's operator with weights that make it q, k and v alike."""
    weight = torch.eye(q.shape[1]).repeat(3, 1)
    return torch.ops.sasa_bench.fused_attention_layer(q, weight, *rest)


def attention_alone(q, *rest):
    return torch.ops.sasa_bench.fused_local_attention(q, q * 0.5, q, *rest)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("function", [whole_layer, attention_alone])
@pytest.mark.parametrize("heads", [2, 16])
def test_what_follows_may_write_to_the_output(function, heads):
    (x, _, _, row, col), _ = inputs(2, heads, 4, 5, 6, 3, True)

    def gradients(follow, wrapped=lambda f, *a: f(*a), passes=1):
        leaves = [t.clone().requires_grad_() for t in (x, row, col)]
        y = wrapped(lambda *a: follow(function(*a, 3, heads, False)), *leaves)
        for left in reversed(range(passes)):
            y.square().sum().backward(retain_graph=left > 0)
        return [t.grad / passes for t in leaves]

    expected = gradients(lambda y: torch.relu(y) * 2)
    assert [t.abs().max() > 0 for t in expected] == [True] * 3

    def in_parts(y):
        y[:, :1].mul_(2)
        y[:, 1:].mul_(2)
        return torch.relu(y)

    def checkpointed(f, *a):
        return torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)

    def on_the_host(f, *a):
        with torch.autograd.graph.save_on_cpu():
            return f(*a)

    def in_place(y):
        return y.mul_(2).relu_()

    for found in (
        gradients(in_place),
        gradients(in_parts),
        gradients(in_place, passes=2),
        gradients(in_place, checkpointed),
        gradients(in_place, on_the_host),
        gradients(lambda y: torch.relu(y) * 2, checkpointed),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("kernel")
def test_an_output_that_is_not_written_to_is_neither_copied_nor_computed_again():
    layer = LocalAttention2d(16, kernel_size=3, heads=8, impl="fused")
    x = torch.randn(1, 16, 5, 6)

    def operators(follow):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            follow(layer(x)).sum().backward()
        names = [event.name for event in profile.events()]
        return names.count("aten::clone"), names.count("sasa_bench::fused_attention_layer_forward")

    layer(x).sum().backward()
    assert operators(torch.relu) == (0, 1)
    assert operators(torch.relu_) == (0, 2)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
        ({n: torch.randn(1, 8, 5, 6).double() for n in "qkv"}, TypeError, "float32, bfloat16 or float16"),
        ({n: torch.randn(1, 8, 0, 6) for n in "qkv"}, ValueError, "height and width"),
        ({n: torch.zeros(1, 8, 5, 6, dtype=torch.int64) for n in "qkv"}, TypeError, "float32, bfloat16 or float16"),
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
