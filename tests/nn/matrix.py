"""What every implementation does inside a model: each cell runs one use and compares it with a float64 reference.

`python tests/nn/matrix.py` prints the table of docs/layer.md.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sasa_bench import LocalAttention2d, impls, ops
from sasa_bench.case import Case
from sasa_bench.networks.core import Core

CHANNELS, HEADS, WINDOW = 8, 2, 3
SHAPE = (2, CHANNELS, 6, 7)
OTHER_SHAPES = ((1, CHANNELS, 9, 5), (3, CHANNELS, 5, 12))
FACTOR = 8.0
"""How many times the error of the reference in the same dtype a result may be off."""


def names() -> list[str]:
    """ "auto" and every implementation that models can run on this machine's CPU."""

    def runs(impl: impls.Impl) -> bool:
        return impl.attend is not None and impl.supports(Case(scope="core")) is None and impl.missing() is None

    return ["auto", *(name for name in impls.names() if runs(impls.get(name)))]


@cache
def state() -> dict[str, Tensor]:
    """The parameters of every layer here: fresh in each process."""
    return LocalAttention2d(CHANNELS, kernel_size=WINDOW, heads=HEADS).state_dict()


def make(name: str) -> LocalAttention2d:
    layer = LocalAttention2d(CHANNELS, kernel_size=WINDOW, heads=HEADS, impl=name)
    layer.load_state_dict(state())
    return layer


def reference(x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """y, and the gradients of x and w_qkv for a gradient of ones, computed by the op's reference in `dtype`."""
    batch, _, height, width = x.shape
    case = Case(channels=CHANNELS, heads=HEADS, kernel_size=WINDOW, batch=max(batch, 1), resolution=f"{height}x{width}")
    tensors = {n: t.detach().to(dtype).requires_grad_() for n, t in ({"x": x} | state()).items()}
    y = ops.get("local_attention").reference(case, tensors)
    gradients = torch.autograd.grad(y, [tensors["x"], tensors["w_qkv"]], torch.ones_like(y))
    return (y.detach(), *gradients)


def assert_right(found: tuple[Tensor, ...], x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Each result is as near to float64 as 8 times the reference in `dtype`."""
    for got, exact, plain in zip(found, reference(x), reference(x, dtype), strict=False):
        budget = FACTOR * max((plain.double() - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max())
        error = (got.detach().double() - exact).abs().max()
        assert error <= budget, f"off by {error:.2e} where {budget:.2e} is allowed"


def trained(layer: nn.Module, x: Tensor, weight: nn.Parameter) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return y, x.grad, weight.grad


def eager(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    assert_right(trained(layer, x, layer.w_qkv), x)


def autocast(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained(layer, x, layer.w_qkv)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert_right(found, x, torch.bfloat16)


def float64(name: str) -> None:
    layer, x = make(name).double(), torch.randn(SHAPE)
    torch.testing.assert_close(layer(x.double()), reference(x)[0])


def in_place_successor(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    twin = make(name)
    found = trained(nn.Sequential(layer, nn.ReLU(inplace=True)), x, layer.w_qkv)
    expected = trained(nn.Sequential(twin, nn.ReLU()), x, twin.w_qkv)
    torch.testing.assert_close(found, expected)


class Beside(nn.Module):
    """Layers side by side, each with an image of its own: one trace for all of them is much quicker than one each."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(name) for name in names)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, images, strict=True))


Results = dict[str, list[tuple[Tensor, tuple[Tensor, ...]]]]
"""Name -> images, and what was found for each of them."""


def for_each(able: Callable[[Core], bool]) -> Callable[[Callable[[tuple[str, ...]], Results]], Callable[[str], None]]:
    """A cell: those that are `able` run together, once; where that fails each alone, so that only its own cell does."""

    def decorate(run: Callable[[tuple[str, ...]], Results]) -> Callable[[str], None]:
        @cache
        def together() -> Results:
            try:
                return run(tuple(n for n in names() if n == "auto" or ((c := impls.get(n).core) and able(c))))
            except Exception:
                return {}

        def one(name: str) -> None:
            for x, found in together().get(name) or run((name,))[name]:
                assert_right(found, x)

        return one

    return decorate


@for_each(lambda core: True)
def compile_(chosen: tuple[str, ...]) -> Results:
    torch.compiler.reset()
    module = Beside(chosen)
    images = [torch.randn(SHAPE).requires_grad_() for _ in chosen]
    outputs = torch.compile(module, fullgraph=True, backend="aot_eager")(*images)
    torch.stack([y.sum() for y in outputs]).sum().backward()
    parts = zip(chosen, images, outputs, module.layers, strict=True)
    return {name: [(x, (y, x.grad, layer.w_qkv.grad))] for name, x, y, layer in parts}  # type: ignore[dict-item]


@for_each(lambda core: True)
def export_fixed(chosen: tuple[str, ...]) -> Results:
    images = [torch.randn(SHAPE) for _ in chosen]
    program = torch.export.export(Beside(chosen).eval(), tuple(images)).module()
    return {name: [(x, (y,))] for name, x, y in zip(chosen, images, program(*images), strict=True)}


def export(name: str) -> None:
    export_fixed(name)
    x = torch.randn(SHAPE)
    after = make(name)(x)
    assert type(after) is Tensor, "an eager call after tracing gives no tensor of its own"
    assert_right((after,), x)


@for_each(lambda core: core.open_sizes)
def export_dynamic(chosen: tuple[str, ...]) -> Results:
    images = tuple(torch.randn(3, CHANNELS, 9, 11) for _ in chosen)
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Beside(chosen).eval(), images, dynamic_shapes=((axes,) * len(chosen),)).module()
    found: Results = {name: [] for name in chosen}
    for shape in (SHAPE, *OTHER_SHAPES):
        sized = [torch.randn(shape) for _ in chosen]
        for name, x, y in zip(chosen, sized, program(*sized), strict=True):
            found[name].append((x, (y,)))
    return found


@for_each(lambda core: core.portable)
def onnx(chosen: tuple[str, ...]) -> Results:
    import onnxruntime

    images = tuple(torch.randn(SHAPE) for _ in chosen)
    program = torch.onnx.export(Beside(chosen).eval(), images, dynamo=True, verbose=False, opset_version=20)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), images, strict=True)}
    outputs = map(torch.from_numpy, session.run(None, feed))
    return {name: [(x, (y,))] for name, x, y in zip(chosen, images, outputs, strict=True)}


