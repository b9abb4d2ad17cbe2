"""What NVML says of a GPU, read from a made-up NVML, in Python and as a library that pynvml itself loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvml import FakeNvml

from sasa_bench.timing import nvml
from sasa_bench.timing.nvml import NvmlAbsentError

FAKE_LIBRARY = Path(__file__).parent / "fake_nvml.cpp"


def test_figures_are_in_base_units() -> None:
    library = FakeNvml(sm_mhz=1410, memory_mhz=2619, milliwatts=700_000, degrees=41, millijoules=123_456)
    gpu = nvml.find(library=library)
    assert gpu.name == library.name
    assert gpu.driver == library.driver
    assert gpu.limits() == {"power_limit_w": 700.0, "sm_clock_max_mhz": 2820.0, "memory_clock_max_mhz": 5238.0}
    assert gpu.state() == {"sm_clock_mhz": 1410.0, "memory_clock_mhz": 2619.0, "temperature_c": 41.0}
    assert gpu.energy_j() == pytest.approx(123.456)


@pytest.mark.parametrize("reason", nvml.THROTTLING)
def test_each_reason_of_heat_or_power_is_throttling(reason: str) -> None:
    library = FakeNvml()
    gpu = nvml.find(library=library)
    assert gpu.throttling() == ()
    library.reasons = getattr(library, nvml.THROTTLING[reason]) | library.IDLE | library.CLOCKS_SET_BY_HAND
    assert gpu.throttling() == (reason,)


def test_an_old_nvidia_ml_py_is_named_and_functions_that_it_lacks_tell_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = FakeNvml()
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetTotalEnergyConsumption")
    assert nvml.find(library=library).energy_j() is None
    monkeypatch.delattr(FakeNvml, "nvmlClocksEventReasonSwPowerCap")
    with pytest.raises(NvmlAbsentError, match=r"too old to name why clocks are low: .* --upgrade"):
        nvml.find(library=library)


def test_an_idle_gpu_and_clocks_set_by_hand_are_not_throttling() -> None:
    library = FakeNvml(reasons=FakeNvml.IDLE | FakeNvml.CLOCKS_SET_BY_HAND)
    assert nvml.find(library=library).throttling() == ()


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    library = FakeNvml(unsupported={"nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTemperature"})
    gpu = nvml.find(library=library)
    assert set(gpu.limits()) == {"sm_clock_max_mhz", "memory_clock_max_mhz"}
    assert set(gpu.state()) == {"sm_clock_mhz", "memory_clock_mhz"}
    library.unsupported |= {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTotalEnergyConsumption"}
    assert gpu.throttling() is None
    assert gpu.energy_j() is None


@pytest.mark.parametrize(
    ("visible", "uuid", "handle"),
    [
        (None, None, 0),
        ("", None, 0),
        ("2,0", None, 2),
        ("GPU-abc,1", None, "GPU-abc"),
        ("1", "GPU-def", "GPU-def"),
    ],
)
def test_the_gpu_is_the_one_that_is_visible(
    visible: str | None, uuid: str | None, handle: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvml.find(uuid, FakeNvml()).handle == handle


def test_without_nvml_the_reason_and_the_remedy_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvmlAbsentError, match=r"Driver Not Loaded.*nvidia-smi must list"):
        nvml.find(library=FakeNvml(unsupported={"nvmlInit"}))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.absent() == "nvidia-ml-py, which reads NVML, is not installed: pip install nvidia-ml-py"


def test_pynvml_itself_reads_a_fake_library_in_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: apt-get install g++")
    library = tmp_path / "libnvidia-ml.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler, *flags, str(FAKE_LIBRARY), "-o", str(library)], check=True)
    code = (
        f"import ctypes; ctypes.CDLL({str(library)!r})\n"  # the loader then takes it for the driver's, by its name
        "from sasa_bench.timing import nvml\n"
        "gpu = nvml.find('GPU-fake')\n"
        "print(gpu.name, gpu.driver, gpu.limits(), gpu.state(), gpu.throttling(), gpu.energy_j(), sep='\\n')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [
        "FAKE GPU-fake",
        "999.11",
        "{'power_limit_w': 350.5, 'sm_clock_max_mhz': 1980.0, 'memory_clock_max_mhz': 2619.0}",
        "{'sm_clock_mhz': 1755.0, 'memory_clock_mhz': 1593.0}",
        "('power limit', 'heat, by hardware')",
        "12.345",
    ]
