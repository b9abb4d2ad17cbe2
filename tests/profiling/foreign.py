"""Traces of programs that are none of this package's, and what their own profiler says of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function, schedule

Sums = dict[str, tuple[float, float]]
"""Operator -> seconds by itself and in all."""


def sums(profiler: profile) -> Sums:
    """What key_averages() says of operators."""
    events = profiler.key_averages()
    return {e.key: (e.self_cpu_time_total * 1e-6, e.cpu_time_total * 1e-6) for e in events if "::" in e.key}


def _transformer(path: Path) -> Sums:
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).train()
    x = torch.randn(4, 32, 64)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        for _ in range(3):
            block(x)
    profiler.export_chrome_trace(str(path))
    return sums(profiler)


def _annotated(path: Path) -> Sums:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3))
    x = torch.randn(4, 3, 32, 32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(4):
            with record_function("inference"), torch.no_grad():
                model(x)
    profiler.export_chrome_trace(str(path))
    return sums(profiler)


def _training_with_two_threads(path: Path) -> Sums:
    """Data are made by a second thread."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters())

    def feed() -> None:
        for _ in range(5):
            torch.randn(64, 64).softmax(-1)

    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, experimental_config=every
    ) as profiler:
        thread = threading.Thread(target=feed)
        thread.start()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,))).backward()
            optimizer.step()
        thread.join()
    profiler.export_chrome_trace(str(path))
    return sums(profiler)


def _stepped_with_stacks(path: Path) -> Sums:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32))
    plan = schedule(wait=1, warmup=1, active=3, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_stack=True, schedule=plan) as profiler:
        for _ in range(5):
            model(torch.randn(16, 32)).sum().backward()
            profiler.step()
    profiler.export_chrome_trace(str(path))
    return sums(profiler)


def _attention(path: Path) -> Sums:
    q, k, v = torch.randn(3, 2, 4, 48, 16).unbind(0)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v)
            torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1) @ v
    profiler.export_chrome_trace(str(path))
    return sums(profiler)


def _onnx_runtime(path: Path) -> Sums:
    import onnx
    import onnxruntime

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
    options.profile_file_prefix = str(path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, {name: torch.rand(64, 64).numpy() for name in "ab"})
    Path(session.end_profiling()).rename(path)
    return {}


TRACES: dict[str, Callable[[Path], Sums]] = {
    "a transformer block": _transformer,
    "a network with annotations": _annotated,
    "training with two threads": _training_with_two_threads,
    "steps with stacks": _stepped_with_stacks,
    "attention": _attention,
    "ONNX Runtime": _onnx_runtime,
}
"""Name -> writes the trace to a path and returns what its profiler says; nothing where it says nothing."""
