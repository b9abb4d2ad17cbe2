"""The machine a result comes from: hardware, libraries, revision, and the environment of the worker."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import cpuinfo
import psutil

from sasa_bench import nvml

WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""The same for every implementation. OpenMP threads spin for about 0.2 ms between parallel regions, then sleep: a
sleeping thread costs a wake-up of 0.1 ms or more in a virtual machine, as much as a small kernel, and one that spins on
takes a core from the threads of another library that runs next. The allocator keeps its heap,
so that page faults are not timed."""

KEEP_MODELS = "SASA_BENCH_KEEP_MODELS"
"""Environment variable of a worker: the folder where models that were exported are kept; without it, none are."""

EXPORTS = "SASA_BENCH_EXPORTS"
"""Environment variable of a worker: a folder of exported models that processes share which run the same code; what is
there is not exported again. Without it, every build exports."""

LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "cuda-core", "nvidia-ml-py", "natten", "timm")
ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")
HARDWARE = ("cpu", "cores", "isa", "gpu")


@dataclass(frozen=True)
class Machine:
    """Hardware, software and revision.

    cores         CPUs this process may use
    memory_bytes  of the machine, to the GiB
    commit        revision of sasa-bench
    gpu_limits    nvml.Gpu.limits: power limit and highest clocks
    gpu_state     nvml.Gpu.state when the machine was looked at, or {"absent": why NVML could not be read}
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    gpu: str
    driver: str
    os: str
    python: str
    libraries: dict[str, str]
    environment: dict[str, str]
    commit: str
    dirty: bool
    gpu_limits: dict[str, float] = field(default_factory=dict)
    gpu_state: dict[str, Any] = field(default_factory=dict)

    @property
    def hardware_id(self) -> str:
        """Names the hardware, whatever the software: rows with the same one may be compared."""
        hardware = json.dumps([asdict(self)[field] for field in HARDWARE])
        digest = hashlib.sha256(hardware.encode()).hexdigest()[:6]
        label = self.gpu or self.cpu
        return f"{'-'.join(label.replace('(R)', ' ').replace('(TM)', ' ').split())}-{self.cores}c-{digest}"

    @property
    def id(self) -> str:
        """Names hardware, software, revision and the GPU's limits together."""
        values = self.to_dict()
        del values["gpu_state"]  # it changes from minute to minute
        if not self.gpu_limits:  # as in files from before there were any
            del values["gpu_limits"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def revision(self) -> str:
        """The commit, marked when the working tree differed from it."""
        return f"{self.commit}+dirty" if self.dirty else self.commit

    def to_dict(self) -> dict[str, Any]:
        """Field -> plain value, as stored in a results file."""
        return asdict(self) | {"isa": list(self.isa)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Machine:
        """The inverse of to_dict."""
        return cls(**values | {"isa": tuple(values["isa"])})


def detect() -> Machine:
    """This machine, now."""
    info = cpuinfo.get_cpu_info()
    flags = set(info.get("flags", ()))
    gpu, driver = _gpu()
    limits: dict[str, float] = {}
    state: dict[str, Any] = {}
    if gpu:
        try:
            found = nvml.find()
            gpu, driver, limits, state = found.name or gpu, found.driver, found.limits(), found.state()
        except nvml.NvmlAbsentError as error:
            state = {"absent": str(error)}
    commit, dirty = _revision(Path(__file__).parent)
    return Machine(
        cpu=info.get("brand_raw") or platform.processor() or platform.machine(),
        cores=available_cores(),
        isa=tuple(name for name in ISA if name in flags),
        memory_bytes=psutil.virtual_memory().total >> 30 << 30,
        gpu=gpu,
        driver=driver,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := _version(name))},
        environment=WORKER_ENVIRONMENT,
        commit=commit,
        dirty=dirty,
        gpu_limits=limits,
        gpu_state=state,
    )


def available_cores() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _revision(folder: Path) -> tuple[str, bool]:
    commit = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return _version("sasa-bench") or "unknown", False
    return commit, bool(_output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
