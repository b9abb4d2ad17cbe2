"""Builds the emulator around the CUDA source with g++ and runs kernels on it, in place of `nvrtc.Runtime`."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sasa_bench.impls import _nvrtc as nvrtc
from sasa_bench.impls.cuda import kernels, launch

HERE = Path(__file__).parent
Pick = Callable[[str, Sequence[kernels.Tunables]], kernels.Tunables]

BUILD = HERE.parents[1] / "build" / "cuda-emulator"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fsanitize-recover=all", "-g1")


def header_directories() -> list[str]:
    """Where NVIDIA's own cuda_fp16.h and what it includes lie."""
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    assert headers is not None, "install the test extra: pip install 'sasa-bench[cuda-check]'"
    return [headers, f"{headers}/cccl"]


def build(
    expressions: Iterable[str], sources: Mapping[str, str] | None = None, flags: Sequence[str] = ("-O1",)
) -> Path:
    """Compiles kernels, named by their template instances, into one shared library, unless done before.

    `sources` maps names, which `EmulatedRuntime` chooses from, to versions of the CUDA source.
    """
    chosen = sorted(set(expressions))
    texts = {"shipped": kernels.source()} if sources is None else dict(sources)
    emulator = (HERE / "emulator" / "emulator.h").read_text()
    parts = [COMPILER, emulator, *flags, *chosen, *texts, *texts.values()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = BUILD / f"{key}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, chosen, texts, flags)
    return library


def _compile(library: Path, chosen: list[str], texts: Mapping[str, str], flags: Sequence[str]) -> None:
    lines = ['#include "emulator.h"', "using Kernels = std::vector<emulator::Kernel>;"]
    calls = []
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        for number, (name, text) in enumerate(texts.items()):
            (Path(scratch) / f"source{number}.cu").write_text(text)
            space = f"namespace source{number} " if len(texts) > 1 else ""
            lines += [space + "{"] if space else []
            lines += [f'#include "source{number}.cu"', f"void add{number}(Kernels& kernels) {{"]
            for expression in chosen:
                threads = "SUM_COLUMNS * SUM_ROWS"
                if "Plan<" in expression:
                    threads = expression[expression.index("<") + 1 : -1] + "::THREADS"
                entry = f'emulator::kernel("{name} {expression}", {threads}, &{expression})'
                lines.append(f"    kernels.push_back({entry});")
            lines.append("}}" if space else "}")
            calls.append(f"{f'source{number}::' if space else ''}add{number}(kernels);")
        lines += ["Kernels emulated_kernels() {", "Kernels kernels;", *calls, "return kernels;", "}"]
        main, made = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        main.write_text("\n".join([*lines, ""]))
        includes = [f"-I{path}" for path in (HERE / "emulator", *header_directories())]
        command = [COMPILER, "-std=c++20", "-w", "-fPIC", "-shared", "-ffp-contract=off", *flags, *includes]
        done = subprocess.run([*command, str(main), "-o", str(made), "-ldl"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(made, library)


class Buffer(ctypes.Structure):
    """A piece of memory that a launch may touch."""

    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_longlong))


def extent(t: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor, which may be a part of another one."""
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (steps + 1) * t.element_size() if t.numel() else 0


def fake_driver(folder: Path) -> dict[str, str]:
    """Builds the FAKE libcuda in a folder; the environment of a process that loads it."""
    source = HERE / "fake_driver" / "fake_driver.cpp"
    includes = [f"-I{path}" for path in header_directories()]
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", *includes]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "SASA_BENCH_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1]))),
    }


def first(key: str, candidates: Sequence[kernels.Tunables]) -> kernels.Tunables:
    """The default among candidate tunables."""
    return candidates[0]


class Forgetful:
    """Remembers no plan, so that another pick takes effect at once."""

    @property
    def plans(self) -> dict[Any, Any]:
        return {}


class EmulatedRuntime(Forgetful):
    """Runs launches in the emulator and collects what it reports.

    Args:
        library: built by `build`.
        order: threads of a block in ascending (0), descending (1) or, with this seed, shuffled order.
        pick: chooses among candidate tunables; the default takes the first.
        name: of the version of the CUDA source to run.
    """

    def __init__(
        self,
        library: Path,
        order: int = 0,
        pick: Pick = first,
        name: str = "shipped",
    ) -> None:
        self.name = name
        self.run = ctypes.CDLL(str(library)).emulator_launch
        self.order = order
        self.pick = pick
        self.violations: list[str] = []

    def launch(self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]) -> None:
        values: list[ctypes.c_void_p | ctypes.c_int] = []
        buffers = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                buffers.append(Buffer(argument.data_ptr(), extent(argument)))
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        text = ctypes.create_string_buffer(4096)
        known = (Buffer * len(buffers))(*buffers)
        name = f"{self.name} {expression}".encode()
        found = self.run(name, grid, block, pointers, known, len(buffers), self.order, text, len(text))
        assert found >= 0, f"{expression} is not in this library"
        self.violations += [f"{expression}: {line}" for line in text.value.decode().splitlines()]

    def choose(
        self, source: str, key: str, candidates: Sequence[kernels.Tunables], run: Callable[[kernels.Tunables], None]
    ) -> kernels.Tunables:
        return self.pick(key, candidates)


class RecordingRuntime(Forgetful):
    """Launches nothing and remembers which kernels would run, so that they can be built together."""

    def __init__(self, pick: Pick = first) -> None:
        self.expressions: set[str] = set()
        self.pick = pick

    def launch(self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]) -> None:
        self.expressions.add(expression)

    def choose(
        self, source: str, key: str, candidates: Sequence[kernels.Tunables], run: Callable[[kernels.Tunables], None]
    ) -> kernels.Tunables:
        return self.pick(key, candidates)


def run_forward(runtime: Any, q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """y and log2_sum of q, k, v, rel_row, rel_col, kernel_size, heads, zero_border."""
    *inputs, kernel_size, heads, zero_border = rest
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    log2_sum = torch.empty((q.shape[0], heads, *q.shape[2:]))
    launch.run_forward(runtime, q, *inputs, y, log2_sum, kernel_size, heads, zero_border)
    return y, log2_sum


def run_backward(runtime: Any, dy: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    """Gradients of q, k, v, rel_row, rel_col; the last two are empty without positions."""
    (q, k, v, rel_row, rel_col), axes = rest[:5], rest[-3:]
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    made += [None if t is None else torch.empty_like(t) for t in (rel_row, rel_col)]
    launch.run_backward(runtime, dy, *rest[:-3], *made, *axes)
    return [q.new_empty(0) if t is None else t for t in made]
