"""Every environment variable that sasa-bench sets, reads or records, in one place."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from sasa_bench.case import UserError
from sasa_bench.results.fields import printable

WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}
"""The same for every implementation. OpenMP threads spin for about 0.2 ms between parallel regions, then sleep: a
sleeping thread costs a wake-up of 0.1 ms or more in a virtual machine, as much as a small kernel, and one that spins on
takes a core from the threads of another library that runs next. The allocator keeps its heap, so that page faults are
not timed, and has one for all threads, so that the whole of it can be trimmed before memory is measured."""

OLD_GLIBC = (2, 35)
"""Before it, glibc refuses an mmap threshold of more than 32 MiB and, as the other two settings freeze the threshold,
maps and unmaps every buffer of 128 KiB or more in each call. Without mmap altogether it keeps its heap there too."""
WITHOUT_MMAP = {"MALLOC_MMAP_MAX_": "0"}

KEEP_MODELS = "SASA_BENCH_KEEP_MODELS"
"""Environment variable of a worker: the folder where models that were exported are kept; without it, none are."""

EXPORTS = "SASA_BENCH_EXPORTS"
"""Environment variable of a worker: a folder of exported models that processes share which run the same code; what is
there is not exported again. Without it, every build exports."""

SET = {
    "GOMP_SPINCOUNT": "OpenMP threads wait 0.2 ms before they sleep",
    "MALLOC_ARENA_MAX": "all threads share one heap, so that the whole of it is trimmed before memory is measured",
    "MALLOC_MMAP_THRESHOLD_": "the allocator keeps its heap, so that page faults are not timed",
    "MALLOC_TRIM_THRESHOLD_": "the same",
    "MALLOC_TOP_PAD_": "the same",
    "MALLOC_MMAP_MAX_": "the same, where glibc is older than 2.35",
    "SASA_BENCH_PADDING": "the gate moves the stack of each process by a random length, in its arms only",
}
"""Variable -> what sasa-bench sets it for, in its workers."""

READ = {
    "SASA_BENCH_ISA": "the build of the native kernels; the best that the processor has",
    "SASA_BENCH_CACHE": "folder of compiled kernels and of what was tuned; below XDG_CACHE_HOME or ~/.cache",
    "SASA_BENCH_TUNE": "whether CUDA kernels are tuned at their first use",
    KEEP_MODELS: "folder where exported models are kept; `run --keep-models` sets it",
    EXPORTS: "folder of exported models that processes share; `run` and the gate set it",
    "CXX": "compiler of the native kernels",
    "CC": "compiler with which Triton builds its launcher",
    "ONNXRUNTIME_INCLUDE_DIR": "headers of ONNX Runtime, for its custom operators",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are",
}
"""Variable -> what sasa-bench reads it for, and what holds without it."""

SPOILING = {
    "LD_PRELOAD": "another allocator or library is timed along",
    "LD_AUDIT": "the loader reports every call between libraries",
    "MALLOC_PERTURB_": "the allocator fills every block that it hands out",
    "MALLOC_CHECK_": "the allocator checks every block",
    "PYTHONDEVMODE": "Python checks itself",
    "PYTHONMALLOC": "Python has another allocator",
    "PYTHONTRACEMALLOC": "Python traces every block of memory",
    "ONEDNN_VERBOSE": "every call prints a line",
    "DNNL_VERBOSE": "every call prints a line",
    "MKL_VERBOSE": "every call prints a line",
    "CUDA_LAUNCH_BLOCKING": "every launch waits for the GPU",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
}
"""Variable -> how it makes measurements slower than those of other users; recorded as well."""

RECORDED = SPOILING | {
    "OMP_": "threads of OpenMP: their number, places and waiting",
    "GOMP_": "the same, of GNU's OpenMP",
    "KMP_": "the same, of LLVM's and Intel's OpenMP",
    "MKL_": "threads and instruction set of MKL",
    "ONEDNN_": "instruction set and caches of oneDNN",
    "DNNL_": "the same",
    "OPENBLAS_": "threads of OpenBLAS",
    "ATEN_": "instruction set of torch",
    "TORCH_": "switches of torch",
    "PYTORCH_": "switches of torch, such as its CUDA allocator",
    "MALLOC_": "the allocator of glibc",
    "GLIBC_TUNABLES": "the same, and memory functions",
    "CUDA_": "which GPUs there are, and whether launches wait",
    "CUBLAS_": "workspace of cuBLAS",
    "NVIDIA_TF32_OVERRIDE": "whether float32 products run in TF32",
    "SASA_BENCH_ISA": "the build of the native kernels",
    "CXX": "compiler of the native kernels",
}
"""Variable, or how its name begins -> what it changes. Results files say what was set of these, and files of different
settings are compared only with a word about it."""

PATHS = ("TORCH_EXTENSIONS_DIR", "TORCH_HOME", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "MKL_ROOT", "MKLROOT")
"""Recorded by no file: they say where things lie, not how fast they are."""

PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY")
"""Bind threads unless OMP_PROC_BIND is false."""
BINDING = ("OMP_PROC_BIND", *PLACES, "KMP_AFFINITY")
"""Bind the first thread of a process to one core as soon as OpenMP is loaded; other libraries then see one core."""
UNBOUND = {"false", "disabled", "none", ""}
"""Words of BINDING that bind nothing."""


class UnfitEnvironmentError(UserError):
    """A variable that makes measurements meaningless; the message names it and says what to do."""


def spoiling(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable of SPOILING that is set and not off."""
    return [
        f"{name}={printable(value)}: {effect}; unset it"
        for name, effect in SPOILING.items()
        if (value := environment.get(name, "").strip()).lower() not in ("", "0", "false", "default")
    ]


