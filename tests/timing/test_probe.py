"""The processor, as /proc/cpuinfo or py-cpuinfo names it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import cpuinfo
import psutil
import pytest

from sasa_bench.timing import probe

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9R14: 96 cores
flags\t\t: fpu avx2 fma

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n"


def test_it_is_the_one_that_py_cpuinfo_names() -> None:
    """So a machine keeps its name, whichever of the two says it."""
    info = cpuinfo.get_cpu_info()
    name, flags = probe._processor()
    assert name == info["brand_raw"]
    assert flags.intersection(probe.ISA) == set(info["flags"]).intersection(probe.ISA)


def test_where_the_system_names_it_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(X86)
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert probe._processor(tmp_path / "cpuinfo") == ("AMD EPYC 9R14: 96 cores", {"fpu", "avx2", "fma"})


@pytest.mark.parametrize("text", [ARM, "", None])
def test_elsewhere_py_cpuinfo_is_asked_where_it_is_installed(
    text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    found = {"brand_raw": "Neoverse-V2", "flags": ["asimd", "sve"]}
    monkeypatch.setitem(sys.modules, "cpuinfo", SimpleNamespace(get_cpu_info=lambda: found))
    assert probe._processor(tmp_path / "cpuinfo") == ("Neoverse-V2", {"asimd", "sve"})
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert probe._processor(tmp_path / "cpuinfo") == (platform.processor() or platform.machine(), set())


def test_memory_is_all_that_the_system_has() -> None:
    assert probe._memory_bytes() == psutil.virtual_memory().total
