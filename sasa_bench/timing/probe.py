"""This machine, looked at now: processor, memory, GPU, libraries and the revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from sasa_bench.results.environment import recorded, worker_environment
from sasa_bench.results.machine import Machine
from sasa_bench.results.revision import code_digest, revision
from sasa_bench.timing import limits, nvml

LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "cuda-core", "nvidia-ml-py", "natten", "timm")
ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


def detect() -> Machine:
    """This machine, now."""
    cpu, flags = _processor()
    gpu, driver = _gpu()
    gpu_limits: dict[str, float] = {}
    state: dict[str, Any] = {}
    try:  # where a container has no nvidia-smi, too
        found = nvml.find()
        gpu, driver, gpu_limits, state = found.name or gpu, found.driver, found.limits(), found.state()
    except nvml.NvmlAbsentError as error:
        state = {"absent": str(error)} if gpu else {}
    package = Path(__file__).parents[1]
    commit, dirty = revision(package) or (_version("sasa-bench") or "unknown", False)
    return Machine(
        cpu=cpu,
        cores=available_cores(),
        isa=tuple(name for name in ISA if name in flags),
        memory_bytes=_rounded(min(_memory_bytes(), limits.memory_limit() or limits.UNLIMITED)),
        gpu=gpu,
        driver=driver,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := _version(name))},
        environment=recorded(os.environ) | worker_environment(),
        commit=commit,
        dirty=dirty,
        gpu_limits=gpu_limits,
        gpu_state=state,
        cpu_quota=limits.cpu_quota(),
        code=code_digest(package),
    )


def available_cores() -> int:
    """CPUs this process may run on; of a container with a quota of time no more than that pays for, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = limits.cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _processor(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Name and instruction-set flags of the processor: from /proc/cpuinfo, where it says both, as it does on x86."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if found.get("model name") and found.get("flags"):
        return found["model name"], set(found["flags"].split())
    try:
        import cpuinfo  # a second of asking other programs
    except ModuleNotFoundError:
        return platform.processor() or platform.machine(), set()
    info = cpuinfo.get_cpu_info()
    return info.get("brand_raw") or platform.processor() or platform.machine(), set(info.get("flags", ()))


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _rounded(memory_bytes: int) -> int:
    unit = 1 << 30 if memory_bytes >= 1 << 30 else 1 << 20
    return memory_bytes // unit * unit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    line = _output(query).partition("\n")[0]
    name, _, driver = line.partition(", ")
    return name, driver


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
