"""The networks: what is counted is what is built, and what is built computes the same whatever runs its attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_bench import impls, network, ops
from sasa_bench.case import CHOICES, GROUPS, Case, CaseError
from sasa_bench.networks import attention_cases, describe, image_shape
from sasa_bench.networks.layers import Attention, Chain, Conv, Linear, Residual
from sasa_bench.networks.stem import AttentionStem
from sasa_bench.ops.stem import attention as reference_attention
from sasa_bench.ops.tensors import leaves, step
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing.check import by_chance, compare, compute_reference

LOCAL_ATTENTION = ops.get("local_attention")

NETWORKS, STEMS = CHOICES["network"][1:], CHOICES["stem"][1:]


def case(**changes: object) -> Case:
    """A whole network on small images."""
    small = {"scope": "network", "network": "resnet26", "stem": "conv", "attention_groups": "1234", "resolution": 32}
    return Case(**small | {"kernel_size": 3} | changes)  # type: ignore[arg-type]


def agree(name: str, of: Case, seed: int | None = None, draws: int = 3) -> str:
    """Run an implementation of a network against the reference; the reason of the verdict, empty when it agrees.

    Without a `seed`, a verdict that may be one by chance is judged again, by at most so many `draws` in all.
    """
    impl = impls.get(name)
    computed = impl.computes(of)
    assert impl.supports(of) is None
    reference = compute_reference(impl.op, computed, random.randrange(1 << 31) if seed is None else seed)
    tensors = leaves(reference.tensors, computed)
    grad_y = None if reference.grad_y is None else reference.grad_y.to(tensors["x"].dtype)
    verdict = compare(reference, step(computed, impl.build(computed, tensors), tensors, grad_y)())
    if seed is None and draws > 1 and by_chance(reference, verdict):
        return agree(name, of, draws=draws - 1)
    return verdict.reason


def multiplications(layer: object, shape: tuple[int, int, int]) -> int:
    """FLOPs of the convolutions and matrices of a description, without their biases."""
    if isinstance(layer, Conv):
        return replace(layer, bias=False).flops(shape)
    if isinstance(layer, Linear):
        return layer.flops(shape) - layer.channels
    if isinstance(layer, Residual):
        return multiplications(layer.body, shape) + multiplications(layer.shortcut, shape)
    steps = getattr(layer, "steps", None)
    return sum(multiplications(inner, at) for _, inner, at in steps(shape)) if steps else 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cost_model_counts_the_convolutions_that_torch_counts(name: str) -> None:
    size = random.choice([64, 96, 224])
    of = case(network=name, attention_groups="none", resolution=size)
    with torch.device("meta"):
        model, image = network(name, attention_groups="none").eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == multiplications(describe(of), image_shape(of))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("stem", STEMS)
def test_the_cost_model_counts_the_parameters_that_torch_holds(name: str, stem: str) -> None:
    groups = random.choice(GROUPS) + random.choice(["", "+heads"] if name.startswith("retinanet") else [""])
    position, window = random.choice(CHOICES["position"]), random.choice([1, 3, 7, 11])
    with torch.device("meta"):
        model = network(name, stem, groups, window, position=position)
    of = case(network=name, stem=stem, attention_groups=groups, kernel_size=window, position=position)
    assert sum(p.numel() for p in model.parameters()) == ops.get("local_attention").cost(of).params


def test_attention_of_a_network_costs_what_the_layer_costs_and_its_softmax() -> None:
    layer = Case(kernel_size=5, channels=32, heads=4, resolution="6x9", batch=1)
    described = Attention(5, 4)
    products = described.products((32, 6, 9))
    assert products == ops.get("local_attention").cost(layer).flops
    assert described.flops((32, 6, 9)) == products + 5 * 25 * 4 * 54
    assert described.params((32, 6, 9)) == ops.get("local_attention").cost(layer).params


def test_training_costs_three_forward_passes_and_images_cost_alike() -> None:
    one, four = case(batch=1), case(batch=4, mode="training")
    assert ops.get("local_attention").cost(four).flops == 12 * ops.get("local_attention").cost(one).flops


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("position", CHOICES["position"])
def test_a_network_agrees_with_the_reference_for_every_position(position: str) -> None:
    of = case(position=position, border=random.choice(CHOICES["border"]), resolution="35x44", kernel_size=5)
    assert agree(impls.ANYWHERE, of) == ""


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stem", STEMS)
def test_a_network_trains_as_the_reference_does_with_every_stem(stem: str) -> None:
    # A last map of one pixel would leave its norm two numbers a channel, and rounding errors of any size behind it.
    assert agree(impls.ANYWHERE, case(stem=stem, attention_groups="4", mode="training", resolution=64)) == ""


@pytest.mark.usefixtures("narrow")
def test_the_convolutional_counterpart_agrees_with_its_reference() -> None:
    of = case(stem="aware_values", mode="training")
    computed = impls.get("conv3x3").computes(of)
    assert (computed.stem, computed.attention_groups) == ("conv", "none")
    assert agree("conv3x3", of) == ""


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("groups", ["34", "none+heads"])
def test_a_detector_agrees_with_the_reference(groups: str) -> None:
    assert agree(impls.ANYWHERE, case(network="retinanet26", attention_groups=groups, resolution=64, batch=1)) == ""


@pytest.mark.usefixtures("narrow")
def test_a_network_with_another_attention_is_found_out() -> None:
    reference = compute_reference(LOCAL_ATTENTION, case(position="relative"), random.randrange(1 << 31))
    tensors = leaves(reference.tensors, reference.case)
    for name in tensors:
        if name.endswith("rel_row"):
            tensors[name] = tensors[name].flip(-1)
    impl = impls.get(impls.ANYWHERE)
    verdict = compare(reference, step(reference.case, impl.build(reference.case, tensors), tensors, None)())
    assert not verdict.ok


@pytest.mark.usefixtures("narrow")
def test_wrong_gradients_of_a_network_are_found_out() -> None:
    of = case(mode="training", attention_groups="34", resolution=96)
    reference = compute_reference(LOCAL_ATTENTION, of, random.randrange(1 << 31))
    tensors = leaves(reference.tensors, of)
    assert reference.grad_y is not None
    call = impls.get(impls.ANYWHERE).build(of, tensors)
    outputs = list(step(of, call, tensors, reference.grad_y.float())())
    at = 1 + next(i for i, name in enumerate(tensors) if name.endswith("rel_col"))
    outputs[at] = torch.zeros_like(outputs[at])
    assert "rel_col" in compare(reference, tuple(outputs)).reason


def test_attention_runs_before_the_pool_that_replaces_a_stride() -> None:
    sides = [(c.channels, c.height) for c in attention_cases(case(network="resnet50", resolution=224))]
    assert (
        sides
        == [(64, 56)] * 3 + [(128, 56)] + [(128, 28)] * 3 + [(256, 28)] + [(256, 14)] * 5 + [(512, 14)] + [(512, 7)] * 2
    )


def test_only_the_named_groups_use_attention() -> None:
    for groups in GROUPS:
        widths = {c.channels for c in attention_cases(case(attention_groups=groups))}
        assert widths == {32 << int(g) for g in groups.replace("none", "")}


@pytest.mark.parametrize("values", STEMS[1:])
def test_the_attention_stem_and_its_reference_are_the_papers_equation(values: str) -> None:
    channels, height, width = 16, random.randrange(1, 10), random.randrange(1, 10)
    stem = AttentionStem(3, channels, values).double()
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        computed = [stem(x), reference_attention(x, dict(stem.named_parameters()))]
        q, k = (stem.w_qk @ x[0].flatten(1)).view(2, 4, 4, height, width)
        v = stem_values(stem, x)
        for i in range(height):
            for j in range(width):
                rows = range(i // 4 * 4, min(i // 4 * 4 + 4, height))
                pixels = [(a, b) for a in rows for b in range(j // 4 * 4, min(j // 4 * 4 + 4, width))]
                for head in range(4):
                    r = [
                        torch.cat([stem.rel_row[head, :, a - i + 3], stem.rel_col[head, :, b - j + 3]])
                        for a, b in pixels
                    ]
                    query = q[head, :, i, j]
                    logits = torch.stack([query @ (k[head, :, a, b] + r[n]) for n, (a, b) in enumerate(pixels)])
                    values_here = torch.stack([v[head, :, a, b] for a, b in pixels])
                    expected = logits.softmax(0) @ values_here
                    for y in computed:
                        torch.testing.assert_close(y[0, 4 * head : 4 * head + 4, i, j], expected)


def stem_values(stem: AttentionStem, x: Tensor) -> Tensor:
    """v [4, d, H, W] pixel by pixel."""
    _, _, height, width = x.shape
    v = torch.zeros(16, height, width, dtype=x.dtype)
    for a in range(height):
        for b in range(width):
            if stem.values == "conv_values":
                for m in range(4):
                    for n in range(4):
                        if 0 <= a + m - 1 < height and 0 <= b + n - 1 < width:
                            v[:, a, b] += stem.w_v[:, :, m, n] @ x[0, :, a + m - 1, b + n - 1]
            elif stem.values == "aware_values":
                share = (stem.nu @ (stem.emb_row[:, a % 4] + stem.emb_col[:, b % 4])).softmax(0)
                mixed = (share[:, None, None] * stem.w_v.view(4, 16, 3)).sum(0)
                v[:, a, b] = mixed @ x[0, :, a, b]
            else:
                v[:, a, b] = stem.w_v @ x[0, :, a, b]
    return v.view(4, 4, height, width)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"stem": "none"}, "stem = one of conv, stand_alone"),
        ({"attention_groups": "43"}, "ascending order"),
        ({"attention_groups": "1234+heads"}, "1234, 34 or none"),
        ({"network": "resnet101"}, "resnet50"),
        ({"heads": 6}, "1, 2, 4, 8, 16, 32, 64"),
        ({"scope": "layer", "network": "none"}, "only a network has them"),
        ({"scope": "layer", "network": "none", "stem": "none"}, "only a network has them"),
    ],
)
def test_what_no_network_has_is_refused_with_a_way_out(changes: dict[str, object], hint: str) -> None:
    with pytest.raises(CaseError, match=hint.replace("+", r"\+")):
        case(**changes)


def test_logits_of_positions_alone_belong_to_networks() -> None:
    with pytest.raises(CaseError, match="give none, absolute or relative"):
        Case(position="relative_only")


def test_what_computes_no_layer_of_a_model_says_so_at_scope_network() -> None:
    for name in ("conv_kxk", "global_attention"):
        assert impls.get(name).supports(case())


def test_a_chain_names_its_layers_in_order() -> None:
    chain = describe(case())
    assert isinstance(chain, Chain)
    assert [name for name, _ in chain.layers][:2] == ["stem", "group1"]


def test_a_network_is_the_first_thing_that_a_process_may_build() -> None:
    if reason := impls.get("fused").missing():
        pytest.skip(reason)
    case = Case(
        scope="network", network="resnet26", stem="conv", attention_groups="1234", resolution=64, batch=1, threads=1
    )
    with Workers(120.0) as workers:
        rows = workers.get().ask("prepare_cases", cases={"a": ["fused", case.to_dict()]}, seed=1, exact=False)
    assert rows["a"]["status"] == "ok", rows["a"]["reason"]


def swap(name: str, module: nn.Module) -> Callable[[nn.Module], object]:
    return lambda stem: setattr(stem, name, module)


@pytest.mark.parametrize(
    "change",
    [
        swap("relu", nn.SiLU()),
        swap("pool", nn.Identity()),
        swap("pool", nn.MaxPool2d(4, 4)),
        swap("norm", nn.GroupNorm(4, 64)),
        swap("norm", nn.BatchNorm2d(64, affine=False)),
        swap("norm", nn.Identity()),
        lambda stem: stem.append(nn.Softsign()),
        lambda stem: stem.norm.register_forward_hook(lambda module, inputs, y: y + 1),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_stem_whose_modules_were_changed_computes_them(change: Callable[[nn.Module], object], training: bool) -> None:
    whole = network("resnet26", stem="aware_values", attention_groups="none")
    change(whole.stem)
    x = torch.randn(2, 3, 13, 16)
    y = whole.train(training).stem(x)
    whole.stem.kernel = None
    torch.testing.assert_close(y, whole.stem(x), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_stem_is_a_chain() -> None:
    stem = network("resnet26", stem="stand_alone", attention_groups="none").eval().stem
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(stem[:-1](x), stem[2](stem[1](stem[0](x))))


@pytest.mark.parametrize("values", STEMS[1:])
def test_an_attention_stem_may_be_made_without_memory_and_filled_later(values: str) -> None:
    """Everything that it computes with is in its state dict."""
    trained = network("resnet26", stem=values, attention_groups="none").eval()
    with torch.device("meta"):
        later = network("resnet26", stem=values, attention_groups="none").eval()
    later.to_empty(device="cpu")
    later.load_state_dict(trained.state_dict())
    x = torch.randn(1, 3, 9, 8)
    later.stem.kernel = trained.stem.kernel = None
    assert torch.equal(later.stem(x), trained.stem(x))


def test_a_detector_takes_an_empty_batch() -> None:
    with torch.no_grad():
        some, none = (network("retinanet50").eval()(torch.zeros(batch, 3, 64, 64)) for batch in (1, 0))
    assert none.shape == (0, *some.shape[1:])


def test_a_network_refuses_an_implementation_that_nobody_knows() -> None:
    with pytest.raises(impls.UnknownImplError, match="typo"):
        network("resnet26", attention_groups="none", impl="typo")


def test_a_network_is_refused_for_what_it_asks_and_nothing_else() -> None:
    reason = "no position term: give position = none"
    impl = impls.local_attention(
        "mine",
        "",
        lambda case: lambda *tensors: tensors[2],
        supports=lambda c: reason if c.position != "none" else None,
    )
    assert impl.supports(case(position="none")) is None
    assert impl.supports(case()) == reason


def test_weights_packed_ahead_are_those_of_a_layer() -> None:
    assert "not a network or a stem" in str(impls.get("fused_packed").supports(Case(stem="aware_values", heads=1)))
