"""`fused`: local self-attention as one native CPU kernel, compiled on this machine at first use.

The operator is eq. 2 and 4 of Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models":
softmax over the window of q.k + q.r, times v, without a 1/sqrt(d). `csrc/local_attention.h` holds the
kernels and says how they work, `csrc/fused.cpp` the torch operators `sasa_bench::fused_*` around them,
docs/fused.md what was measured.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sasa_bench.case import Case
from sasa_bench.impls import Core, Window, _flops, local_attention

CSRC = Path(__file__).parent / "csrc"

AVX512 = ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma")

# Instruction sets from the most to the least capable: compiler flags, and the processor flags they need.
ISAS = {
    # Vectors of 512 bits. No flag says that there are two units for their products; avx512_fp16 stands for it.
    "avx512_wide": (["-DSASA_WIDE", *(f"-m{flag}" for flag in AVX512)], {*AVX512, "avx512_fp16"}),
    "avx512": ([f"-m{flag}" for flag in AVX512], set(AVX512)),
    "avx2": (["-mavx2", "-mfma"], {"avx2", "fma"}),
    "portable": ([], set()),
}


@cache
def _cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this processor, from /proc/cpuinfo; empty where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def executable_isas() -> list[str]:
    """The builds of the kernel that this machine can run, the fastest first."""
    return [isa for isa, (_, needed) in ISAS.items() if needed <= _cpu_flags()]


def chosen_isa() -> str:
    """The build that `load` uses: SASA_BENCH_ISA where it is set, else the fastest that this machine can run.

    Raises ValueError for a name that is not a build, RuntimeError for a build that this machine cannot run.
    """
    runnable = executable_isas()
    isa = os.environ.get("SASA_BENCH_ISA") or runnable[0]
    if isa not in ISAS:
        raise ValueError(f"SASA_BENCH_ISA={isa} is not a build; choose one of {', '.join(ISAS)}, or unset it")
    if isa not in runnable:
        lacking = ", ".join(sorted(ISAS[isa][1] - _cpu_flags()))
        raise RuntimeError(
            f"SASA_BENCH_ISA={isa} needs {lacking}, which this processor lacks; "
            f"choose one of {', '.join(runnable)}, or unset it"
        )
    return isa


def _source_and_flags(part: str) -> tuple[Path, list[str]]:
    common = ["-std=c++20", "-Wno-psabi", "-Wno-ignored-attributes"]
    if part == "operators":
        # Without -fopenmp at::parallel_for is a serial loop. The runtime is the one that torch has loaded.
        return CSRC / "fused.cpp", [*common, "-O2", "-fopenmp"]
    return CSRC / "kernels.cpp", [*common, "-O3", "-fno-math-errno", f"-DSASA_ISA={part}", *ISAS[part][0]]


@cache
def _build_name(part: str) -> str:
    """`part`'s library name: it changes with its sources and flags, torch and the compiler's target."""
    source, flags = _source_and_flags(part)
    headers = [CSRC / "kernel_table.h"] if part == "operators" else sorted(CSRC.glob("*.h"))
    digest = hashlib.sha256(repr((torch.__version__, platform.machine(), flags)).encode())
    for file in [source, *headers]:
        digest.update(file.name.encode() + file.read_bytes())
    return f"sasa_bench_fused_{part}_{digest.hexdigest()[:16]}"


def _directory(part: str) -> Path:
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / _build_name(part)


def _library(part: str) -> Path:
    return _directory(part) / f"{_build_name(part)}.so"


def _is_built(part: str) -> bool:
    return (_directory(part) / "complete").exists() and _library(part).exists()


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja from the Python package is found although its environment is not activated."""
    before = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = before + os.pathsep + ninja.BIN_DIR
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _build(part: str) -> None:
    from torch.utils import cpp_extension

    directory = _directory(part)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_built(part):
            return
        # torch's own lock file survives a killed build and would block for ever; ours is the one that counts.
        (directory / "lock").unlink(missing_ok=True)
        source, flags = _source_and_flags(part)
        cpp_extension.load(
            _build_name(part),
            [str(source)],
            extra_cflags=flags,
            build_directory=str(directory),
            is_python_module=False,
        )
        (directory / "complete").touch()


