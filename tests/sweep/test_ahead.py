"""What several processes make before a run measures."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.results.environment import EXPORTS
from sasa_bench.results.record import ImplInfo
from sasa_bench.sweep import ahead
from sasa_bench.sweep.plan import Plan, Task
from sasa_bench.sweep.workers import Workers
from sasa_bench.timing.process import Request

needs_onnx = pytest.mark.skipif(impls.get("onnx").missing() is not None, reason=str(impls.get("onnx").missing()))
CASES = [Case(channels=8, heads=2, resolution=5, batch=1, threads=1, kernel_size=k) for k in (3, 5)]
DYING = """
import os, signal
from dataclasses import replace
from sasa_bench.impls import get
IMPL = replace(get("onnx"), name="dying", ahead=lambda case, tensors: os.kill(os.getpid(), signal.SIGKILL))
"""


def planned(*specs: str) -> Plan:
    exporting = {spec: ImplInfo(spec, "local_attention", "", 0, exports="unfold") for spec in specs}
    plain = ImplInfo("unfold", "local_attention", "", 9)
    return Plan([Task("s", case, ("unfold", *specs)) for case in CASES], 0, exporting | {"unfold": plain})


def test_native_code_comes_first_then_each_export_and_nothing_where_there_are_few() -> None:
    work = planned("onnx", "onnx_conv3x3")
    first, *exports = ahead.questions(work, [1, 2])
    assert first["do"] == "compile"
    assert [(one["impl"], one["seed"]) for one in exports] == [
        ("onnx", 1),
        ("onnx_conv3x3", 1),
        ("onnx", 2),
        ("onnx_conv3x3", 2),
    ]
    assert ahead.questions(planned("onnx"), [1, 2]) == []


@needs_onnx
def test_what_was_made_ahead_is_what_the_measuring_worker_uses_even_where_one_process_died(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    work = planned("onnx", str(tmp_path / "dying.py"))
    said: list[int] = []
    with Workers(60.0, {EXPORTS: str(tmp_path / "made")}) as workers:
        ahead.make_ahead(work, [1, 2], workers, said.append)
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
        assert sorted(path.suffix for path in made) == [".json", ".json", ".onnx", ".onnx"]
        assert said == sorted(said, reverse=True)
        assert workers.spent_s["build"] > 0
        for task, seed in zip(work.tasks, [1, 2], strict=True):
            settings = {"budget_s": 0.01, "least": 3}
            ((_, row),) = workers.get().measure(Request(task.case, ("onnx",), seed, settings))
            assert row["status"] == "ok"
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()} == made


def test_an_interruption_ends_the_processes() -> None:
    def interrupt(left: int) -> None:
        raise KeyboardInterrupt

    with Workers(60.0) as workers, pytest.raises(KeyboardInterrupt):
        ahead.make_ahead(planned("onnx", "onnx_conv3x3"), [1, 2], workers, interrupt)
    assert not [child for child in psutil.Process().children() if "sasa_bench.worker" in " ".join(child.cmdline())]
