"""CUDA kernels compiled at run time: NVRTC through cuda-core, cubins and measured tunables cached on disk.

Knows nothing of any particular kernel. Needs no toolkit and no host compiler, only the NVIDIA driver, a CUDA
build of torch and ``pip install 'sasa-bench[cuda]'``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from sasa_bench.impls._native import cache_directory, write_atomically

STANDARD = "c++17"
EXTRA = "pip install 'sasa-bench[cuda]'"
SEARCH_ROUNDS = 5
SEARCH_CALLS = 10

Argument = torch.Tensor | int | None
Candidate = TypeVar("Candidate")


def no_device() -> str | None:
    """Why torch cannot use a GPU on this machine and what would help; None if it can."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA: install a CUDA build of torch on a machine "
            "with an NVIDIA GPU and its driver."
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no NVIDIA GPU: install the NVIDIA "
            "driver (nvidia-smi must list the device)."
        )
    return None


def missing() -> str | None:
    """What keeps CUDA kernels from running on this machine and what would unlock them; None if nothing."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return f"cuda-core is not installed, which compiles and launches the kernels: {EXTRA}."
    if reason := no_device():
        return reason
    try:
        nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return None


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
    code = Program(source, "c++", options).compile("cubin", name_expressions=(expression,))
    symbol = code.symbol_mapping[expression]
    return Cubin(bytes(code.code), symbol.decode() if isinstance(symbol, bytes) else symbol)


def cached_cubin(source: str, expression: str, arch: str) -> Cubin:
    """`compile_cubin` through the disk cache, keyed by its arguments, the options and the NVRTC version."""
    parts = "\0".join((source, expression, arch, STANDARD, "ftz", nvrtc_version()))
    path = cache_directory() / "cubin" / f"{arch}-{hashlib.sha256(parts.encode()).hexdigest()[:32]}.cubin"
    if path.exists():
        header, _, code = path.read_bytes().partition(b"\n")
        size, _, symbol = header.partition(b" ")
        if code.startswith(b"\x7fELF") and size == str(len(code)).encode():
            return Cubin(code, symbol.decode())
    cubin = compile_cubin(source, expression, arch)
    write_atomically(path, f"{len(cubin.code)} {cubin.symbol}\n".encode() + cubin.code)
    return cubin


def search(
    candidates: Sequence[Candidate], seconds: Callable[[Candidate], float], rounds: int = SEARCH_ROUNDS
) -> tuple[Candidate, list[float]]:
    """Measures candidates in interleaved rounds; returns the one with the smallest median, and all medians.

    Args:
        candidates: what to choose from; on a tie the earlier one wins.
        seconds: runs a candidate and returns its time in seconds. A candidate that raises RuntimeError,
            because the device cannot run it, is out and has an infinite median.
        rounds: samples per candidate, after one that is thrown away.

    Raises:
        RuntimeError: no candidate runs; the last candidate's error is its cause.
    """
    samples: list[list[float]] = [[] for _ in candidates]
    failed: dict[int, RuntimeError] = {}
    for number in range(rounds + 1):
        for index, candidate in enumerate(candidates):
            if index in failed:
                continue
            try:
                sample = seconds(candidate)
            except RuntimeError as error:
                failed[index] = error
                continue
            if number > 0:
                samples[index].append(sample)
    if len(failed) == len(candidates):
        reason = failed[max(failed)]
        raise RuntimeError(f"none of {len(candidates)} candidates runs on this device: {reason}") from reason
    medians = [float("inf") if index in failed else statistics.median(s) for index, s in enumerate(samples)]
    return candidates[medians.index(min(medians))], medians


class TuningStore:
    """Tunables chosen by measurement, one JSON file per device: key -> {"chosen": ..., "seconds": ...}."""

    def __init__(self, device: str) -> None:
        name = "".join(letter if letter.isalnum() else "-" for letter in device)
        self.path = cache_directory() / f"tunables-{name}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything stored; empty when the file is absent or unreadable, for it can be measured again."""
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def add(self, key: str, chosen: dict[str, int], seconds: float) -> None:
        """Stores one choice; `seconds` is the median time of one launch."""
        entries = self.read() | {key: {"chosen": chosen, "seconds": seconds}}
        write_atomically(self.path, json.dumps(entries, indent=1, sort_keys=True).encode())


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
        from cuda.core import Device

        self.device = Device(index)
        self.device.set_current()
        capability = self.device.compute_capability
        self.arch = f"sm_{capability.major}{capability.minor}"
        self.store = TuningStore(f"{self.device.name} {self.arch}")
        self._stream = stream or (lambda: torch.cuda.current_stream(index).cuda_stream)
        self._seconds = seconds or _event_seconds
        self._kernels: dict[str, Any] = {}
        self._chosen: dict[str, Any] = {}

    def launch(self, source: str, expression: str, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """Launches a kernel: tensors go as pointers, None as a null pointer, integers as 32-bit integers.

        Raises:
            RuntimeError: the kernel does not compile, load or launch.
        """
        from cuda.core import LaunchConfig, ObjectCode, Stream, launch

        values = [_kernel_value(argument) for argument in arguments]
        try:
            self.device.set_current()
            if expression not in self._kernels:
                cubin = cached_cubin(source, expression, self.arch)
                self._kernels[expression] = ObjectCode.from_cubin(cubin.code).get_kernel(cubin.symbol)
            stream = Stream.from_handle(self._stream())
            launch(stream, LaunchConfig(grid=grid, block=block), self._kernels[expression], *values)
        except Exception as error:  # cuda-core raises kinds of its own
            raise RuntimeError(f"{expression} does not run on {self.device.name}: {error}") from error

    def choose(self, key: str, candidates: Sequence[Any], run: Callable[[Any], None]) -> Any:
        """The fastest of some tunables (dataclasses) for `key`: as stored, else by measuring them once.

        `run` launches a candidate; it is called repeatedly, so it must leave the same results each time. The
        first candidate is taken unmeasured while a CUDA graph is captured and when SASA_BENCH_TUNE=0.
        """
        if key in self._chosen:
            return self._chosen[key]
        stored = self.store.read().get(key, {}).get("chosen")
        chosen: Any = next((candidate for candidate in candidates if asdict(candidate) == stored), None)
        if chosen is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return candidates[0]
            if len(candidates) == 1 or os.environ.get("SASA_BENCH_TUNE") == "0":
                chosen = candidates[0]
            else:
                chosen, medians = search(candidates, lambda candidate: self._seconds(lambda: run(candidate)))
                self.store.add(key, asdict(chosen), min(medians))
        self._chosen[key] = chosen
        return chosen


def _kernel_value(argument: Argument) -> Any:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else np.int32(argument)


def _event_seconds(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(SEARCH_CALLS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / SEARCH_CALLS


_runtimes: dict[int, Runtime] = {}


def runtime(device: torch.device) -> Runtime:
    """The runtime of a CUDA device, made once.

    Raises:
        ValueError: the device is not a CUDA device.
        RuntimeError: this machine cannot run CUDA kernels; the message says what is missing.
    """
    if device.type != "cuda":
        raise ValueError(f"CUDA kernels take CUDA tensors, these are on {device.type!r}: use .to('cuda').")
    if reason := missing():
        raise RuntimeError(reason)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _runtimes:
        _runtimes[index] = Runtime(index)
    return _runtimes[index]


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
