"""The machine a result comes from, as a results file describes it; timing.probe looks at the one at hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sasa_bench.results.fields import build

HARDWARE = ("cpu", "cores", "isa", "gpu")


@dataclass(frozen=True)
class Machine:
    """Hardware, software and revision.

    cores         CPUs this process may use
    memory_bytes  of the machine or of the container, to the GiB
    commit        revision of sasa-bench, where git tracks its files; else its version
    code          revision.code_digest of sasa-bench; empty in files from before there was any
    gpu_limits    nvml.Gpu.limits: power limit and highest clocks
    environment   variables that change measurements, as workers see them; results.environment lists which
    gpu_state     nvml.Gpu.state when the machine was looked at, or {"absent": why NVML could not be read}
    cpu_quota     processors' worth of time that a container may use; None where nothing limits it
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
    cpu_quota: float | None = None
    code: str = ""

    @property
    def hardware_id(self) -> str:
        """Names the hardware, whatever the software: rows with the same one may be compared."""
        quota = [] if self.cpu_quota is None else [self.cpu_quota]  # as in files from before there were any
        hardware = json.dumps([asdict(self)[field] for field in HARDWARE] + quota)
        digest = hashlib.sha256(hardware.encode()).hexdigest()[:6]
        label = self.gpu or self.cpu
        return f"{'-'.join(label.replace('(R)', ' ').replace('(TM)', ' ').split())}-{self.cores}c-{digest}"

    @property
    def id(self) -> str:
        """Names hardware, software, revision and the GPU's limits together."""
        values = self.to_dict()
        del values["gpu_state"]  # it changes from minute to minute
        for name in ("cpu_quota", "gpu_limits", "code"):
            if not values[name]:  # as in files from before there were any
                del values[name]
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
        return build(cls, values)
