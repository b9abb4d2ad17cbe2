"""What the driver of an NVIDIA GPU reports: clocks, power, temperature, throttling, energy. Each figure may be absent.

Read from NVML, the driver's own library, through nvidia-ml-py. Names and units are those of NVIDIA's NVML API
reference; a GPU, or a part of one, that does not tell a figure leaves it out.
"""

from __future__ import annotations

import os
from typing import Any

INSTALL = "pip install nvidia-ml-py"

POWER_LIMIT = "power limit"
"""The one reason that is normal: a large GPU at full load meets its power limit before its highest clock."""

THROTTLING = {
    POWER_LIMIT: "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "heat, by software": "nvmlClocksEventReasonSwThermalSlowdown",
    "heat, by hardware": "nvmlClocksEventReasonHwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
}
"""Why a GPU lowers its clocks under load, and NVML's bit for it. An idle GPU and clocks set by hand are not among
these."""


class NvmlAbsentError(Exception):
    """NVML cannot be read; the message states why and what would help."""


class Gpu:
    """One GPU as NVML sees it. `library` is the module pynvml or what looks like it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle
        try:
            self._bits = {reason: getattr(library, name) for reason, name in THROTTLING.items()}
        except AttributeError:
            raise NvmlAbsentError(f"nvidia-ml-py is too old to name why clocks are low: {INSTALL} --upgrade") from None

    def _read(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self.library, name)(self.handle, *arguments)
        except (self.library.NVMLError, AttributeError):  # an old nvidia-ml-py lacks some functions
            return None

    @property
    def name(self) -> str:
        """The product, such as "NVIDIA H100 80GB HBM3"; empty where it is not reported."""
        return str(self._read("nvmlDeviceGetName") or "")

    @property
    def driver(self) -> str:
        """Version of the driver."""
        return str(self.library.nvmlSystemGetDriverVersion())

    def limits(self) -> dict[str, float]:
        """What does not change by itself: power_limit_w in watts, sm_clock_max_mhz and memory_clock_max_mhz."""
        milliwatts = self._read("nvmlDeviceGetEnforcedPowerLimit")
        return _known(
            power_limit_w=None if milliwatts is None else milliwatts / 1000,
            sm_clock_max_mhz=self._read("nvmlDeviceGetMaxClockInfo", self.library.NVML_CLOCK_SM),
            memory_clock_max_mhz=self._read("nvmlDeviceGetMaxClockInfo", self.library.NVML_CLOCK_MEM),
        )

    def state(self) -> dict[str, float]:
        """What it does now: sm_clock_mhz, memory_clock_mhz, and temperature_c in degrees Celsius."""
        return _known(
            sm_clock_mhz=self._read("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_SM),
            memory_clock_mhz=self._read("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_MEM),
            temperature_c=self._read("nvmlDeviceGetTemperature", self.library.NVML_TEMPERATURE_GPU),
        )

    def throttling(self) -> tuple[str, ...] | None:
        """The reasons of THROTTLING that hold now; None where it is not reported."""
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        return None if bits is None else tuple(reason for reason, bit in self._bits.items() if bits & bit)

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None where it is not reported."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000


def find(uuid: str | None = None, library: Any = None) -> Gpu:
    """The GPU of that UUID, such as "GPU-8f3c…"; without one, the first that CUDA_VISIBLE_DEVICES lets be seen.

    Raises NvmlAbsentError.
    """
    library = library or _pynvml()
    wanted = uuid or os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        library.nvmlInit()
        if wanted.startswith(("GPU-", "MIG-")):
            return Gpu(library, library.nvmlDeviceGetHandleByUUID(wanted))
        return Gpu(library, library.nvmlDeviceGetHandleByIndex(int(wanted) if wanted.isdecimal() else 0))
    except library.NVMLError as error:
        of = f" of {wanted}" if wanted else ""
        raise NvmlAbsentError(f"NVML reports nothing{of} ({error}): nvidia-smi must list the GPU") from None


def absent(uuid: str | None = None) -> str | None:
    """None, or why NVML cannot be read here and what would help."""
    try:
        find(uuid)
    except NvmlAbsentError as error:
        return str(error)
    return None


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise NvmlAbsentError(f"nvidia-ml-py, which reads NVML, is not installed: {INSTALL}") from None
    return pynvml


def _known(**figures: float | None) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}
