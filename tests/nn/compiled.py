"""A training step of a compiled network against the eager one, judged by float64.

`python tests/nn/compiled.py [NETWORK]` compiles a network of the paper, resnet50 unless named, in float32 and under
autocast to bfloat16. That takes some minutes; tests do it with a small one.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench import LocalAttention2d, network

FACTOR = 8.0
"""How many times the error of eager steps a compiled one may be off."""

DRAWS = 4
"""Eager steps with other roundings: a deep network magnifies them, by a factor that one step alone does not tell."""


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The scores before a step of gradient descent, and by how much it changes the parameters, by name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scores = run(x).to(x.dtype)
    F.cross_entropy(scores, labels).backward()
    optimizer.step()
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return {"scores": scores.detach()} | changes


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """RMS error of each value over its RMS."""
    return {
        name: ((found[name].double() - value).square().mean() / value.square().mean()).sqrt().item()
        for name, value in exact.items()
    }


def moved(model: nn.Module, rounding: float) -> nn.Module:
    """A copy with every parameter moved by one rounding, upwards or downwards: the same network, rounded otherwise."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + rounding * (2.0 * torch.randint(0, 2, parameter.shape) - 1)
    return other


def assert_a_compiled_step_is_as_exact(model: nn.Module, x: Tensor, autocast: bool) -> tuple[float, float]:
    """Train a step with torch.compile(fullgraph=True) and Inductor; returns the largest errors, compiled and eager."""
    labels = torch.randint(0, 10, (x.shape[0],))
    exact_model = copy.deepcopy(model).double()
    for layer in exact_model.modules():
        if isinstance(layer, LocalAttention2d):
            layer.impl = "auto"
    exact = step(exact_model, exact_model, x.double(), labels)
    compiled_model = copy.deepcopy(model)
    rounding = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    others = [moved(model, rounding / 2) for _ in range(DRAWS)]
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        steps = [errors(step(one, one, x, labels), exact) for one in (model, *others)]
        compiled = errors(step(torch.compile(compiled_model, fullgraph=True), compiled_model, x, labels), exact)
    eager = {name: max(one[name] for one in steps) for name in exact}
    for name, error in compiled.items():
        budget = FACTOR * max(eager[name], rounding)
        assert error <= budget, f"{name} is off by {error:.2e} where {budget:.2e} is allowed"
    return max(compiled.values()), max(eager.values())


def small() -> nn.Module:
    """What a ResNet is made of: a convolution, a batch norm, attention of both kinds, a residual, a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = LocalAttention2d(16, kernel_size=3, heads=2, impl="fused")
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.attention(x)) + x)

    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    for autocast in (False, True):
        started = time.perf_counter()
        worst = assert_a_compiled_step_is_as_exact(network(named, impl="fused"), torch.randn(2, 3, 224, 224), autocast)
        dtype = "autocast to bfloat16" if autocast else "float32"
        sys.stdout.write(
            f"{named}, {dtype}: largest relative RMS error of a parameter's change {worst[0]:.1e} compiled, "
            f"{worst[1]:.1e} eager; {time.perf_counter() - started:.0f} s\n"
        )
        sys.stdout.flush()
