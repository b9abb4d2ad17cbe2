"""A folded model computes what it did, follows its parameters, and is an ordinary model elsewhere."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sasa_bench import FoldedAttention2d, LocalAttention2d, fold, impls, network

pytestmark = pytest.mark.skipif(impls.get("fused").missing() is not None, reason="nothing to build the kernel with")


def attention(channels: int = 16, **changes: object) -> LocalAttention2d:
    return LocalAttention2d(channels, **{"kernel_size": 3, "impl": "fused"} | changes)  # type: ignore[arg-type]


def seen(model: nn.Module, shape: tuple[int, ...] = (4, 16, 6, 7)) -> nn.Module:
    """`model` with statistics of a few batches, in eval mode."""
    for _ in range(3):
        model.train()(2 * torch.randn(shape) + 1)
    return model.eval()


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every layer that is packed: whether a relu went into it."""
    found: list[bool] = []
    kernel = impls.get("fused").core
    assert kernel is not None
    pack = kernel.pack
    assert pack is not None

    def record(*arguments: object) -> object:
        found.append(bool(arguments[-1]))
        return pack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(kernel.__dict__, "pack", record)
    return found


CHAINS = {
    "alone": lambda: [attention()],
    "norm": lambda: [attention(), nn.BatchNorm2d(16)],
    "norm without parameters, relu": lambda: [attention(), nn.BatchNorm2d(16, affine=False), nn.ReLU(inplace=True)],
    "relu": lambda: [attention(heads=2), nn.ReLU()],
    "pool, norm, relu": lambda: [
        attention(position="absolute"), nn.AvgPool2d(2, ceil_mode=True), nn.BatchNorm2d(16), nn.ReLU()
    ],
    "scaled": lambda: [attention(scale=0.25, border="zero"), nn.BatchNorm2d(16)],
    "one relu twice": lambda: [attention(), relu := nn.ReLU(), attention(), nn.BatchNorm2d(16), relu],
    "other modules between": lambda: [attention(), nn.Dropout(0.5), nn.BatchNorm2d(16), attention()],
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_a_folded_chain_computes_what_it_did(chain, packings: list[bool]) -> None:
    model = seen(nn.Sequential(*chain()))
    folded = fold(model)
    x = torch.randn(2, 16, 7, 9)
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(folded(given), model(given), rtol=1e-4, atol=1e-4)
            assert folded(given).stride() == model(given).stride()
    layers = sum(isinstance(m, LocalAttention2d) for m in model)  # type: ignore[attr-defined]
    assert len(packings) == layers


def test_relus_are_folded_but_for_those_behind_a_pool(packings: list[bool]) -> None:
    for chain, relu in (("one relu twice", [True, True]), ("pool, norm, relu", [False]), ("norm", [False])):
        del packings[:]
        model = fold(seen(nn.Sequential(*CHAINS[chain]())))
        with torch.no_grad():
            model(torch.randn(1, 16, 5, 5))
        assert packings == relu


def test_a_folded_network_computes_what_it_did(packings: list[bool]) -> None:
    model = network("resnet26", attention_groups="34", kernel_size=3, impl="fused").eval()
    x = torch.randn(1, 3, 64, 64)
    folded = fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)
    assert packings == [False, True, True, True, False]  # the first layer of a group stands before a pool
    assert not any(isinstance(m, FoldedAttention2d) for m in model.modules())


def changed_in_place(layer: FoldedAttention2d) -> None:
    with torch.no_grad():
        layer.attention.w_qkv.mul_(2)


def changed_statistics(layer: FoldedAttention2d) -> None:
    assert layer.norm is not None
    layer.norm.train()(torch.randn(2, 16, 3, 3))
    layer.norm.eval()


def loaded(layer: FoldedAttention2d) -> None:
    layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()})


def replaced(layer: FoldedAttention2d) -> None:
    layer.attention.w_qkv = nn.Parameter(torch.randn(48, 16))


@pytest.mark.parametrize("change", [changed_in_place, changed_statistics, loaded, replaced])
def test_weights_are_packed_again_after_a_change(change, packings: list[bool]) -> None:
    (layer,) = fold(seen(nn.Sequential(attention(), nn.BatchNorm2d(16))))[:1]  # type: ignore[index]
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        layer(x), layer(x)
        assert len(packings) == 1
        change(layer)
        torch.testing.assert_close(layer(x), layer.norm(layer.attention(x)), rtol=1e-4, atol=1e-4)
        assert len(packings) == 2


