"""What a results file says of the machine, with and without a GPU that NVML can read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from fake_nvml import FakeNvml

from sasa_bench.results.machine import Machine
from sasa_bench.results.revision import code_digest
from sasa_bench.timing import nvml, probe


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi lists two GPUs."""
    real = probe._output

    def output(command: list[str]) -> str:
        return "GPU zero, 999.11\nGPU one, 999.11" if command[0] == "nvidia-smi" else real(command)

    monkeypatch.setattr(probe, "_output", output)


@pytest.mark.usefixtures("nvidia_smi")
def test_limits_and_state_of_the_gpu_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(sm_mhz=1200, memory_mhz=2600, milliwatts=450_000, degrees=33)
    monkeypatch.setattr(nvml, "_pynvml", lambda: library)
    found = probe.detect()
    assert (found.gpu, found.driver) == (library.name, library.driver)
    assert found.gpu_limits == {"power_limit_w": 450, "sm_clock_max_mhz": 2400, "memory_clock_max_mhz": 5200}
    assert found.gpu_state == {"sm_clock_mhz": 1200, "memory_clock_mhz": 2600, "temperature_c": 33}
    assert Machine.from_dict(found.to_dict()) == found


@pytest.mark.usefixtures("nvidia_smi")
def test_a_gpu_that_nvml_does_not_show_is_recorded_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_pynvml", lambda: FakeNvml(unsupported={"nvmlInit"}))
    found = probe.detect()
    assert (found.gpu, found.gpu_limits) == ("GPU zero", {})
    assert "NVML reports nothing" in found.gpu_state["absent"]


def test_the_id_names_the_limits_and_not_what_changes_from_minute_to_minute() -> None:
    cool = factory.machine(gpu="G", gpu_limits={"power_limit_w": 300.0}, gpu_state={"temperature_c": 30.0})
    assert replace(cool, gpu_state={"temperature_c": 80.0}).id == cool.id
    assert replace(cool, gpu_limits={"power_limit_w": 250.0}).id != cool.id


def test_the_id_names_the_code_that_measured() -> None:
    assert len({factory.machine(code=code).id for code in ("", "aaa", "bbb")}) == 3


def test_the_digest_of_the_code_changes_with_what_measures_alone(tmp_path: Path) -> None:
    for place in ("case.py", "impls/csrc/a.h", "timing/x.py", "report/page.py", "cli/x.py", "report/x.html"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("old")
    found = [code_digest(tmp_path)]
    for place in ("report/page.py", "cli/x.py", "report/x.html", "README.md", "impls/x.pyc"):
        (tmp_path / place).write_text("new")
        assert code_digest(tmp_path) == found[0], place
    for place in ("case.py", "impls/csrc/a.h", "timing/x.py", "nn.py"):
        (tmp_path / place).write_text("new")
        found.append(code_digest(tmp_path))
    (tmp_path / "nn.py").rename(tmp_path / "nnn.py")
    found.append(code_digest(tmp_path))
    assert len(set(found)) == len(found)


def test_a_file_from_before_nvml_was_read_keeps_its_ids() -> None:
    machine = factory.machine()
    old = {
        name: value for name, value in machine.to_dict().items() if not name.startswith(("gpu_", "cpu_quota", "code"))
    }
    assert Machine.from_dict(old) == machine
    assert machine.id == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:12]


def test_a_gpu_is_named_where_a_container_has_no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_output", lambda command: "")
    library = FakeNvml()
    monkeypatch.setattr(nvml, "_pynvml", lambda: library)
    assert probe.detect().gpu == library.name
    monkeypatch.setattr(nvml, "_pynvml", lambda: FakeNvml(unsupported={"nvmlInit"}))
    found = probe.detect()
    assert (found.gpu, found.gpu_state) == ("", {})
