"""The bare operators under torch.func and forward-mode derivatives are right or refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sasa_bench import impls
from sasa_bench.impls import _operator, fused

SHAPE = (2, 4, 5, 3)
AXES = (3, 2, False)

REFUSED = r"torch.func and forward-mode derivatives do not go through \w+: use another implementation"


@cache
def probe() -> str:
    """The name of an operator made as those of the GPU kernels are, that computes q k + v."""

    def forward(q: Tensor, k: Tensor, v: Tensor, rel_row: None, rel_col: None, y: Tensor, *rest: object) -> None:
        y.copy_(q * k + v)

    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: None, rel_col: None, y: Tensor, log2_sum: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, *rest: object,
    ) -> None:  # fmt: skip
        dq.copy_(dy * k)
        dk.copy_(dy * q)
        dv.copy_(dy)

    _operator.define("probe", "probe", [torch.float32], forward, backward)
    return "probe"


def defined() -> Callable[[Tensor], Tensor]:
    operator = getattr(torch.ops.sasa_bench, probe())
    k, v = torch.randn(SHAPE), torch.randn(SHAPE)
    return lambda q: operator(q, k, v, None, None, *AXES)


def defined_qkv() -> Callable[[Tensor], Tensor]:
    operator = getattr(torch.ops.sasa_bench, f"{probe()}_qkv")
    kv = torch.randn(SHAPE).repeat(1, 2, 1, 1)
    return lambda q: operator(torch.cat([q, kv], 1), None, None, *AXES)


def native() -> Callable[[Tensor], Tensor]:
    k, v = torch.randn(SHAPE), torch.randn(SHAPE)
    return lambda q: torch.ops.sasa_bench.fused_local_attention(q, k, v, None, None, *AXES)


def native_layer() -> Callable[[Tensor], Tensor]:
    w = torch.randn(3 * SHAPE[1], SHAPE[1])
    return lambda x: torch.ops.sasa_bench.fused_attention_layer(x, w, None, None, *AXES)


def stem() -> Callable[[Tensor], Tensor]:
    form, values = torch.randn(4, 3, 17), torch.randn(16, 8, 3)
    return lambda x: torch.ops.sasa_bench.stem_top(x[:, :3], form, values)[0]


def frozen_stem() -> Callable[[Tensor], Tensor]:
    form, values, shift = torch.randn(4, 3, 17), torch.randn(16, 8, 3), torch.randn(8)
    return lambda x: torch.ops.sasa_bench.stem_inference(x[:, :3], form, values, shift)


@pytest.fixture(params=[defined, defined_qkv, native, native_layer, stem, frozen_stem], ids=lambda make: make.__name__)
def operator(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    if request.param not in (defined, defined_qkv):
        if reason := impls.get("fused").missing():
            pytest.skip(reason)
        fused.load()
    made: Callable[[Tensor], Tensor] = request.param()
    return made


def dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))


def dual_numbers_in_training(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x)))


def jvp(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jvp(function, (x,), (torch.ones_like(x),))


def grad(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.grad(lambda t: function(t).sum())(x)


def vmap_of_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vmap(torch.func.grad(lambda t: function(t).sum()))(x[None])


@pytest.mark.parametrize("use", [dual_numbers, dual_numbers_in_training, jvp, grad, vmap_of_grad])
def test_a_derivative_that_an_operator_does_not_have_is_refused_by_name(
    operator: Callable[[Tensor], Tensor], use: Callable[[Callable[[Tensor], Tensor], Tensor], None]
) -> None:
    with pytest.raises(NotImplementedError, match=REFUSED):
        use(operator, torch.randn(SHAPE))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_alone_goes_through(operator: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(operator)(x), torch.stack([operator(each) for each in x]))


def test_vmap_over_a_tensor_that_needs_a_gradient_keeps_it() -> None:
    operator = defined()
    x = torch.randn(3, *SHAPE, requires_grad=True)
    (found,) = torch.autograd.grad(torch.vmap(operator)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(torch.stack([operator(each) for each in x]).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_under_autocast_an_operator_runs_in_its_dtype() -> None:
    if reason := impls.get("fused").missing():
        pytest.skip(reason)
    fused.load()
    operators = torch.ops.sasa_bench
    q, k, v = torch.randn(3, *SHAPE).bfloat16().float().unbind()
    w, rel = torch.randn(12, 4).bfloat16().float(), torch.randn(2, 1, 3).bfloat16().float()
    calls = {
        "core": (operators.fused_local_attention, (q, k, v, rel, rel)),
        "layer": (operators.fused_attention_layer, (q, w, rel, rel)),
    }
    for operator, tensors in calls.values():
        expected = operator(*(t.bfloat16() for t in tensors), *AXES)
        with torch.autocast("cpu", torch.bfloat16):
            found = operator(*tensors, *AXES)
            mixed = operator(tensors[0].bfloat16(), *tensors[1:], *AXES)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert torch.equal(mixed, expected)
        leaf = tensors[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = operator(leaf, *tensors[1:], *AXES)
        y.float().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


THREADS = """
import threading
from sasa_bench import LocalAttention2d
import torch
start, failed = threading.Barrier(4), []

def first_call():
    layer, x = LocalAttention2d(8, kernel_size=3, heads=2, impl="fused"), torch.randn(1, 8, 5, 5)
    start.wait()
    try:
        layer(x)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=first_call) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert not failed, failed
"""


def test_threads_may_make_their_first_call_together() -> None:
    if reason := impls.get("fused").missing():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_functionalize_goes_through(operator: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(SHAPE)
    torch.testing.assert_close(torch.func.functionalize(operator)(x), operator(x))


def test_reverse_mode_still_works_beside_an_open_dual_level(
    operator: Callable[[Tensor], Tensor], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["operator"] is frozen_stem:
        pytest.skip("has no gradient")
    x = torch.randn(SHAPE, requires_grad=True)
    with forward_ad.dual_level():
        (inside,) = torch.autograd.grad(operator(x).sum(), x)
    (outside,) = torch.autograd.grad(operator(x).sum(), x)
    torch.testing.assert_close(inside, outside)