def worker_environment(glibc: tuple[int, int] | None = None) -> dict[str, str]:
    """What workers are given, on this version of glibc; None: the one at hand."""
    version = glibc or glibc_version()
    return WORKER_ENVIRONMENT | (WITHOUT_MMAP if version and version < OLD_GLIBC else {})


def glibc_version() -> tuple[int, int] | None:
    """(2, 36) for example; None where the C library is another."""
    try:
        function = ctypes.CDLL(None).gnu_get_libc_version
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_char_p
    major, minor = function().decode().split(".")[:2]
    return int(major), int(minor)


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables in `environment` that change measurements, on one line each."""
    return {
        name: printable(value)
        for name, value in sorted(environment.items())
        if name not in PATHS
        and any(name == known or (known[-1] == "_" and name.startswith(known)) for known in RECORDED)
    }


def require_free_threads(environment: Mapping[str, str]) -> None:
    """Raise UnfitEnvironmentError where OpenMP may not run the threads that a case asks for on all cores."""
    free = PLACES if environment.get("OMP_PROC_BIND", "").lower() == "false" else ()
    for name in BINDING:
        if name not in free and not UNBOUND.intersection(environment.get(name, "").lower().split(",")):
            raise UnfitEnvironmentError(
                f"{name}={environment[name]} binds a process to one core as soon as OpenMP is loaded, and whatever is "
                f"measured then runs there: unset {name}; `taskset --cpu-list 0-3` chooses cores for everything"
            )
    limit = environment.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdecimal() and int(limit) < (os.cpu_count() or 1):
        raise UnfitEnvironmentError(
            f"OMP_THREAD_LIMIT={limit} gives a process {limit} threads at most, whatever a case asks for: unset "
            "OMP_THREAD_LIMIT; -c threads= sets their number"
        )
    if environment.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        raise UnfitEnvironmentError(
            f"OMP_DYNAMIC={environment['OMP_DYNAMIC']} gives a process fewer threads while others compute: unset "
            "OMP_DYNAMIC; -c threads= sets their number"
        )


EXTRAS = {
    "cuda": "'sasa-bench[cuda]'",
    "onnx": "'sasa-bench[onnx]'",
    "onnxruntime": "'sasa-bench[onnx]'",
    "onnxscript": "'sasa-bench[onnx]'",
    "pyarrow": "'sasa-bench[parquet]'",
    "ruptures": "'sasa-bench[history]'",
    "sklearn": "'sasa-bench[accuracy]'",
    "submitit": "'sasa-bench[slurm]'",
    "torch": "torch (`table`, `report`, `history` and `merge` do without it)",
}
"""What brings a module that only some commands need: module -> what to give pip install."""


def absent(error: ImportError) -> str | None:
    """The sentence for a package that is not installed, with the command that installs it; None for other errors."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module in ("", "sasa_bench"):
        return None
    return f"{module} is not installed, which this needs: pip install {EXTRAS.get(module, module)}"