def trace(name: str) -> None:
    x = torch.randn(SHAPE)
    assert_right((torch.jit.trace(make(name).eval(), (x,))(x),), x)


def state_dict(name: str) -> None:
    file, x = io.BytesIO(), torch.randn(SHAPE)
    torch.save(make("auto").state_dict(), file)
    file.seek(0)
    layer = LocalAttention2d(CHANNELS, kernel_size=WINDOW, heads=HEADS, impl=name)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert_right((layer(x),), x)


def survives(copied: Callable[[nn.Module], nn.Module]) -> Callable[[str], None]:
    def cell(name: str) -> None:
        layer, x = make(name), torch.randn(SHAPE)
        layer(x)
        again = copied(layer)
        assert again.impl == name
        assert_right((again(x),), x)

    return cell


def checkpointed(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    assert_right(trained(lambda t: checkpoint(layer, t, use_reentrant=False), x, layer.w_qkv), x)  # type: ignore[arg-type]


def empty_batch(name: str) -> None:
    layer, x = make(name), torch.empty(0, *SHAPE[1:])
    y, dx, _ = trained(layer, x, layer.w_qkv)
    assert y.shape == dx.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def channels_last(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    found = trained(layer, x.contiguous(memory_format=torch.channels_last), layer.w_qkv)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_right(found, x)


def large_logits(name: str) -> None:
    layer, x = make(name), 1e3 * torch.randn(SHAPE)
    assert_right((layer(x),), x)


def inf(name: str) -> None:
    """Inf and NaN reach the queries whose windows hold them, and no other."""
    layer, x = make(name), torch.randn(SHAPE)
    clean = reference(x)[0]
    x[0, :, 0, 0], x[1, :, 3, 3] = torch.inf, torch.nan
    y = layer(x)
    reached = torch.zeros(2, 6, 7, dtype=torch.bool)
    reached[0, :2, :2] = reached[1, 2:5, 2:5] = True
    assert torch.equal(~torch.isfinite(y).all(1), reached)
    torch.testing.assert_close(y.movedim(1, 3)[~reached].double(), clean.movedim(1, 3)[~reached], rtol=1e-5, atol=1e-5)


def train_eval(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    with torch.inference_mode():
        in_inference = layer.eval()(x)
    layer.train()
    assert_right(trained(layer, x, layer.w_qkv), x)
    assert_right((in_inference.clone(),), x)


def forward_mode(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)
    direction = torch.randn(SHAPE)
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    twin = make("naive").double()
    _, expected = torch.func.jvp(twin, (x.double(),), (direction.double(),))
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-4)


def func_grad(name: str) -> None:
    layer, x = make(name), torch.randn(SHAPE)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (image[None],)).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    for image, gradient in zip(x, found["w_qkv"], strict=True):
        torch.testing.assert_close(gradient.double(), reference(image[None])[2], rtol=1e-4, atol=1e-4)


def meta(name: str) -> None:
    y = make(name).to("meta")(torch.empty(SHAPE, device="meta"))
    assert (y.device.type, y.shape) == ("meta", SHAPE)


COLUMNS: dict[str, Callable[[str], None]] = {
    "eager": eager,
    "autocast": autocast,
    "float64": float64,
    "compile": compile_,
    "export": export,
    "export, open sizes": export_dynamic,
    "ONNX": onnx,
    "jit.trace": trace,
    "state dict": state_dict,
    "deepcopy": survives(copy.deepcopy),
    "pickle": survives(lambda layer: pickle.loads(pickle.dumps(layer))),
    "checkpoint": checkpointed,
    "in-place successor": in_place_successor,
    "empty batch": empty_batch,
    "channels last": channels_last,
    "large logits": large_logits,
    "Inf, NaN": inf,
    "train, eval": train_eval,
    "jvp": forward_mode,
    "vmap(grad)": func_grad,
    "meta": meta,
}

REFUSALS = {
    "computes float32, bfloat16 and float16": "a",
    "torch.func and forward-mode derivatives do not go through": "b",
    "has no ONNX operators": "c",
    "torch.export would close the open sizes": "d",
}
"""The sentences that a cell may be refused with, and their letters in the table."""


def cell(name: str, column: str) -> str:
    """ "yes" where the use is right, or the letter of the sentence that refuses it. Anything else is raised."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            COLUMNS[column](name)
        except RuntimeError as error:
            causes = f"{error} {error.__cause__}"
            for sentence, letter in REFUSALS.items():
                if sentence in causes:
                    return letter
            raise
    return "yes"


def lines() -> Iterator[str]:
    """The table, a row for each use."""
    found = names()
    yield "| use | " + " | ".join(f"`{name}`" for name in found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for column in COLUMNS:
        yield f"| {column} | " + " | ".join(cell(name, column) for name in found) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in lines():
        sys.stdout.write(line + "\n")