def test_it_trains_and_runs_under_autocast_and_in_bfloat16_as_the_modules_do(packings: list[bool]) -> None:
    model = seen(nn.Sequential(attention(), nn.BatchNorm2d(16), nn.ReLU()))
    folded, x = fold(model), torch.randn(2, 16, 5, 6)
    folded(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    folded.train(), model.train()
    torch.testing.assert_close(folded(x), model(x))
    folded.eval(), model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(folded(x), model(x))
    assert packings == []
    with torch.no_grad():
        y, expected = folded.bfloat16()(x.bfloat16()), model(x)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
    assert packings == [True]


def test_it_is_copied_and_saved_packed_or_not() -> None:
    folded = fold(seen(nn.Sequential(attention(), nn.BatchNorm2d(16))))
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        y = folded(x)
        file = io.BytesIO()
        torch.save(folded, file)
        file.seek(0)
        for other in (copy.deepcopy(folded), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), y)


def test_an_implementation_that_packs_nothing_runs_module_by_module() -> None:
    model = seen(nn.Sequential(attention(impl="unfold"), nn.BatchNorm2d(16), nn.ReLU()))
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        assert torch.equal(fold(model)(x), model(x))


def test_a_module_with_a_hook_stays_as_it_is() -> None:
    model = seen(nn.Sequential(attention(), nn.BatchNorm2d(16)))
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda module, given, y: outputs.append(y))  # type: ignore[index, union-attr]
    folded = fold(model)
    assert isinstance(folded[1], nn.BatchNorm2d)  # type: ignore[index]
    with torch.no_grad():
        folded(torch.randn(1, 16, 5, 5))
    assert len(outputs) == 1
    layer = attention()
    layer.register_forward_pre_hook(lambda module, given: outputs.append(given[0]))
    assert type(fold(layer)) is LocalAttention2d


class Doubled(LocalAttention2d):
    """A layer whose forward pass does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def parametrized(layer: LocalAttention2d) -> LocalAttention2d:
    nn.utils.parametrize.register_parametrization(layer, "w_qkv", nn.Tanh())
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Doubled(16, kernel_size=3, impl="fused"), lambda: parametrized(attention())],
    ids=["subclass", "parametrized"],
)  # fmt: skip
def test_a_layer_that_computes_something_else_stays_as_it_is(make, packings: list[bool]) -> None:  # type: ignore[no-untyped-def]
    layer, x = make().eval(), torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        for model in (layer, nn.Sequential(layer, nn.ReLU()).eval()):
            assert torch.equal(fold(model)(x), model(x))
        assert torch.equal(FoldedAttention2d(layer, None, None, None).eval()(x), layer(x))
    assert packings == []


def test_weights_are_packed_again_where_the_norm_or_the_relu_changes(packings: list[bool]) -> None:
    (layer, *_) = fold(seen(nn.Sequential(attention(), nn.BatchNorm2d(16), nn.ReLU())))  # type: ignore[misc]
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        for change in (lambda: None, lambda: setattr(layer.norm, "eps", 0.5), lambda: setattr(layer, "relu", None)):
            change()
            y = layer.norm(layer.attention(x))
            torch.testing.assert_close(layer(x), y if layer.relu is None else y.relu(), rtol=1e-4, atol=1e-4)
    assert packings == [True, True, False]


def test_weights_that_lie_where_others_lay_are_packed_again() -> None:
    """functional_call gives weights that are freed after the call, and the next ones take their place."""
    layer = attention(position="none").eval()
    folded, x = fold(layer), torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        for scale in range(1, 6):
            w = {"w_qkv": layer.w_qkv * scale}
            y = functional_call(folded, {f"attention.{name}": t for name, t in w.items()}, x)
            torch.testing.assert_close(y, functional_call(layer, w, x), rtol=1e-4, atol=1e-4)


def test_weights_that_went_through_another_dtype_are_packed_again() -> None:
    folded, x = fold(attention().eval()), torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        folded(x)
        folded.half().float()
        torch.testing.assert_close(folded(x), folded.attention(x), rtol=1e-5, atol=1e-5)


def test_it_has_a_shape_on_the_meta_device() -> None:
    with torch.no_grad():
        assert fold(attention()).to("meta")(torch.empty(2, 16, 8, 8, device="meta")).shape == (2, 16, 8, 8)


def test_dropout_that_was_switched_on_again_and_later_hooks_are_kept() -> None:
    x = torch.ones(1, 16, 6, 6)
    folded = fold(nn.Sequential(attention(dropout=0.5), nn.BatchNorm2d(16), nn.ReLU()).eval())[0]
    with torch.no_grad():
        folded.attention.train()
        assert not torch.equal(folded(x), folded(x))
        folded.attention.eval()
        for module in (folded.attention, folded.norm, folded.relu):
            hook = module.register_forward_hook(lambda module, inputs, y: y * 0 + 7)
            y = folded(x)
            hook.remove()
            assert not torch.equal(y, folded(x))