def build(isas: list[str]) -> None:
    """Compiles the operators and the given builds of the kernels at once, those that are not in the cache.

    The cache is torch's extension directory (TORCH_EXTENSIONS_DIR). Raises RuntimeError with the compiler's
    words.
    """
    todo = [part for part in ["operators", *isas] if not _is_built(part)]
    if not todo:
        return
    with _ninja_on_path(), ThreadPoolExecutor(len(todo)) as pool:
        for done in [pool.submit(_build, part) for part in todo]:
            done.result()


@cache
def _load_operators() -> None:
    torch.ops.load_library(str(_library("operators")))
    for name, formula in (
        ("fused_local_attention", _flops.forward),
        ("fused_local_attention_forward", _flops.forward),
        ("fused_local_attention_backward", _flops.backward),
        ("fused_attention_layer", _flops.layer),
        ("fused_attention_layer_forward", _flops.layer),
        ("fused_attention_layer_backward", _flops.layer_backward),
    ):
        _flops.count(name, formula)


def load(isa: str | None = None) -> None:
    """Makes the operators usable with the kernels of `isa` (default: `chosen_isa()`), compiling them if
    needed.

    Loading another build later replaces the kernels of the whole process. Raises RuntimeError when there is
    no compiler (see `missing`) or it fails, and the errors of `chosen_isa`.
    """
    isa = isa or chosen_isa()
    if not (_is_built("operators") and _is_built(isa)) and (reason := _missing_tools()):
        raise RuntimeError(reason)
    build([isa])
    _load_operators()
    torch.ops.sasa_bench.fused_use_kernels(str(_library(isa)))


def _missing_tools() -> str | None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        return (
            f"there is no C++ compiler ({compiler}) to build the fused kernel with; "
            "`apt-get install g++` (or the like), or set CXX to a compiler"
        )
    with _ninja_on_path():
        if not shutil.which("ninja"):
            return "there is no ninja to build the fused kernel with; `pip install ninja`"
    return None


def missing() -> str | None:
    """What keeps the kernel from running on this machine, with the command that would help; None if nothing
    does.

    Compiles nothing. Raises the errors of `chosen_isa`.
    """
    if _is_built("operators") and _is_built(chosen_isa()):
        return None
    return _missing_tools()


def run(
    window: Window, tables: None, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """The core: q, k, v [B, C, H, W] with each head's channels contiguous -> y; differentiable once.

    float32, or bfloat16 with sums in float32.
    """
    y: Tensor = torch.ops.sasa_bench.fused_local_attention.default(
        q, k, v, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def layer(window: Window, x: Tensor, w_qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
    """The whole layer: x [B, C, H, W], w_qkv [3 C, C], the rows of queries, then of keys and of values -> y.

    Where heads fill the lanes of the kernel, each task projects the rows that it needs next, in the layout that it
    computes in. Differentiable once; float32 or bfloat16.
    """
    y: Tensor = torch.ops.sasa_bench.fused_attention_layer.default(
        x, w_qkv, rel_row, rel_col, window.rows, window.heads, window.border == "zero"
    )
    return y


def _refuses(window: Window, x: Tensor, relative: bool) -> str | None:
    if window.rows != window.columns:
        return f"the fused kernel has square windows, not {window.rows} x {window.columns}"
    return _cannot_run(x.device.type, x.dtype)


def _cannot_run(device: str, dtype: torch.dtype) -> str | None:
    if device not in ("cpu", "meta"):
        return f"the fused kernel runs on the CPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the fused kernel computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _supports(case: Case) -> str | None:
    return _cannot_run(case.device, getattr(torch, case.dtype))


def details() -> list[str]:
    """A line for each build: whether this processor runs it, whether it is compiled, which one is used."""
    chosen, lines = chosen_isa(), []
    for isa, (_, needed) in ISAS.items():
        if lacking := sorted(needed - _cpu_flags()):
            state = f"not on this processor, which lacks {', '.join(lacking)}"
        else:
            state = "compiled" if _is_built("operators") and _is_built(isa) else "compiled at first use"
        lines.append(f"build {isa}: {state}{', in use' if isa == chosen else ''}")
    return lines


IMPL = local_attention(
    "fused",
    "one native CPU kernel, compiled here at first use; no tensor with K x K entries",
    core=Core(run, layer=layer, refuses=_refuses, load=load, keeps_output=True, transforms=False, portable=False),
    supports=_supports,
    missing=missing,
    details=details,
)
