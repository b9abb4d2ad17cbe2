"""Checks of the host code that need a driver: run by test_cuda_host.py in a process that has the FAKE one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import dense_reference
import emulation
import gpu_check
import pytest
import torch
from dense_reference import Problem

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls import _tuning, cuda
from sasa_bench.impls.cuda import kernels, launch, operator

STREAM = 0x5A5A
PROBLEM = Problem(height=4, width=5, kernel_size=3, head_width=4)
AXES = (PROBLEM.kernel_size, PROBLEM.heads, PROBLEM.zero_border)


class FakeTimer:
    """Runs what it times, and says that the third of every three candidates is the fastest."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run) -> float:
        run()
        self.calls += 1
        return 1.0 if self.calls % 3 == 0 else 2.0


@pytest.fixture(scope="session", autouse=True)
def _emulator() -> None:
    recorder = emulation.RecordingRuntime()
    (q, k, v, rel_row, rel_col), dy = PROBLEM.inputs()
    for position in ((rel_row, rel_col), (None, None)):
        y, log2_sum = emulation.run_forward(recorder, q, k, v, *position, *AXES)
        emulation.run_backward(recorder, dy, q, k, v, *position, y, log2_sum, *AXES)
    for index in range(kernels.MOST_CANDIDATES):
        recorder.pick = lambda key, candidates, index=index: candidates[index % len(candidates)]
        emulation.run_forward(recorder, q, k, v, rel_row, rel_col, *AXES)
    os.environ["FAKE_DRIVER_EMULATOR"] = str(emulation.build(recorder.expressions))


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FAKE_DRIVER_LOG", str(tmp_path / "launches"))
    return tmp_path / "launches"


def make_runtime(timer=None) -> nvrtc.Runtime:
    return nvrtc.Runtime(0, stream=lambda: STREAM, seconds=timer or FakeTimer())


@pytest.fixture
def runtime(monkeypatch, log) -> nvrtc.Runtime:
    """A runtime on the fake device; torch operators on CPU tensors use it."""
    monkeypatch.setenv("SASA_BENCH_TUNE", "0")
    made = make_runtime()
    monkeypatch.setattr(nvrtc, "runtime", lambda device: made)
    return made


def leaves():
    inputs, dy = PROBLEM.inputs()
    return [t.requires_grad_() for t in inputs], dy


def test_the_driver_is_the_fake(runtime):
    assert "FAKE" in runtime.device.name


def test_operator_and_gradients_agree_with_float64(runtime, log):
    inputs, dy = leaves()
    y = torch.ops.sasa_bench.cuda_local_attention(*inputs, *AXES)
    got = [y, *torch.autograd.grad(y, inputs, dy)]
    assert dense_reference.failures(PROBLEM, [t.detach() for t in got]) == []
    launches = log.read_text().splitlines()
    assert all(f"stream={hex(STREAM)} violations=0" in line for line in launches)
    for kernel in ("forward", "backward_queries", "backward_keys", "sum_positions"):
        assert any(f"{len(kernel)}{kernel}" in line for line in launches)


def test_without_positions_and_through_attend(runtime):
    (q, k, v, _, _), dy = leaves()
    case = SimpleNamespace(kernel_size=PROBLEM.kernel_size, heads=PROBLEM.heads, border="mask")
    y = cuda.attend(case)(q, k, v, None, None)
    got = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    problem = Problem(**{**vars(PROBLEM), "position": False})
    (q, k, v, _, _), dy = PROBLEM.inputs()
    exact = dense_reference.attention(q.double(), k.double(), v.double(), None, None, *AXES)
    assert (got[0] - exact).abs().max() < 1e-5
    assert dense_reference.failures(problem, [t.detach() for t in got]) == []


def test_non_contiguous_inputs_and_incoming_gradient(runtime):
    (q, k, v, rel_row, rel_col), dy = leaves()
    turned = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in (q, k, v)]
    y = cuda.local_attention(*turned, rel_row, rel_col, *AXES)
    got = torch.autograd.grad(y, turned, dy.transpose(2, 3).contiguous().transpose(2, 3))
    assert dense_reference.failures(PROBLEM, [y.detach(), *got]) == []


def test_opcheck(runtime):
    inputs, dy = leaves()
    torch.library.opcheck(torch.ops.sasa_bench.cuda_local_attention, (*inputs, *AXES))
    torch.library.opcheck(operator.forward, (*inputs, *AXES))
    y, log2_sum = operator.forward(*inputs, *AXES)
    saved = [t.detach() for t in (dy, *inputs, y, log2_sum)]
    torch.library.opcheck(operator.backward, (*saved, *AXES))


