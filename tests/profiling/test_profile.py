from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.profiling import breakdown, trace
from sasa_bench.profiling.events import TraceError
from sasa_bench.profiling.page import html, save, with_phases
from sasa_bench.timing.capture import ProfileError, capture
from sasa_bench.timing.process import Worker
from sasa_bench.timing.stages import STAGES, Stages, classify

SMALL = Case(kernel_size=5, channels=16, heads=4, resolution=9, batch=1, threads=1)
ATTENTION = ("naive", "unfold", "blocked")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two implementations on a small case."""
    folder = tmp_path_factory.mktemp("profile")
    summaries = [capture(name, SMALL, folder) for name in ("blocked", "conv3x3")]
    save(folder, SMALL, summaries)
    return folder, summaries


def read(folder: Path, summary: dict[str, Any], which: str = "trace") -> trace.Trace:
    return trace.read(folder / summary[which], summary["calls"])


def test_the_stages_of_attention_are_told_apart(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (attention, convolution) = profiled
    found = breakdown.stages(read(folder, attention, "stages"))
    assert {"project", "pad", "position", "logits", "softmax", "aggregate"} <= set(found) <= set(STAGES)
    assert all(spent > 0 for spent in found.values())
    assert set(breakdown.stages(read(folder, convolution, "stages"))) == {"convolution"}


@pytest.mark.parametrize(("name", "mode"), [*((name, "training") for name in ATTENTION), ("unfold", "backward")])
def test_gradients_belong_to_the_stage_of_their_forward_operator(name: str, mode: str, tmp_path: Path) -> None:
    def share_of_no_stage() -> float:
        summary = capture(name, SMALL.with_(mode=mode, kernel_size=3), tmp_path)
        found = breakdown.stages(read(tmp_path, summary, "stages"))
        assert {"project", "position", "logits", "softmax", "aggregate"} <= set(found)
        return found.get("other", 0.0) / sum(found.values())

    assert any(share_of_no_stage() < 0.35 for _ in range(3))  # what disturbs one capture counts where it happens


@pytest.mark.parametrize("name", ATTENTION)
def test_following_the_data_changes_no_result(name: str) -> None:
    from sasa_bench import impls
    from sasa_bench.ops.tensors import leaves, random_tensors

    impl = impls.get(name)
    tensors = leaves(random_tensors(impl.op, SMALL, 0), SMALL)
    call = impl.build(SMALL, tensors)
    expected = call()
    with Stages(tensors):
        assert torch.equal(call(), expected)


@pytest.mark.parametrize(
    ("operator", "roles", "stage"),
    [
        ("convolution", {"x", "w_qkv"}, "project"),
        ("constant_pad_nd", {"k"}, "pad"),
        ("bmm", {"q", "k"}, "logits"),
        ("bmm", {"q", "r"}, "position"),
        ("add", {"l", "r"}, "position"),
        ("masked_fill", {"l"}, "logits"),
        ("_softmax", {"l"}, "softmax"),
        ("bmm", {"a", "v"}, "aggregate"),
        ("_scaled_dot_product_flash_attention_for_cpu", {"q", "k", "v"}, "one operator"),
        ("some_kernel", {"x", "w_qkv", "r"}, "one operator"),
        ("convolution", {"x", "weight"}, "convolution"),
        ("zeros_like", {"q"}, "other"),
    ],
)
def test_an_operator_is_classified_by_its_data(operator: str, roles: set[str], stage: str) -> None:
    assert classify(operator, frozenset(roles))[0] == stage


def test_phases_that_a_kernel_counts_stand_in_place_of_its_one_operator(
    profiled: tuple[Path, list[dict[str, Any]]],
) -> None:
    phases = {"seconds": {"project": 1e-4, "logits": 2e-4}, "timed_s": 5e-4, "plain_s": 4e-4}
    found = with_phases({"one operator": 9e-4, "position": 1e-4}, phases)
    assert found == pytest.approx({"project": 1e-4, "logits": 2e-4, "position": 1e-4, "other": 1e-4})
    folder, (attention, _) = profiled
    page = html(folder, SMALL, [attention | {"phases": phases}])
    assert "The timers add 25.0 % to a call of 400 µs" in " ".join(page.split())
    assert "The timers add" not in html(folder, SMALL, [attention])


def test_operators_carry_shapes_memory_and_flops(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (_, convolution) = profiled
    operators = {o.name: o for o in breakdown.operators(read(folder, convolution), convolution["flops"])}
    found = operators["aten::conv2d"]
    assert "1×16×9×9" in found.shapes
    assert found.count == 1
    assert found.flops == pytest.approx(2 * 9 * 16 * 16 * 81)
    assert sum(o.allocated_bytes for o in operators.values()) >= 16 * 81 * 4
    assert all(o.self_s <= o.total_s + 1e-9 for o in operators.values())


def test_the_flame_graph_nests_operators_in_the_code_that_calls_them(
    profiled: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (attention, _) = profiled
    boxes = breakdown.flame(read(folder, attention))
    names = [box.name for box in boxes]
    assert any("impls/blocked.py" in name for name in names)
    assert any(name.startswith("aten::") for name in names)
    whole = sum(box.length_s for box in boxes if box.depth == 0)
    assert all(box.start_s + box.length_s <= whole * 1.001 for box in boxes)


def test_the_flame_graph_leaves_out_the_profiler_however_long_it_takes(
    profiled: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (attention, _) = profiled
    found = read(folder, attention)
    [lane] = (lane for lane in found.lanes if any("profiler" in found.labels[i].name for i in set(lane.label)))
    own = np.array(["profiler" in found.labels[i].name for i in lane.label])
    within = (lane.start[:, None] >= found.steps[:, 0]) & (lane.start[:, None] < found.steps[:, 1])
    assert np.any(own & within.any(axis=1))
    shortest = np.min(found.steps[:, 1] - found.steps[:, 0])
    lane.length[own] = np.maximum(lane.length[own], 0.1 * shortest)
    assert not any("profiler" in box.name for box in breakdown.flame(found))


def test_memory_over_time_rises_and_falls(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (attention, _) = profiled
    moments = breakdown.memory(read(folder, attention))
    used = [size for _, size in moments]
    assert min(used) == 0
    assert max(used) > 5 * 5 * 4 * 81 * 4
    assert [when for when, _ in moments] == sorted(when for when, _ in moments)


def test_what_cannot_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no CUDA device" if not torch.cuda.is_available() else ""):
        capture("blocked", SMALL.with_(device="cuda"), tmp_path)


def test_the_worker_profiles_on_request(tmp_path: Path) -> None:
    worker = Worker(timeout_s=120)
    try:
        summary = worker.ask("profile", impl="conv1x1", case=SMALL.to_dict(), folder=str(tmp_path))
    finally:
        worker.close()
    assert summary["name"] == "conv1x1"
    assert (tmp_path / summary["trace"]).exists()


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(TraceError, match=r"a\.json is not a Chrome trace"):
        trace.read(tmp_path / "a.json", 1)


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_page_opens_offline_without_complaint_or_request(
    browser: Browser, profiled: tuple[Path, list[dict[str, Any]]], width: int, theme: str
) -> None:
    folder, _ = profiled
    browser.open(folder / "index.html", width, 2600, theme)
    browser.wait_for("return document.querySelectorAll('.chart svg.marks').length == 4")
    assert browser.ask("return document.querySelectorAll('#operators-table tbody tr').length") > 5
    assert browser.ask("return document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert browser.complaints() == []
    assert browser.requests() == []


def test_a_trace_of_onnx_runtime_is_read_in_the_same_form(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Softmax", ["c"], ["y"])],
        "graph",
        [helper.make_tensor_value_info(name, kind, [64, 64]) for name in "ab"],
        [helper.make_tensor_value_info("y", kind, [64, 64])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "ort")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    matrix = torch.rand(64, 64).numpy()
    for _ in range(3):
        session.run(None, {"a": matrix, "b": matrix})
    path = Path(session.end_profiling())
    operators = breakdown.operators(trace.read(path, 3))
    assert {o.name for o in operators} == {"MatMul", "Softmax"}
    assert all(o.count == 1 and o.self_s > 0 and "64×64" in o.shapes for o in operators)
    summary = {"name": "exported", "op": "local_attention", "summary": "", "index": 0, "calls": 3, "time_s": 1e-3}
    summary |= {"flops": {}, "stages": None, "trace": path.name}
    page = html(tmp_path, SMALL, [summary])
    assert "does not run as torch operators" in page
    assert "MatMul" in page


@pytest.mark.parametrize(("name", "expected"), [("onnx", {"MatMul", "Softmax"}), ("onnx_conv3x3", {"Conv"})])
def test_onnx_runtime_profiles_itself(name: str, expected: set[str], tmp_path: Path) -> None:
    from sasa_bench import impls

    if reason := impls.get(name).missing():
        pytest.skip(reason)
    summary = capture(name, SMALL, tmp_path)
    found = read(tmp_path, summary)
    operators = breakdown.operators(found)
    assert expected <= {operator.name for operator in operators}
    assert not any(operator.name.startswith("aten::") for operator in operators)
    assert all(operator.count == int(operator.count) for operator in operators), "calls that warm up are in the trace"
    runs = [length for _, length in found.ranges("model_run")]
    assert len(runs) == summary["calls"]
    inside = sum(operator.self_s for operator in operators) * summary["calls"]
    assert 0 < inside <= sum(runs) * 1e-6
    page = save(tmp_path, SMALL, [summary]).read_text()
    assert all(operator in page for operator in expected)


def test_an_implementation_may_write_its_own_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from sasa_bench import impls

    class Call:
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            self.tensors = tensors

        def __call__(self) -> torch.Tensor:
            return F.conv2d(self.tensors["x"], self.tensors["weight"], padding=1)

        def chrome_trace(self, path: Path, calls: int) -> None:
            event = {
                "ph": "X",
                "cat": "Node",
                "name": "n_kernel_time",
                "ts": 1,
                "dur": 2 * calls,
                "args": {"op_name": "Own"},
            }
            path.write_text(json.dumps([event]))

    own = replace(impls.get("conv3x3"), build=lambda case, tensors: Call(tensors))
    monkeypatch.setattr(impls, "get", lambda name: own)
    summary = capture("conv3x3", SMALL, tmp_path)
    (operator,) = breakdown.operators(read(tmp_path, summary))
    assert operator.name == "Own"
    assert operator.self_s == pytest.approx(2e-6)


VIEWS = {"Overview", "Operator", "Trace", "Memory"}
"""What the plugin shows of a profile of the CPU; its view of kernels appears where the trace has kernels of a GPU."""


def with_kernels(path: Path, out: Path) -> int:
    """The trace as if each operator of a call had launched a kernel on a GPU; returns how many it launched."""
    data = json.loads(path.read_text())
    operators = [e for e in data["traceEvents"] if e.get("cat") == "cpu_op" and "External id" in e.get("args", {})]
    for i, operator in enumerate(operators):
        launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": operator["pid"]}
        launch |= {"tid": operator["tid"], "ts": operator["ts"], "dur": operator["dur"] / 2}
        kernel = {"ph": "X", "cat": "kernel", "name": f"kernel_{i % 2}", "pid": 0, "tid": 7}
        kernel |= {"ts": operator["ts"] + operator["dur"] / 4, "dur": operator["dur"] / 4}
        known = {"External id": operator["args"]["External id"], "correlation": 10_000 + i, "device": 0}
        shape = {"grid": [4, 1, 1], "block": [64, 1, 1], "blocks per SM": 0.5, "est. achieved occupancy %": 25}
        data["traceEvents"] += [launch | {"args": known}, kernel | {"args": known | shape | {"stream": 7}}]
    out.parent.mkdir(parents=True)
    out.write_text(json.dumps(data))
    return len(operators)


@pytest.fixture
def tensorboard(profiled: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows the traces, and one with kernels as the run "gpu"."""
    for package in ("tensorboard", "torch_tb_profiler"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'sasa-bench[tensorboard]'")
    traces = tmp_path / "traces"
    shutil.copytree(profiled[0] / "traces", traces)
    assert with_kernels(traces / "conv3x3" / "conv3x3.pt.trace.json", traces / "gpu" / "gpu.pt.trace.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(traces), "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"
    server.terminate()
    server.wait()


def fetch(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as answer:
        content = answer.read()
    return json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


@pytest.mark.slow
def test_tensorboard_serves_its_views_of_the_traces(tensorboard: str) -> None:
    deadline = time.monotonic() + 90
    runs: list[str] = []
    while not {"blocked", "conv3x3", "gpu"} <= set(runs) and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            runs = fetch(f"{tensorboard}/runs")["runs"]
        time.sleep(0.3)
    assert {"blocked", "conv3x3", "gpu"} <= set(runs)
    assert set(fetch(f"{tensorboard}/views?run=blocked")) == VIEWS
    assert set(fetch(f"{tensorboard}/views?run=gpu")) == VIEWS | {"Kernel"}
    worker = fetch(f"{tensorboard}/workers?run=blocked&view=Overview")[0]
    span = fetch(f"{tensorboard}/spans?run=blocked&worker={worker}")[0]
    where = f"run=blocked&worker={worker}&span={span}"
    assert fetch(f"{tensorboard}/overview?{where}")["steps"]["rows"]
    assert fetch(f"{tensorboard}/operation/table?{where}&group_by=Operation")["data"]
    assert fetch(f"{tensorboard}/operation?{where}&group_by=Operation")
    assert fetch(f"{tensorboard}/trace?{where}")["traceEvents"]
    assert fetch(f"{tensorboard}/memory?{where}")
    assert fetch(f"{tensorboard}/memory_curve?{where}")
    worker = fetch(f"{tensorboard}/workers?run=gpu&view=Kernel")[0]
    span = fetch(f"{tensorboard}/spans?run=gpu&worker={worker}")[0]
    where = f"run=gpu&worker={worker}&span={span}"
    assert fetch(f"{tensorboard}/kernel?{where}&group_by=Kernel")
    table = fetch(f"{tensorboard}/kernel/table?{where}&group_by=Kernel")
    assert {row[0] for row in table["data"]["rows"]} == {"kernel_0", "kernel_1"}
    assert fetch(f"{tensorboard}/kernel/tc_pie?{where}")
