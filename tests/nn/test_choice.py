"""What "auto" runs: the first of the order that can, the order of this machine before the committed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factory import record

from sasa_bench import LocalAttention2d, impls
from sasa_bench.case import Case, UserError
from sasa_bench.impls import sdpa_dense
from sasa_bench.nn import choice
from sasa_bench.nn.choice import Use, choose

WINDOW = impls.Window(7, 7, 8, "mask")


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's choice would be kept. Not another cache, to which kernels would be compiled anew."""
    monkeypatch.setattr(choice, "own_file", lambda: tmp_path / "choice.csv")
    choice._orders.cache_clear()
    yield tmp_path / "choice.csv"
    choice._orders.cache_clear()


def test_every_use_gets_an_implementation_that_takes_it() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for exported in ("", "fixed", "open", "onnx"):
            for transformed in (False, True):
                for window in (WINDOW, impls.Window(3, 5, 2, "zero")):
                    use = Use("cpu", dtype, True, exported, transformed)
                    chosen = choose(use, window)
                    assert choice.unfit(chosen.name, use, window) is None
                    assert chosen.reason


def test_the_committed_order_names_implementations() -> None:
    for names in choice._orders()[0].values():
        assert set(names) <= set(impls.names())


def test_what_was_measured_here_comes_first(own: Path) -> None:
    case = Case(threads=2)
    rows = [record(name, seconds, case=case) for name, seconds in (("naive", 1e-3), ("unfold", 2e-3), ("fused", 3e-3))]
    assert choice.learn(rows) == own
    found = choose(Use("cpu", torch.float32, False), WINDOW)
    assert found.name == "naive"
    assert str(own) in found.reason
    assert choose(Use("cpu", torch.float32, True), WINDOW).reason.startswith("the first of this machine's")


def test_rows_without_a_time_of_local_attention_teach_nothing(own: Path) -> None:
    with pytest.raises(UserError, match="run a suite"):
        choice.learn([record("conv3x3")])
    assert not own.exists()


def test_auto_takes_the_next_where_the_first_refuses_a_map_of_this_size(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text("device,mode,implementations\ncpu,forward,sdpa_dense\ncpu,training,sdpa_dense\n")
    monkeypatch.setattr(sdpa_dense, "_memory", lambda device: 1 << 18)
    monkeypatch.setattr("sasa_bench.nn.layer._CHOSEN", {})
    layer = LocalAttention2d(8, kernel_size=3, heads=2)
    assert layer.kernel(torch.randn(1, 8, 5, 5)).name == "sdpa_dense"
    large = torch.randn(1, 8, 24, 24)
    assert layer.kernel(large).name != "sdpa_dense"
    y = layer(large)
    layer.impl = "naive"
    torch.testing.assert_close(y, layer(large), rtol=1e-4, atol=1e-5)
    layer.impl = "sdpa_dense"
    with pytest.raises(RuntimeError, match="more than half of the"):
        layer(large)


def test_the_reason_names_what_was_passed_over() -> None:
    found = choose(Use("cpu", torch.float64, False), WINDOW)
    assert "the fused kernel computes float32, bfloat16 and float16, not float64" in found.reason


def test_auto_is_the_default_and_one_of_several_may_be_named_later() -> None:
    layer, x = LocalAttention2d(8, kernel_size=3, heads=2), torch.randn(1, 8, 5, 6)
    assert layer.impl == "auto"
    y = layer(x)
    layer.impl = "naive"
    torch.testing.assert_close(layer(x), y)


def test_a_name_that_this_version_does_not_know_is_passed_over(own: Path) -> None:
    own.write_text("device,mode,implementations\ncpu,forward,gone unfold\ncpu,training,gone unfold\n")
    found = choose(Use("cpu", torch.float32, False), WINDOW)
    assert found.name == "unfold"
    assert "gone: unknown implementation" in found.reason


def test_who_runs_only_where_it_is_fastest_is_not_the_fastest_of_all(own: Path) -> None:
    small, large = Case(resolution=7, threads=2), Case(resolution=28, threads=2)
    times = {"naive": {small: 1.0}, "unfold": {small: 1.1, large: 1.0}, "blocked": {small: 1.2, large: 1.3}}
    rows = [record(name, seconds, case=case) for name, of in times.items() for case, seconds in of.items()]
    choice.learn(rows)
    assert choose(Use("cpu", torch.float32, False), WINDOW).name == "unfold"
