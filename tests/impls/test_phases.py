"""The phases that the native kernel counts in a build with timers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from fused_builds import as_published, quick

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.impls import fused
from sasa_bench.impls._native import Library
from sasa_bench.impls._phases import PHASES, Phases, _read
from sasa_bench.ops.tensors import leaves, random_tensors, step
from sasa_bench.timing.check import gradient_of_output

CASE = Case(kernel_size=7, channels=64, heads=16, resolution=28, batch=1, threads=1)


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build with timers without kernels for some widths of heads, and with few optimisations."""
    if reason := fused.missing():
        pytest.skip(reason)

    def kernels(isa: str, timed: bool = False) -> list[Library]:
        found = as_published(isa, timed)
        return [quick(one) for one in found] if timed else found

    monkeypatch.setattr(fused, "kernels", kernels)


def counted(case: Case, calls: int = 8) -> tuple[Phases, Callable[[], object]]:
    """The phases of a case of `fused`, and the call."""
    impl = impls.get("fused")
    tensors = leaves(random_tensors(impl.op, case, 0), case)
    call = impl.build(case, tensors)
    grad_y = None if case.mode == "forward" else gradient_of_output(case, call(), 0)
    run = step(case, call, tensors, grad_y)
    assert impl.info.phases is not None
    return impl.info.phases(run, case.threads, calls), run


def test_phases_are_most_of_the_time_of_a_call() -> None:
    found = min((counted(CASE)[0] for _ in range(3)), key=lambda one: one.timed_s)  # others disturb the rest
    assert set(found.seconds) == set(PHASES) - {"gradients"}
    assert 0.6 * found.timed_s < sum(found.seconds.values()) < 1.1 * found.timed_s
    assert found.plain_s > 0


def test_the_window_costs_logits_and_sums_not_projections() -> None:
    small, large = (counted(CASE.with_(kernel_size=k))[0].seconds for k in (3, 11))
    growth = {name: large[name] / small[name] for name in ("project", "logits", "softmax", "aggregate")}
    assert min(growth["logits"], growth["softmax"], growth["aggregate"]) > 2.5 * growth["project"], growth


def test_training_counts_gradients_and_the_products_of_the_backward_pass() -> None:
    forward, training = counted(CASE)[0].seconds, counted(CASE.with_(mode="training"))[0].seconds
    assert training["gradients"] > 0
    assert training["project"] > 1.5 * forward["project"]


def test_the_build_without_timers_is_in_place_afterwards() -> None:
    found, run = counted(CASE)
    libraries = fused.kernels(fused.chosen_isa(), timed=True)
    clocks = [ctypes.CDLL(str(library.path)).sasa_phases for library in libraries]
    _read(clocks)
    with torch.no_grad():
        run()
    assert not any(_read(clocks)[0].values())
    assert found.overhead > -0.5
