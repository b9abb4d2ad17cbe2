"""Export to ONNX with torch.onnx and run in ONNX Runtime: what every exported implementation shares.

The images (x, or q, k and v) are the graph's inputs. Every parameter is an initialiser, as in a file that is deployed:
ONNX Runtime may fold what depends on parameters alone and pack weights once, while the PyTorch implementations get
their parameters as tensors in every call.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sasa_bench.case import Case
from sasa_bench.impls import Attend, Impl, layers_only
from sasa_bench.ops.tensors import IMAGES, LOCAL_ATTENTION, Op, Tensors, project
from sasa_bench.results.environment import EXPORTS, KEEP_MODELS

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Function = Callable[[Tensors], Tensor]
"""Inputs and parameters by name -> y [B, C, H, W]."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
"""Every operator of these graphs has had its present form since then; an older runtime loads more files."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SESSION_CONFIG = {"session.force_spinning_stop": "1"}
"""Worker threads spin between the nodes of a graph, and stop when a run ends. By default they spin on for a while, and
take the cores from whatever runs next in the process: with five sessions taking turns on two cores a run of 3.4 ms took
13 ms."""


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


class _Module(nn.Module):
    """`function` as a module: the images are its arguments, the rest are its parameters."""

    def __init__(self, function: Function, tensors: Tensors) -> None:
        super().__init__()
        self.function = function
        self.images = [name for name in tensors if name in IMAGES]
        self.others = [name for name in tensors if name not in IMAGES]
        for name in self.others:
            self.register_buffer(name, tensors[name].detach())

    def forward(self, *images: Tensor) -> Tensor:
        named = dict(zip(self.images, images, strict=True))
        return self.function(named | {name: self.get_buffer(name) for name in self.others})


def missing() -> str | None:
    """None, or the Python packages that are not installed and the command that installs them."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install {' '.join(absent)}" if absent else None


def exported(
    name: str,
    summary: str,
    op: Op,
    function: Callable[[Case], Function],
    *,
    exports: str,
    dynamic: bool = False,
    computes: Callable[[Case], Case] = lambda case: case,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
) -> Impl:
    """An implementation that exports `function(case)` to ONNX and runs it in ONNX Runtime, forward only.

    `exports` names the implementation that computes the same function in PyTorch. `dynamic` leaves batch, height and
    width open in the file; else they are those of the case. `library` gives the path of the custom operators that the
    graph contains, if any.
    """

    def build(case: Case, tensors: Tensors) -> Session:
        model, figures = _exported_once(name, case, tensors, lambda: export(function(case), case, tensors, dynamic))
        return load(name, model, case, tensors, figures, library() if library else None)

    def able(case: Case) -> str | None:
        if reason := layers_only(case):
            return reason
        if case.mode != "forward":
            return "ONNX Runtime runs the forward pass only"
        return supports(case) or _unsupported(case)

    return Impl(
        name=name,
        op=op,
        summary=summary,
        build=build,
        supports=able,
        missing=missing,
        computes=computes,
        quick=False,
        exports=exports,
        any_size=dynamic,
        library=library is not None,
    )


def exported_attention(
    name: str,
    summary: str,
    attend: Callable[[Case], Attend],
    *,
    exports: str,
    dynamic: bool = False,
    supports: Callable[[Case], str | None] = lambda case: None,
    missing: Callable[[], str | None] = missing,
    library: Callable[[], str] | None = None,
) -> Impl:
    """Local attention exported from its core, at both scopes; see `exported`.

    With `dynamic`, the core must take its sizes from its arguments. Absolute embeddings have the size of one map, and
    there is no dynamic layer with them.
    """

    def able(case: Case) -> str | None:
        if dynamic and case.position == "absolute" and case.scope == "layer":
            return "absolute embeddings have the size of one map: there is no model of every size with them"
        return supports(case)

    return exported(
        name,
        summary,
        LOCAL_ATTENTION,
        lambda case: attention_function(case, attend),
        exports=exports,
        dynamic=dynamic,
        supports=able,
        missing=missing,
        library=library,
    )


def attention_function(case: Case, attend: Callable[[Case], Attend]) -> Function:
    """Projections, at scope "layer", and core."""
    core = attend(case)
    return lambda tensors: core(*project(case, tensors), tensors.get("rel_row"), tensors.get("rel_col"))


def _unsupported(case: Case) -> str | None:
    """Why ONNX Runtime, where it is installed, cannot run a case on this machine."""
    if missing():
        return None
    import onnxruntime

    provider, there = PROVIDERS[case.device], onnxruntime.get_available_providers()
    if provider not in there:
        hint = "; for NVIDIA GPUs: pip install onnxruntime-gpu" if case.device == "cuda" else ""
        return f"ONNX Runtime {onnxruntime.__version__} has no {provider} here, it has {', '.join(there)}{hint}"
    return _no_kernels(provider, case.dtype)


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
        said = str(error).strip().splitlines()[0]
        return f"ONNX Runtime {onnxruntime.__version__} cannot run {dtype} on {provider}: {said}"
    return None


