"""Builds the emulator around the CUDA source with g++ and runs kernels on it, in place of `nvrtc.Runtime`."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from sasa_bench import nvrtc
from sasa_bench.impls import cuda

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "cuda-emulator"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def header_directories() -> list[str]:
    """Where NVIDIA's own cuda_fp16.h and what it includes lie."""
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    assert headers is not None, "install the test extra: pip install 'sasa-bench[cuda-check]'"
    return [headers, f"{headers}/cccl"]


def build(expressions: Iterable[str], source: str | None = None, flags: Sequence[str] = ("-O1",)) -> Path:
    """Compiles kernels, named by their template instances, into one shared library, unless done before."""
    chosen = sorted(set(expressions))
    text = cuda.source() if source is None else source
    emulator = (HERE / "emulator" / "emulator.h").read_text()
    key = hashlib.sha256("\0".join([COMPILER, text, emulator, *flags, *chosen]).encode()).hexdigest()[:24]
    library = BUILD / f"{key}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, chosen, text, flags)
    return library


def _compile(library: Path, chosen: list[str], text: str, flags: Sequence[str]) -> None:
    scratch = library.with_suffix("")
    scratch.mkdir(exist_ok=True)
    (scratch / "kernels.cu").write_text(text)
    entries = []
    for expression in chosen:
        threads = "SUM_COLUMNS * SUM_ROWS"
        if "Plan<" in expression:
            threads = expression[expression.index("<") + 1 : -1] + "::THREADS"
        entries.append(f'    emulator::kernel("{expression}", {threads}, &{expression}),')
    main = [
        '#include "emulator.h"',
        '#include "kernels.cu"',
        "const std::vector<emulator::Kernel> emulated_kernels = {",
    ]
    (scratch / "kernels.cpp").write_text("\n".join([*main, *entries, "};\n"]))
    includes = [f"-I{path}" for path in (HERE / "emulator", scratch, *header_directories())]
    command = [COMPILER, "-std=c++20", "-w", "-fPIC", "-shared", "-ffp-contract=off", *flags, *includes]
    made = subprocess.run(
        [*command, str(scratch / "kernels.cpp"), "-o", str(scratch / "kernels.so"), "-ldl"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-4000:]
    os.replace(scratch / "kernels.so", library)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()


class Buffer(ctypes.Structure):
    """A piece of memory that a launch may touch."""

    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_longlong))


Pick = Callable[[str, Sequence[cuda.Tunables]], cuda.Tunables]


def first(key: str, candidates: Sequence[cuda.Tunables]) -> cuda.Tunables:
    """The default among candidate tunables."""
    return candidates[0]


class EmulatedRuntime:
    """Runs launches in the emulator and collects what it reports.

    Args:
        library: built by `build`.
        order: threads of a block in ascending (0), descending (1) or, with this seed, shuffled order.
        pick: chooses among candidate tunables; the default takes the first.
    """

    def __init__(
        self,
        library: Path,
        order: int = 0,
        pick: Pick = first,
    ) -> None:
        self.run = ctypes.CDLL(str(library)).emulator_launch
        self.order = order
        self.pick = pick
        self.violations: list[str] = []

    def launch(
        self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]
    ) -> None:
        values: list[ctypes.c_void_p | ctypes.c_int] = []
        buffers = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                buffers.append(Buffer(argument.data_ptr(), argument.numel() * argument.element_size()))
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        text = ctypes.create_string_buffer(4096)
        found = self.run(
            expression.encode(), grid, block, pointers, (Buffer * len(buffers))(*buffers), len(buffers),
            self.order, text, len(text),
        )  # fmt: skip
        assert found >= 0, f"{expression} is not in this library"
        self.violations += [f"{expression}: {line}" for line in text.value.decode().splitlines()]

    def choose(
        self, key: str, candidates: Sequence[cuda.Tunables], run: Callable[[cuda.Tunables], None]
    ) -> cuda.Tunables:
        return self.pick(key, candidates)


class RecordingRuntime:
    """Launches nothing and remembers which kernels would run, so that they can be built together."""

    def __init__(self, pick: Pick = first) -> None:
        self.expressions: set[str] = set()
        self.pick = pick

    def launch(
        self, source: str, expression: str, grid: int, block: int, arguments: Sequence[nvrtc.Argument]
    ) -> None:
        self.expressions.add(expression)

    def choose(
        self, key: str, candidates: Sequence[cuda.Tunables], run: Callable[[cuda.Tunables], None]
    ) -> cuda.Tunables:
        return self.pick(key, candidates)
