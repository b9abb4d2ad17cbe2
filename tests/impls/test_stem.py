"""The stem's native kernel agrees with the reference, in every build, and acts in a model as the plain modules do."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from agreement import agree
from fused_builds import quick
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_bench import impls, network
from sasa_bench.case import CHOICES, Case
from sasa_bench.impls import _native, _stem
from sasa_bench.networks.layers import AttentionStem
from sasa_bench.networks.stem import Stem
from sasa_bench.ops.tensors import random_tensors

KERNEL = "fused"
VALUES = CHOICES["stem"][2:]

pytestmark = pytest.mark.skipif(impls.get(KERNEL).missing() is not None, reason="nothing to build the kernel with")

SIZES = {
    "whole blocks": {"resolution": "12x16", "channels": 64, "batch": 2},
    "cut blocks, half a vector a head": {"resolution": "9x6", "channels": 24, "batch": 1},
    "two vectors a head": {"resolution": "9x17", "channels": 128, "batch": 2},
    "three channels a head": {"resolution": "7x4", "channels": 12, "batch": 2},
    "one pixel": {"resolution": 1, "channels": 4, "batch": 9},
    "one row": {"resolution": "1x40", "channels": 16, "batch": 1},
}


OTHER_BUILDS = [
    isa for isa in _native.executable_isas() if isa in _stem.BUILDS and _stem.library(isa) != _stem.library()
]


def stem_case(**changes: object) -> Case:
    return Case(**{"stem": "aware_values", "heads": 1} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("stem", VALUES)
def test_the_kernel_agrees_with_the_reference(stem: str, mode: str, size: dict[str, object]) -> None:
    agree(KERNEL, stem_case(stem=stem, mode=mode, **size))


@pytest.mark.parametrize("stem", VALUES)
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("isa", OTHER_BUILDS)
def test_every_build_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch, isa: str, mode: str, stem: str) -> None:
    as_published = _stem.library
    monkeypatch.setattr(_stem, "library", lambda isa=None: quick(as_published(isa)))
    monkeypatch.setenv("SASA_BENCH_ISA", isa)
    agree(KERNEL, stem_case(stem=stem, mode=mode, resolution="10x12", channels=40, heads=1, batch=2))


def test_a_stem_alone_compiles_nothing_else() -> None:
    impl = impls.get(KERNEL)
    assert impl.core is not None

    def refuse() -> None:
        raise AssertionError("the kernels of layers were asked for")

    alone = impls.local_attention("alone", "", core=replace(impl.core, load=refuse), stem=impl.stem)
    case = stem_case(resolution=8, channels=8)
    tensors = {name: t.float() for name, t in random_tensors(impl.op, case, random.randrange(1 << 31)).items()}
    assert alone.build(case, tensors)().shape == (case.batch, 8, 2, 2)
    assert impl.info.native(case) == [_stem.library()]
    whole = case.with_(scope="network", network="resnet26", attention_groups="4", heads=8)
    assert {library.name.split("_")[0] for library in impl.info.native(whole)} == {"fused", "stem"}


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("memory_format", CHOICES["memory_format"])
def test_bfloat16_and_channels_last_agree_with_the_reference(mode: str, memory_format: str) -> None:
    sizes = {"resolution": "14x20", "channels": 64, "mode": mode, "memory_format": memory_format}
    for dtype in ("float32", "bfloat16"):
        agree(KERNEL, stem_case(dtype=dtype, stem=random.choice(VALUES), **sizes))


@pytest.mark.parametrize("name", [n for n in impls.names() if n != KERNEL and impls.get(n).info.quick])
def test_every_implementation_computes_a_stem_or_says_that_it_cannot(name: str) -> None:
    case = stem_case(stem=random.choice(VALUES), resolution="6x8", channels=8, mode="training")
    if not impls.get(name).supports(case):
        agree(name, case)


def pair(values: str) -> tuple[nn.Module, nn.Module]:
    """The stem of one network run by the kernel, and the same by the plain modules."""
    ours = network("resnet26", values, "none", impl=KERNEL).get_submodule("stem")
    theirs = network("resnet26", values, "none", impl=impls.ANYWHERE).get_submodule("stem")
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, Stem)
    assert ours.kernel is not None
    return ours, theirs


@pytest.mark.parametrize("values", VALUES)
def test_running_statistics_follow_those_of_batch_norm(values: str) -> None:
    for momentum in (0.1, None):
        ours, theirs = pair(values)
        for stem in (ours, theirs):
            stem.get_submodule("norm").momentum = momentum  # type: ignore[assignment]
        for _ in range(3):
            x = 3 * torch.randn(2, 3, 11, 14) + 5
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    ours, theirs = pair("stand_alone")
    x = 1 + 1e-3 * torch.randn(2, 3, 16, 16)
    ours(x), theirs.double()(x.double())
    ratio = ours.get_buffer("norm.running_var").double() - 0.9
    expected = theirs.get_buffer("norm.running_var") - 0.9
    torch.testing.assert_close(ratio, expected, rtol=1e-2, atol=1e-7)


def test_under_autocast_the_output_has_its_dtype_and_gradients_that_of_the_parameters() -> None:
    ours, theirs = pair("aware_values")
    x = torch.randn(2, 3, 16, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for stem in (ours, ours.eval()):
            y = stem(x)
            assert y.dtype == torch.bfloat16
    theirs.eval()
    torch.testing.assert_close(y.float(), theirs(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in ours.parameters())


def test_a_channels_last_image_gives_a_channels_last_map() -> None:
    ours, _ = pair("aware_values")
    x = torch.randn(2, 3, 16, 20)
    for stem in (ours, ours.eval()):
        y = stem(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert stem(x).is_contiguous()


@pytest.mark.parametrize("values", VALUES)
def test_an_empty_batch_gives_an_empty_map_and_zero_gradients(values: str) -> None:
    ours, _ = pair(values)
    y = ours.eval()(torch.randn(0, 3, 10, 12))
    assert y.shape == (0, 64, 3, 3)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("values", VALUES)
def test_an_empty_batch_in_training_leaves_the_statistics_as_they_were(values: str) -> None:
    ours, theirs = pair(values)
    for stem in (ours, theirs):
        before = {name: t.clone() for name, t in stem.named_buffers()}
        assert stem(torch.randn(0, 3, 12, 12)).shape == (0, 64, 3, 3)
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.equal(stem.get_buffer(name), before[name])


@pytest.mark.parametrize("values", VALUES)
def test_a_counter_of_flops_counts_the_work_of_the_attention(values: str) -> None:
    ours, _ = pair(values)
    x = torch.randn(2, 3, 16, 20)
    work = AttentionStem(64, "conv_values" if values == "conv_values" else "stand_alone").flops((3, 16, 20))
    for mode, passes in ((True, 3), (False, 1)):
        with FlopCounterMode(display=False) as counter:
            y = ours.train(mode)(x) if mode else ours.eval()(x).detach()
            if mode:
                y.sum().backward()
        counted = counter.get_flop_counts()["Global"]
        assert sum(n for name, n in counted.items() if "sasa_bench" in str(name)) == passes * 2 * work


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_pixel_that_is_no_number_reaches_its_own_block_alone(bad: float) -> None:
    ours, _ = pair("aware_values")
    x = torch.randn(1, 3, 12, 12)
    x[0, 1, 5, 6] = bad
    with torch.no_grad():
        finite = ours.eval()(x).isfinite().all(1)[0]
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[1, 1] = False
    assert torch.equal(finite, expected)


def test_a_compiled_stem_is_one_graph_and_trains_as_the_eager_one() -> None:
    ours, _ = pair("aware_values")
    compiled, x = copy.deepcopy(ours), torch.randn(2, 3, 18, 16)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")

    def train(stem: nn.Module, call: object) -> list[Tensor]:
        y: Tensor = call(x)  # type: ignore[operator]
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in stem.parameters() if p.grad is not None)]

    for a, b in zip(train(compiled, run), train(ours, ours), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    ours.eval(), compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_stem_infers_as_the_eager_one_with_the_default_backend() -> None:
    ours, _ = pair("aware_values")
    ours.eval()
    x = torch.randn(2, 3, 18, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True)(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 24, 3), (24, 3, 4, 4)], ids=["places", "filters"])
def test_operators_pass_the_checks_of_torch(shape: tuple[int, ...]) -> None:
    x, form = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 17, requires_grad=True)
    values, shift = torch.randn(shape, requires_grad=True), torch.randn(24)
    torch.library.opcheck(_stem.top_forward, (x, form, values))
    torch.library.opcheck(_stem.inference_forward, (x, form.detach(), values.detach(), shift))


@pytest.mark.parametrize("values", ["stand_alone", "conv_values", "aware_values"])
def test_an_empty_batch_in_training_gives_no_gradient_that_is_not_a_number(values: str) -> None:
    whole = network("resnet26", stem=values, attention_groups="none").train().stem
    whole(torch.randn(0, 3, 12, 12)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in whole.parameters())