def test_the_operator_on_the_whole_projection(runtime):
    inputs, dy = leaves()
    qkv = torch.cat([t.detach() for t in inputs[:3]], 1).requires_grad_()
    arguments = (qkv, *inputs[3:], *AXES)
    torch.library.opcheck(torch.ops.sasa_bench.cuda_local_attention_qkv, arguments)
    y = torch.ops.sasa_bench.cuda_local_attention_qkv(*arguments)
    dqkv, *drel = torch.autograd.grad(y, [qkv, *inputs[3:]], dy)
    assert dense_reference.failures(PROBLEM, [y.detach(), *dqkv.chunk(3, 1), *drel]) == []


def test_a_plan_is_made_once_for_a_shape(runtime, monkeypatch):
    inputs, _ = PROBLEM.inputs()
    cuda.local_attention(*inputs, *AXES)
    monkeypatch.setattr(kernels, "candidates", None)
    monkeypatch.setattr(launch, "candidates", None)
    y = cuda.local_attention(*inputs, *AXES)
    assert dense_reference.failures(PROBLEM, [y]) == []


def test_second_derivative_is_a_clear_error(runtime):
    inputs, dy = leaves()
    y = cuda.local_attention(*inputs, *AXES)
    (first,) = torch.autograd.grad(y, inputs[0], dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_cubins_are_compiled_once_and_repaired(log, tmp_path, monkeypatch):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SASA_BENCH_TUNE", "0")
    compiled = []
    compile_cubin = nvrtc.compile_cubin

    def count(source, expression, arch):
        compiled.append(expression)
        return compile_cubin(source, expression, arch)

    monkeypatch.setattr(nvrtc, "compile_cubin", count)
    inputs, _ = PROBLEM.inputs()
    emulation.run_forward(make_runtime(), *inputs, *AXES)
    emulation.run_forward(make_runtime(), *inputs, *AXES)
    assert len(compiled) == 1
    (file,) = (tmp_path / "cache" / "cubin").iterdir()
    assert file.read_bytes().partition(b"\n")[2].startswith(b"\x7fELF")
    file.write_bytes(file.read_bytes()[:1000])
    emulation.run_forward(make_runtime(), *inputs, *AXES)
    assert len(compiled) == 2


def test_tunables_are_measured_once_and_remembered(log, tmp_path, monkeypatch):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    inputs, _ = PROBLEM.inputs()
    timer = FakeTimer()
    emulation.run_forward(make_runtime(timer), *inputs, *AXES)
    function = kernels.Function(torch.float32, PROBLEM.kernel_size, PROBLEM.head_width, True, False)
    candidates = kernels.candidates("forward", function, PROBLEM.height, PROBLEM.width)
    assert timer.calls == len(candidates) * (1 + _tuning.SEARCH_ROUNDS)
    again = FakeTimer()
    emulation.run_forward(make_runtime(again), *inputs, *AXES)
    assert again.calls == 0
    described = "\n".join(nvrtc.describe())
    assert "cached cubins: " in described
    assert "forward float32 k=3 d=4 relative mask 4x5" in described
    assert "pixels=" in described


def test_gpu_check_measures_every_candidate_and_marks_the_chosen(log, tmp_path, monkeypatch):
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    rows = gpu_check.choices(make_runtime(FakeTimer()), "cpu", FakeTimer(), PROBLEM)
    function = kernels.Function(torch.float32, PROBLEM.kernel_size, PROBLEM.head_width, True, False)
    assert len(rows) == len(kernels.candidates("forward", function, PROBLEM.height, PROBLEM.width))
    assert [row["chosen"] for row in rows].count(True) == 1
    assert all(row["seconds"] > 0 for row in rows)


def test_the_default_stream(log, monkeypatch):
    monkeypatch.setenv("SASA_BENCH_TUNE", "0")
    inputs, _ = PROBLEM.inputs()
    made = nvrtc.Runtime(0, stream=lambda: 0, seconds=FakeTimer())
    y, _ = emulation.run_forward(made, *inputs, *AXES)
    assert dense_reference.failures(PROBLEM, [y]) == []
    assert "stream=(nil)" in log.read_text()


def test_a_failing_launch_is_a_runtime_error(runtime):
    with pytest.raises(RuntimeError, match="does not run on FAKE"):
        runtime.launch(kernels.source(), "sum_positions<float, 3, 4>", 1, 32, [None, None, None, 1, 1, 1])
