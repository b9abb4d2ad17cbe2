"""A made-up NVML with the functions of pynvml that sasa_bench.timing.nvml calls; it describes no real GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class FakeNvmlError(Exception):
    """Stands for pynvml.NVMLError."""


class FakeNvml:
    """One GPU. `unsupported` names the functions that fail; `on_reasons` is called before reasons are told."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    IDLE, CLOCKS_SET_BY_HAND = 0x1, 0x2
    nvmlClocksEventReasonSwPowerCap = 0x4
    nvmlClocksEventReasonHwSlowdown = 0x8
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80
    name, driver = "FAKE GPU", "999.11"

    def __init__(
        self,
        reasons: int = 0,
        sm_mhz: int = 1000,
        memory_mhz: int = 2000,
        milliwatts: int = 300_000,
        degrees: int = 50,
        millijoules: int = 0,
        unsupported: Iterable[str] = (),
        on_reasons: Callable[[], None] = lambda: None,
    ) -> None:
        self.reasons, self.sm_mhz, self.memory_mhz, self.milliwatts = reasons, sm_mhz, memory_mhz, milliwatts
        self.degrees, self.millijoules, self.unsupported = degrees, millijoules, set(unsupported)
        self.on_reasons = on_reasons

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "unsupported"):
            return self._fail
        return object.__getattribute__(self, name)

    def _fail(self, *arguments: object) -> None:
        raise FakeNvmlError("Driver Not Loaded")

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetName(self, handle: object) -> str:
        return self.name

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return self.sm_mhz if kind == self.NVML_CLOCK_SM else self.memory_mhz

    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int:
        return 2 * self.nvmlDeviceGetClockInfo(handle, kind)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: object) -> int:
        return self.milliwatts

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return self.degrees

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int:
        self.on_reasons()
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        return self.millijoules
