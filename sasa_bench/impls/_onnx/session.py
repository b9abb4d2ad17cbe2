"""A model in ONNX Runtime: which provider runs it, with which options, bound to the memory of torch tensors."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls._onnx.export import OPSET
from sasa_bench.impls._onnx.graph import element_types, node_count
from sasa_bench.ops.tensors import IMAGES, Tensors
from sasa_bench.results.environment import KEEP_MODELS
from sasa_bench.results.fields import first_line

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SESSION_CONFIG = {"session.force_spinning_stop": "1"}
"""Worker threads spin between the nodes of a graph, and stop when a run ends. By default they spin on for a while, and
take the cores from whatever runs next in the process: with five sessions taking turns on two cores a run of 3.4 ms took
13 ms."""


def missing() -> str | None:
    """None, or the Python packages that are not installed and the command that installs them."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install {' '.join(absent)}" if absent else None


class Session:
    """A loaded model with its inputs bound to the memory of torch tensors; a call runs it and returns y [B, C, H, W].

    y is the same memory in every call. `figures` are the row's own columns, see `export` and `load`. `profiled` loads
    the model once more, with the runtime's profiler on, which writes to a file that begins with its argument.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Tensors,
        y: Tensor,
        figures: dict[str, Any],
        profiled: Callable[[str], onnxruntime.InferenceSession],
    ):
        self.session, self.inputs, self.y, self.figures, self.profiled = session, inputs, y, figures, profiled
        self.binding = self._bind(session)

    def _bind(self, session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
        binding = session.io_binding()
        kinds = element_types()
        for name, tensor in (*self.inputs.items(), ("y", self.y)):
            bind = binding.bind_output if tensor is self.y else binding.bind_input
            bind(name, tensor.device.type, 0, kinds[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        return binding

    def __call__(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return self.y

    def chrome_trace(self, path: Path, calls: int) -> None:
        """Write the runtime's own profile of `calls` calls, after as many that warm up; see profile.capture."""
        with tempfile.TemporaryDirectory() as scratch:
            session = self.profiled(f"{scratch}/profile")
            binding = self._bind(session)
            for _ in range(2 * calls):
                session.run_with_iobinding(binding)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
        kept = [event for event in events if event["ts"] >= starts[-calls]]
        path.write_text(json.dumps({"traceEvents": kept, "displayTimeUnit": "ms"}), encoding="utf-8")


def unsupported(case: Case) -> str | None:
    """Why ONNX Runtime, where it is installed, cannot run a case on this machine."""
    if missing():
        return None
    import onnxruntime

    provider, there = PROVIDERS[case.device], onnxruntime.get_available_providers()
    if provider not in there:
        hint = "; for NVIDIA GPUs: pip install onnxruntime-gpu" if case.device == "cuda" else ""
        return f"ONNX Runtime {onnxruntime.__version__} has no {provider} here, it has {', '.join(there)}{hint}"
    return _no_kernels(provider, "float32" if case.dtype == "tf32" else case.dtype)


@cache
def _no_kernels(provider: str, dtype: str) -> str | None:
    """Why a provider cannot run a matrix product and a softmax in a dtype, found by loading a model of these two."""
    import onnx
    import onnxruntime
    from onnx import helper

    kind = getattr(onnx.TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper()))
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Softmax", ["c"], ["y"])]
    a, b, y = (helper.make_tensor_value_info(name, kind, [4, 4]) for name in "aby")
    graph = helper.make_graph(nodes, "probe", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception as error:
        return f"ONNX Runtime {onnxruntime.__version__} cannot run {dtype} on {provider}: {first_line(error)}"
    return None


def load(
    name: str,
    model: onnx.ModelProto,
    case: Case,
    tensors: Tensors,
    figures: dict[str, Any],
    library: str | None = None,
) -> Session:
    """The model in ONNX Runtime, bound to `tensors` and to an output that is not yet written.

    Adds the figures session_s, seconds to load and optimise, and optimised_node_count. The model is kept in the folder
    that KEEP_MODELS names. Raises RuntimeError where the provider asked for is not the one that runs.
    """
    import onnx
    import onnxruntime

    content = model.SerializeToString()
    if folder := os.environ.get(KEEP_MODELS):
        path = Path(folder) / f"{name}-{case.describe().replace(' ', '-').replace('=', '_')}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    provider = PROVIDERS[case.device]
    started = time.perf_counter()

    def start(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        if library:
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(content, options, providers=[_provider(case)])

    def profiled(prefix: str) -> onnxruntime.InferenceSession:
        options = session_options(case)
        options.enable_profiling = True
        options.profile_file_prefix = prefix
        return start(options)

    with tempfile.TemporaryDirectory() as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        options = session_options(case)
        options.optimized_model_filepath = str(optimised)
        session = start(options)
        figures["session_s"] = time.perf_counter() - started
        figures["optimised_node_count"] = node_count(onnx.load(optimised, load_external_data=False).graph)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime fell back from {provider} to {session.get_providers()[0]}")
    inputs = {key: tensors[key] for key in IMAGES if key in tensors}
    return Session(session, inputs, torch.empty_like(next(iter(inputs.values()))), figures, profiled)


def session_options(case: Case) -> onnxruntime.SessionOptions:
    """One pool of as many threads as torch has, no arena: intermediates come from the heap, as torch's do, so that
    the peak of a call is what the call needs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return options


def _provider(case: Case) -> str | tuple[str, dict[str, str]]:
    if case.device == "cuda":
        return PROVIDERS["cuda"], {
            "user_compute_stream": str(torch.cuda.current_stream().cuda_stream),
            "use_tf32": str(int(case.dtype == "tf32")),
        }
    return PROVIDERS[case.device]
