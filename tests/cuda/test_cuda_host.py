"""The host side of the CUDA kernels: messages, choice of tunables, and all of it through a FAKE driver."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import _tuning, cuda
from sasa_bench.impls.cuda import kernels, operator

HERE = Path(__file__).parent
QKV = torch.zeros(1, 8, 4, 4)


def test_everything_that_needs_a_driver_through_the_fake(tmp_path):
    environment = emulation.fake_driver(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(HERE)]
    checks = HERE / "fake_driver" / "host_checks.py"
    made = subprocess.run([*command, "-o", "addopts=", str(checks)], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]


def test_missing_says_what_would_unlock_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in nvrtc.missing() == nvrtc.no_device()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA driver" in cuda.missing()
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    assert "sasa-bench[cuda]" in nvrtc.missing()


def test_describe_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "missing", lambda: "no driver.")
    assert cuda.describe() == [
        "CUDA kernels cannot run: no driver.",
        f"cached cubins: 0 (0 KiB) in {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4, 4)}, "must be \\[batch, channels, height, width\\]"),
        ({"q": QKV.double()}, "take float32, float16, bfloat16"),
        ({"kernel_size": 4}, "must be odd"),
        ({"heads": 3}, "do not divide into 3 heads"),
        ({"k": QKV[:, :4]}, "k has shape \\(1, 4, 4, 4\\); next to this q it must be \\(1, 8, 4, 4\\)"),
        ({"v": QKV.half()}, "make them match"),
        ({"rel_row": torch.zeros(2, 2, 3)}, "pass both"),
        ({"rel_row": torch.zeros(2, 2, 5), "rel_col": torch.zeros(2, 2, 3)}, "must be \\(2, 2, 3\\)"),
        ({}, "take CUDA tensors, these are on 'cpu'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"q": QKV, "k": QKV, "v": QKV, "rel_row": None, "rel_col": None, "kernel_size": 3, "heads": 2}
    with pytest.raises(ValueError, match=message):
        cuda.local_attention(**(arguments | change), zero_border=False)


def test_unknown_border_is_named():
    with pytest.raises(ValueError, match="'mask' or 'zero'"):
        cuda.attend(SimpleNamespace(kernel_size=3, heads=1, border="wrap"))


def test_shapes_are_known_without_a_device():
    with FakeTensorMode():
        q = torch.empty(2, 12, 5, 6, device="cuda", dtype=torch.bfloat16)
        rel_row, rel_col = (
            torch.empty(4, 1, 3, device="cuda").bfloat16(),
            torch.empty(4, 2, 3, device="cuda").bfloat16(),
        )
        y, log2_sum = operator.forward(q, q, q, rel_row, rel_col, 3, 4, True)
        assert (y.shape, y.dtype, y.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (log2_sum.shape, log2_sum.dtype) == ((2, 4, 5, 6), torch.float32)
        gradients = operator.backward(y, q, q, q, rel_row, rel_col, y, log2_sum, 3, 4, True)
        assert [g.shape for g in gradients] == [q.shape, q.shape, q.shape, rel_row.shape, rel_col.shape]


def test_search_takes_the_smallest_median_and_skips_what_fails():
    times = {"slow": [9, 3, 3, 3], "spiky": [9, 1, 8, 8], "fast": [9, 2, 2, 2]}
    clock = {name: iter(values) for name, values in times.items()}

    def seconds(candidate):
        if candidate == "broken":
            raise RuntimeError("too many resources requested")
        return next(clock[candidate])

    chosen, medians = _tuning.search(["slow", "broken", "spiky", "fast"], seconds, rounds=3)
    assert chosen == "fast"
    assert medians == [3, float("inf"), 8, 2]
    with pytest.raises(RuntimeError, match="none of 1 candidates runs on this device: too many"):
        _tuning.search(["broken"], seconds)


def test_a_choice_that_cannot_be_stored_is_used_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "file"))
    candidates = [kernels.Tunables(1, lanes, 8, 1, 1, 1, 1, 1) for lanes in (1, 2)]
    ran = []
    chooser = _tuning.Chooser("GPU", "source", lambda run: run() or len(ran))
    assert chooser.choose("key", candidates, ran.append) == candidates[0]
    assert ran


def test_search_keeps_the_default_on_a_tie():
    assert _tuning.search(["default", "other"], lambda candidate: 1.0)[0] == "default"


def test_tuning_store_survives_a_broken_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    store = _tuning.TuningStore("Some GPU sm_90")
    store.add("key", {"pixels": 2}, 1e-5)
    assert json.loads(store.path.read_text()) == {"key": {"chosen": {"pixels": 2}, "seconds": 1e-5}}
    store.path.write_text("{")
    assert store.read() == {}


def test_a_choice_holds_for_one_version_of_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path))
    candidates = [kernels.Tunables(pixels, 1, 1, 1, 1, 1, 1, 1) for pixels in (1, 2)]
    measured = []

    def seconds(run):
        run()
        return 1.0 / measured[-1].pixels

    for text in ("first", "first", "second"):
        chosen = _tuning.Chooser("Some GPU", text, seconds).choose("key", candidates, measured.append)
        assert chosen.pixels == 2
    assert len(measured) == 2 * len(candidates) * (1 + _tuning.SEARCH_ROUNDS)


def test_a_candidate_is_timed_as_a_graph_of_calls_that_is_replayed(monkeypatch):
    queued = []

    class Graph:
        def __enter__(self):
            queued.append("capture")

        def __exit__(self, *_):
            queued.append("captured")

        def replay(self):
            queued.append("replay")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queued.append("event")

        def synchronize(self):
            queued.append("synchronize")

        def elapsed_time(self, end):
            return 30.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def capturing(graph, stream, capture_error_mode):
        assert (stream, capture_error_mode) == ("a stream of this device", "thread_local")
        return graph

    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream of this device")
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queued.append("synchronize"))
    found = _tuning.replay_seconds(lambda: queued.append("call"))
    assert found == pytest.approx(0.03 / _tuning.SEARCH_CALLS)
    calls = ["call"] * _tuning.SEARCH_CALLS
    assert queued[:3] == ["call", "synchronize", "capture"]
    assert queued[3:] == [*calls, "captured", "replay", "event", "replay", "event", "synchronize"]


def test_a_cuda_core_that_lacks_a_name_is_named_with_its_version(monkeypatch):
    import cuda.core

    monkeypatch.delattr(cuda.core, "ObjectCode")
    assert re.search(r"^cuda-core \d+\.\d+\S* lacks what .*ObjectCode.*--upgrade", nvrtc.missing_compiler())


def test_few_threads_of_a_warp_are_spare_in_the_stages_of_a_resnet():
    for head_width, side in ((8, 56), (16, 28), (32, 14), (64, 7)):
        function = kernels.Function(torch.float32, 7, head_width, True, False)
        for kernel in ("forward", "backward_queries", "backward_keys"):
            chosen = kernels.candidates(kernel, function, side, side)[0]
            assert chosen.lanes * chosen.columns * chosen.images * chosen.rows >= 7 / 8 * chosen.threads


def test_an_architecture_beyond_nvrtc_is_a_clear_error():
    with pytest.raises(RuntimeError, match="cannot compile for sm_20; it knows sm_"):
        nvrtc.compile_cubin(kernels.source(), "sum_positions<float, 3, 4>", "sm_20")


@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
def test_compiling_and_choosing_take_place_in_the_build(mode):
    passes = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            passes.append("backward")
            return 2 * dy

    tensors = {"x": torch.randn(3, requires_grad=mode != "forward")}
    build = _tuning.choosing_in_build(lambda case, tensors: lambda: Doubled.apply(tensors["x"]))
    build(SimpleNamespace(mode=mode), tensors)
    assert passes == (["forward"] if mode == "forward" else ["forward", "backward"])