def export(
    function: Function, case: Case, tensors: Tensors, dynamic: bool = False
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model of `function` and its figures.

    Figures: export_s, seconds of torch.onnx.export; model_bytes, size of the file; node_count of the file; and, for a
    model of one size and standard operators, graph_flops by `graph_flops`. Raises RuntimeError where the export fails.
    """
    module = _Module(function, tensors).eval()
    images = tuple(tensors[name] for name in module.images)
    shapes = None
    if dynamic:
        # A dimension of 1, or two of one size, would be taken for constants; any other example gives the same graph.
        images = tuple(torch.zeros(3, case.channels, 9, 11, dtype=t.dtype, device=t.device) for t in images)
        axes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        shapes = (tuple(axes for _ in images),)
    started = time.perf_counter()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                images,
                dynamo=True,
                opset_version=OPSET,
                input_names=module.images,
                output_names=["y"],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise RuntimeError(f"torch.onnx.export failed, torch {torch.__version__}: {cause}") from error
    assert program is not None
    figures: dict[str, Any] = {"export_s": time.perf_counter() - started}
    model = program.model_proto
    figures["model_bytes"] = model.ByteSize()
    figures["node_count"] = node_count(model.graph)
    if not dynamic and all(node.domain in ("", "ai.onnx") for node in nodes_of(model.graph)):
        figures["graph_flops"] = graph_flops(model)
    return model, figures


def _exported_once(
    name: str, case: Case, tensors: Tensors, make: Callable[[], tuple[onnx.ModelProto, dict[str, Any]]]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """What `make` gives, or what it gave a process that shares the folder EXPORTS, for the same case and parameters."""
    folder = os.environ.get(EXPORTS)
    if not folder:
        return make()
    import onnx

    contents = hashlib.sha256(repr((name, case, torch.__version__, onnx.__version__)).encode())
    for key, tensor in tensors.items():
        if key not in IMAGES:
            contents.update(key.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    path = Path(folder) / f"{name}-{contents.hexdigest()[:16]}.onnx"
    figures = path.with_suffix(".json")
    if figures.exists():
        return onnx.load(path), json.loads(figures.read_text(encoding="utf-8"))
    model, found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, model.SerializeToString()), (figures, json.dumps(found).encode())):
        scratch = target.with_name(f"{os.getpid()}-{target.name}")
        scratch.write_bytes(content)
        scratch.replace(target)
    return model, found


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
        return PROVIDERS["cuda"], {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    return PROVIDERS[case.device]


def element_types() -> dict[torch.dtype, int]:
    """torch dtype -> ONNX's number for it."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
    }


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def node_count(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of its subgraphs."""
    return sum(1 for _ in nodes_of(graph))


ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
REDUCTIONS = ("ReduceSum", "ReduceMean")


def graph_flops(model: onnx.ModelProto) -> int:
    """Operations that a graph of one size asks for, in the convention of the cost model.

    A multiply and an add are two; softmax, comparisons, copies, and work on integers count nothing. MatMul of
    [.., M, K] and [.., K, N]: 2 M K N each; Conv: 2 for each weight of a filter and output scalar; an elementwise
    operation: 1 for each output scalar; a sum: 1 for each input scalar. Nodes that depend on constants alone count
    nothing. Raises ValueError for a shape that is not known, or for an operator that multiplies and has no rule here.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = inferred.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    floating = {t.name for t in graph.initializer if t.data_type in element_types().values()}
    constant = {t.name for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        if kind.elem_type in element_types().values():
            floating.add(value.name)

    def size(name: str) -> int:
        if name not in shapes or -1 in shapes[name]:
            raise ValueError(f"the shape of {name!r} is not known: count the FLOPs of a model of one size")
        return math.prod(shapes[name])

    total = 0
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant |= set(node.output)
        elif node.op_type in ("MatMul", "Conv"):
            first, second = node.input[:2]
            size(first)
            depth = shapes[first][-1] if node.op_type == "MatMul" else math.prod(shapes[second][1:])
            total += 2 * depth * size(node.output[0])
        elif node.op_type in ("Gemm", "Einsum", "Attention", "ConvTranspose"):
            raise ValueError(f"no rule for the FLOPs of {node.op_type}: add one to graph_flops")
        elif node.output[0] in floating and node.op_type in ELEMENTWISE:
            total += size(node.output[0])
        elif node.output[0] in floating and node.op_type in REDUCTIONS:
            total += size(node.input[0])
    return total
