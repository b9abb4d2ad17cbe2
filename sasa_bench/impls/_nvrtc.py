"""CUDA kernels compiled at run time: NVRTC through cuda-core, cubins and measured tunables cached on disk.

Knows nothing of any particular kernel. Needs no toolkit and no host compiler, only the NVIDIA driver, a CUDA
build of torch and ``pip install 'sasa-bench[cuda]'``.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from sasa_bench.impls._tuning import Chooser, TuningStore
from sasa_bench.results.cache import cache_directory, write_atomically

STANDARD = "c++17"
EXTRA = "pip install 'sasa-bench[cuda]'"

Argument = torch.Tensor | int | None


def no_device() -> str | None:
    """Why torch cannot use a GPU on this machine and what would help; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build without CUDA: install a CUDA build of torch on a machine "
            "with an NVIDIA GPU and its driver."
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no NVIDIA GPU: install the NVIDIA "
            f"driver (nvidia-smi must list the device, and CUDA {torch.version.cuda} or newer)."
        )
    return None


def missing_compiler() -> str | None:
    """What keeps CUDA kernels from being compiled on this machine and what would unlock it; None if nothing."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return f"cuda-core is not installed, which compiles and launches the kernels: {EXTRA}."
    try:
        from cuda.core import Device, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch  # noqa: F401
        from cuda.pathfinder import find_nvidia_header_directory  # noqa: F401
    except ImportError as error:
        return f"cuda-core {metadata.version('cuda-core')} lacks what the kernels need ({error}): {EXTRA} --upgrade."
    try:
        nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return None


def missing() -> str | None:
    """What keeps CUDA kernels from running on this machine and what would unlock them; None if nothing."""
    if reason := missing_compiler() or no_device():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for AMD GPUs, these kernels are for NVIDIA's."
    compiler, driver = nvrtc_version(), driver_version()
    if int(compiler.partition(".")[0]) > int(driver.partition(".")[0]):
        return (
            f"NVRTC {compiler} compiles for a newer CUDA than the driver's ({driver}): "
            f"pip install 'cuda-bindings=={driver.partition('.')[0]}.*', or renew the driver."
        )
    return None


def driver_version() -> str:
    """The newest CUDA that the NVIDIA driver runs, such as ``13.0``; the compiler's where it cannot be read."""
    from cuda.bindings import driver

    status, version = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        return nvrtc_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def nvrtc_version() -> str:
    """Version of the NVRTC library that compiles, such as ``13.0``."""
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's own kinds differ between versions
        raise RuntimeError(f"NVRTC cannot be loaded ({error}): pip install nvidia-cuda-nvrtc") from error
    return f"{major}.{minor}"


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one architecture, and the symbol it is found by."""

    code: bytes
    symbol: str


def compile_cubin(source: str, expression: str, arch: str) -> Cubin:
    """Compiles one template instance, such as ``forward<float, 7>``, to machine code for ``sm_90`` or so.

    Machine code and never PTX: a driver refuses the PTX of an NVRTC newer than itself.

    Raises:
        RuntimeError: NVRTC does not know the architecture, finds no CUDA headers, or rejects the source.
    """
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    status, known = nvrtc.nvrtcGetSupportedArchs()
    if status == nvrtc.nvrtcResult.NVRTC_SUCCESS and int(arch.removeprefix("sm_")) not in known:
        raise RuntimeError(
            f"NVRTC {nvrtc_version()} cannot compile for {arch}; it knows "
            f"{', '.join(f'sm_{number}' for number in known)}. Install a newer nvidia-cuda-nvrtc."
        )
    headers = find_nvidia_header_directory("cudart")
    if headers is None:
        raise RuntimeError("cuda_fp16.h is not found: pip install nvidia-cuda-runtime")
    options = ProgramOptions(arch=arch, std=STANDARD, ftz=True, include_path=[headers])
    try:
        code = Program(source, "c++", options).compile("cubin", name_expressions=(expression,))
    except Exception as error:  # NVRTC's own, which cuda-core derives from nothing that is known here
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    symbol = code.symbol_mapping[expression]
    return Cubin(bytes(code.code), symbol.decode() if isinstance(symbol, bytes) else symbol)


def cached_cubin(source: str, expression: str, arch: str, kept: bool = False) -> Cubin:
    """`compile_cubin` through the disk cache, keyed by its arguments, the options and the major version of NVRTC.

    A cache that cannot be written costs time, not the kernel; where it has to be `kept`, OSError is raised.

    Drivers run machine code of every minor version of their CUDA (CUDA Compatibility, "Minor Version Compatibility"),
    so code that another machine prepared is found here.
    """
    major = nvrtc_version().partition(".")[0]
    parts = "\0".join((source, expression, arch, STANDARD, "ftz", major))
    path = cache_directory() / "cubin" / f"{arch}-{hashlib.sha256(parts.encode()).hexdigest()[:32]}.cubin"
    if path.exists():
        header, _, code = path.read_bytes().partition(b"\n")
        size, _, symbol = header.partition(b" ")
        if code.startswith(b"\x7fELF") and size == str(len(code)).encode():
            return Cubin(code, symbol.decode())
    cubin = compile_cubin(source, expression, arch)
    try:
        write_atomically(path, f"{len(cubin.code)} {cubin.symbol}\n".encode() + cubin.code)
    except OSError:
        if kept:
            raise
    return cubin


def prebuild(kernels: Iterable[tuple[str, str]], arch: str, threads: int) -> tuple[int, list[str]]:
    """Compiles (source, expression) pairs into the disk cache, `threads` at a time.

    Returns how many there are, and a sentence for each that does not compile or cannot be kept.
    """

    def failure(kernel: tuple[str, str]) -> str:
        try:
            cached_cubin(*kernel, arch, kept=True)
        except RuntimeError as error:
            return f"{kernel[1]} does not compile for {arch}: {error}"
        except OSError as error:
            return f"{kernel[1]} cannot be kept: {error}"
        return ""

    wanted = list(dict.fromkeys(kernels))
    with ThreadPoolExecutor(threads) as pool:
        return len(wanted), [said for said in pool.map(failure, wanted) if said]


class Runtime:
    """Compiles, loads and launches kernels on one device, on torch's current stream.

    Args:
        index: CUDA device number.
        stream: returns the handle of the stream to launch on.
        seconds: measures a callable in seconds of device time, for the choice of tunables.
    """

    def __init__(
        self,
        index: int,
        stream: Callable[[], int] | None = None,
        seconds: Callable[[Callable[[], None]], float] | None = None,
    ) -> None:
        import cuda.core

        self._core = cuda.core
        self.device = cuda.core.Device(index)
        self.device.set_current()
        capability = self.device.compute_capability
        self.arch = f"sm_{capability.major}{capability.minor}"
        self.plans: dict[Any, Any] = {}
        self._stream = stream or (lambda: torch.cuda.current_stream(index).cuda_stream)
        self._seconds = seconds
        self._kernels: dict[tuple[str, str], Any] = {}
        self._configurations: dict[tuple[int, int], Any] = {}
        self._streams: dict[int, Any] = {}
        self._choosers: dict[str, Chooser] = {}

    def launch(self, source: str, expression: str, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """Launches a kernel: tensors go as pointers, None as a null pointer, integers as 32-bit integers.

        Raises:
            RuntimeError: the kernel does not compile, load or launch.
        """
        core = self._core
        try:
            self.device.set_current()
            kernel = self._kernels.get((expression, source))
            if kernel is None:
                cubin = cached_cubin(source, expression, self.arch)
                kernel = core.ObjectCode.from_cubin(cubin.code).get_kernel(cubin.symbol)
                self._kernels[expression, source] = kernel
            configuration = self._configurations.get((grid, block))
            if configuration is None:
                configuration = self._configurations[grid, block] = core.LaunchConfig(grid=grid, block=block)
            handle = self._stream()
            stream = self._streams.get(handle)
            if stream is None:
                stream = self._streams[handle] = core.Stream.from_handle(handle)
            core.launch(stream, configuration, kernel, *map(_kernel_value, arguments))
        except Exception as error:  # cuda-core raises kinds of its own
            raise RuntimeError(f"{expression} does not run on {self.device.name}: {error}") from error

    def choose(self, source: str, key: str, candidates: Sequence[Any], run: Callable[[Any], None]) -> Any:
        """The fastest of some tunables for `key` of the kernels in `source`, as `Chooser.choose`."""
        if source not in self._choosers:
            self._choosers[source] = Chooser(f"{self.device.name} {self.arch}", source, self._seconds)
        return self._choosers[source].choose(key, candidates, run)


def _kernel_value(argument: Argument) -> Any:
    if argument is None:
        return 0
    return np.int32(argument) if isinstance(argument, int) else argument.data_ptr()


_runtimes: dict[int, Runtime] = {}


def runtime(device: torch.device) -> Runtime:
    """The runtime of a CUDA device, made once.

    Raises:
        ValueError: the device is not a CUDA device.
        RuntimeError: this machine cannot run CUDA kernels; the message states what is missing.
    """
    if device.type != "cuda":
        raise ValueError(f"CUDA kernels take CUDA tensors, these are on {device.type!r}: use .to('cuda').")
    index = torch.cuda.current_device() if device.index is None and torch.cuda.is_initialized() else device.index or 0
    found = _runtimes.get(index)
    if found is None:
        if reason := missing():
            raise RuntimeError(reason)
        found = _runtimes[index] = Runtime(index)
    return found


def describe() -> list[str]:
    """Lines for a person: what is missing, and `details`."""
    reason = missing()
    return [*([f"CUDA kernels cannot run: {reason}"] if reason else []), *details()]


def details() -> list[str]:
    """Lines for a person: which devices there are, cached cubins, chosen tunables."""
    lines = []
    if missing() is None:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            arch = f"sm_{found.major}{found.minor}"
            lines.append(f"device {index}: {found.name}, {arch}, NVRTC {nvrtc_version()}")
    cache = cache_directory()
    cubins = list((cache / "cubin").glob("*.cubin"))
    size = sum(path.stat().st_size for path in cubins)
    lines.append(f"cached cubins: {len(cubins)} ({size / 1024:.0f} KiB) in {cache}")
    for path in sorted(cache.glob("tunables-*.json")):
        device = path.stem.removeprefix("tunables-")
        for key, entry in sorted(TuningStore(device).read().items()):
            chosen = " ".join(f"{name}={value}" for name, value in entry["chosen"].items())
            lines.append(f"{device}: {key}: {chosen} ({entry['seconds'] * 1e6:.1f} us)")
    return lines
