"""Timing on a GPU, with a made-up stream whose clock moves only when work runs, and a made-up NVML."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_nvml import FakeNvml
from fake_stream import Stream
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_bench.case import Case
from sasa_bench.timing import child, nvml, prepared
from sasa_bench.timing import child as worker
from sasa_bench.timing import cuda as gpu
from sasa_bench.timing.process import Request
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step

SETTINGS = Settings(warmup_s=0.0, sample_s=0.01, budget_s=0.1, least=7, most=21)
POWER = FakeNvml.nvmlClocksEventReasonSwPowerCap
HEAT = FakeNvml.nvmlClocksEventReasonHwThermalSlowdown


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "COOL_DOWN_S", 0.0)


def test_hot_and_cold_samples_are_told_apart() -> None:
    stream = Stream()
    steps = {"a": stream.step("a", 0.002, 0.005), "b": stream.step("b", 0.001, 0.004)}
    rows = gpu.sample(stream.device(), steps, SETTINGS)
    for name, hot_s, cold_s in (("a", 0.002, 0.005), ("b", 0.001, 0.004)):
        row = rows[name]
        assert row["cold_samples_s"] == pytest.approx([cold_s] * SETTINGS.least)
        assert row["samples_s"] == pytest.approx([hot_s] * SETTINGS.least)
        assert row["inner_count"] >= 2
        assert "status" not in row


def test_the_flush_is_queued_before_the_first_event_and_only_when_cold() -> None:
    stream = Stream()
    gpu.sample(stream.device(), {"a": stream.step("a", 0.002, 0.005)}, SETTINGS)
    whole = " ".join(stream.queued)
    assert whole.count("flush") == SETTINGS.least
    assert whole.count("flush pause event a event synchronize") == SETTINGS.least
    hot, _, cold = whole.partition("flush")
    assert hot.count("event") > 2 * SETTINGS.least
    assert cold.count("event") == 2 * SETTINGS.least


def test_without_nvml_timing_goes_on_and_what_it_would_tell_is_absent() -> None:
    stream = Stream()
    row = gpu.sample(stream.device(), {"a": stream.step("a", 0.002, 0.002)}, SETTINGS)["a"]
    assert set(row["extra"]) == {"queue_s", "eager_s", "replayed"}
    assert row["samples_s"]


def throttled_in(share: float, seed: int = 0) -> tuple[Stream, FakeNvml]:
    """A stream on a GPU that is throttled in about `share` of the samples."""
    draw = random.Random(seed)
    library = FakeNvml(sm_mhz=1500)

    def change() -> None:
        library.reasons = HEAT if draw.random() < share else 0

    library.on_reasons = change
    return Stream(library), library


def test_throttled_samples_are_thrown_away_and_counted() -> None:
    library = FakeNvml(sm_mhz=1500)
    stream = Stream(library)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        library.reasons = HEAT if calls % 3 == 0 else 0
        stream.run(0.09 if library.reasons else 0.03)

    row = gpu.sample(stream.device(), {"a": step}, SETTINGS)["a"]
    assert row["samples_s"] == pytest.approx([0.03] * len(row["samples_s"]))
    assert row["cold_samples_s"] == pytest.approx([0.03] * len(row["cold_samples_s"]))
    assert row["extra"]["throttled_samples"] >= 3
    assert row["extra"]["sm_clock_mhz"] == 1500


def test_a_gpu_that_is_throttled_as_a_rule_gives_a_reason_and_no_time() -> None:
    stream, _ = throttled_in(1.0)
    steps = {"a": stream.step("a", 0.02, 0.02), "b": stream.step("b", 0.02, 0.02)}
    rows = gpu.sample(stream.device(), steps, SETTINGS)
    for row in rows.values():
        assert row["status"] == "error"
        assert "heat, by hardware" in row["reason"]
        assert "nvidia-smi --lock-gpu-clocks" in row["reason"]
        assert 3 <= row["extra"]["throttled_samples"] <= SETTINGS.most_discarded
        assert "samples_s" not in row


def test_samples_end_however_often_the_gpu_is_throttled() -> None:
    for seed in range(20):
        stream, library = throttled_in(random.random(), seed)
        asked = 0
        change = library.on_reasons

        def count(change: Callable[[], None] = change) -> None:
            nonlocal asked
            asked += 1
            change()

        library.on_reasons = count
        gpu.sample(stream.device(), {"a": stream.step("a", 0.001, 0.001)}, SETTINGS)
        # Two looks a sample; no more samples are thrown away than are kept, or than the settings allow.
        assert asked <= 3 * 2 * (2 * SETTINGS.most + SETTINGS.most_discarded) + 100


def test_samples_under_the_power_limit_stay_and_are_counted() -> None:
    library = FakeNvml(reasons=POWER, sm_mhz=1200)
    stream = Stream(library)
    row = gpu.sample(stream.device(), {"a": stream.step("a", 0.02, 0.02)}, SETTINGS)["a"]
    assert "status" not in row
    assert row["extra"]["throttled_samples"] == 0
    assert row["extra"]["power_limited_samples"] == len(row["samples_s"]) + len(row["cold_samples_s"])
    assert row["extra"]["sm_clock_mhz"] == 1200


def test_hot_and_cold_calls_are_replays_and_eager_ones_stand_beside() -> None:
    stream = Stream()
    device = stream.device()
    hot_s, launch_s = 0.002, 0.003

    def eager() -> None:
        stream.run(hot_s + launch_s)

    def replay() -> None:
        stream.run(hot_s)

    row = gpu.sample(replace(device, capture=lambda step: replay), {"a": eager}, SETTINGS)["a"]
    assert row["samples_s"] == pytest.approx([hot_s] * len(row["samples_s"]))
    assert row["cold_samples_s"] == pytest.approx([hot_s] * len(row["cold_samples_s"]))
    assert row["extra"]["eager_s"] == pytest.approx(hot_s + launch_s)
    assert row["extra"]["replayed"] == 1


def test_a_step_that_cannot_be_captured_is_timed_eagerly() -> None:
    stream = Stream()

    def refuse(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    row = gpu.sample(replace(stream.device(), capture=refuse), {"a": stream.step("a", 0.002, 0.005)}, SETTINGS)["a"]
    assert row["extra"]["replayed"] == 0
    assert row["samples_s"] == pytest.approx([0.002] * len(row["samples_s"]))


@pytest.mark.parametrize(("mode", "replayed"), [("forward", 1), ("training", 1), ("backward", 0)])
def test_a_backward_pass_alone_is_not_captured(mode: str, replayed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(gpu, "current", stream.device)
    case = Case(device="cuda", mode=mode)
    row = worker._sample(case, {"a": stream.step("a", 0.002, 0.005)}, {}, SETTINGS, lambda name: None, 0)["a"]
    assert row["extra"]["replayed"] == replayed


def test_a_graph_of_short_calls_holds_many_so_that_its_replay_does_not_count() -> None:
    stream = Stream()
    call_s, replay_s = 5e-6, 6e-6

    def capture(step: Step) -> Step:
        def replay() -> None:
            stream.now_s += replay_s
            step()

        return replay

    def step() -> None:
        stream.run(call_s)

    row = gpu.sample(replace(stream.device(), capture=capture), {"a": step}, SETTINGS)["a"]
    assert row["extra"]["replayed"] == gpu.MANY
    assert statistics.median(row["samples_s"]) == pytest.approx(call_s + replay_s / gpu.MANY)
    assert row["inner_count"] % gpu.MANY == 0
    assert statistics.median(row["cold_samples_s"]) == pytest.approx(call_s + replay_s)


def test_the_pause_before_a_cold_call_outlasts_its_queuing() -> None:
    stream = Stream()

    def slow_to_queue() -> None:
        time.sleep(0.002)
        stream.run(0.001)

    gpu.sample(stream.device(), {"a": slow_to_queue}, Settings(warmup_s=0.0, sample_s=0.002, budget_s=0.01, least=3))
    assert stream.paused_s >= 2 * 0.002


def test_a_sticky_error_is_told_from_an_error_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not gpu.broken("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu.broken("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert gpu.broken("cuda")


@pytest.mark.parametrize("broken", [True, False])
def test_an_error_that_breaks_the_device_ends_the_worker_and_blames_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], broken: bool
) -> None:
    said: list[tuple[str, str]] = []
    row = {"status": "error", "reason": "RuntimeError: an illegal memory access was encountered"}
    monkeypatch.setattr(prepared, "prepare", lambda *arguments: prepared.Prepared(row, None))
    monkeypatch.setattr(gpu, "broken", lambda device: broken)
    monkeypatch.setattr(child.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    request = Request(Case(device="cuda"), ("bad", "good"), 0, {})
    found = child._measure(request, lambda impl, stage: said.append((impl, stage)))
    if broken:
        with pytest.raises(SystemExit):
            list(found)
        assert {impl for impl, _ in said} == {"bad"}
        assert "an illegal memory access was encountered; it broke the CUDA context" in capfd.readouterr().err
    else:
        assert [name for name, _ in found] == ["bad", "good"]


def test_a_gpu_throttled_for_one_implementation_keeps_the_others() -> None:
    library = FakeNvml()
    stream = Stream(library)

    def hungry() -> None:
        library.reasons = HEAT
        stream.run(0.02)

    def modest() -> None:
        library.reasons = 0
        stream.run(0.02)

    rows = gpu.sample(stream.device(), {"hungry": hungry, "modest": modest}, SETTINGS)
    assert rows["hungry"]["status"] == "error"
    assert rows["modest"]["extra"]["throttled_samples"] == 0
    assert len(rows["modest"]["samples_s"]) >= SETTINGS.least


def test_the_energy_of_a_call_is_read_over_a_long_block() -> None:
    library = FakeNvml()
    stream = Stream(library)
    step = stream.step("a", 0.004, 0.004)
    row = gpu.sample(stream.device(), {"a": step}, Settings(warmup_s=0.0, energy_s=2.0))["a"]
    assert row["extra"]["energy_j"] == pytest.approx(0.004 * 250, rel=0.01)
    assert "energy_j" not in gpu.sample(stream.device(), {"a": step}, SETTINGS)["a"]["extra"]


def test_a_gpu_without_an_energy_counter_has_no_energy() -> None:
    stream = Stream(FakeNvml(unsupported={"nvmlDeviceGetTotalEnergyConsumption"}))
    row = gpu.sample(stream.device(), {"a": stream.step("a", 0.004, 0.004)}, Settings(warmup_s=0.0, energy_s=2.0))["a"]
    assert "energy_j" not in row["extra"]


def test_what_fails_is_announced_last() -> None:
    stream = Stream()
    said: list[str] = []

    def fails() -> None:
        if "flush" in stream.queued:
            raise ValueError("no luck")
        stream.run(0.02)

    with pytest.raises(ValueError, match="no luck"):
        gpu.sample(stream.device(), {"a": stream.step("a", 0.02, 0.02), "bad": fails}, SETTINGS, said.append)
    assert said[-1] == "bad"


def test_the_worker_times_cuda_by_this_module_and_the_cpu_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(FakeNvml())
    monkeypatch.setattr(gpu, "current", stream.device)
    settings = replace(SETTINGS, budget_s=0.5)
    rows = worker._sample(Case(device="cuda"), {"a": stream.step("a", 0.02, 0.05)}, {}, settings, lambda name: None, 0)
    assert rows["a"]["cold_samples_s"] == pytest.approx([0.05] * SETTINGS.least)
    matrix = torch.ones(64, 64)
    rows = worker._sample(Case(), {"a": lambda: matrix @ matrix}, {}, Settings(budget_s=0.01), lambda name: None, 0)
    assert set(rows["a"]) == {"inner_count", "samples_s", "cold_samples_s", "extra"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_gpu_a_copy_that_fits_into_the_cache_is_slower_when_cold() -> None:
    device = gpu.current()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    source = torch.ones(cache // 8, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    row = gpu.sample(device, {"copy": lambda: target.copy_(source)}, Settings(energy_s=2.0))["copy"]
    assert 0 < statistics.median(row["samples_s"]) < statistics.median(row["cold_samples_s"])
    if device.watch is not None and device.watch.energy_j() is not None:
        assert row["extra"]["energy_j"] > 0


def test_cold_times_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    import factory

    from sasa_bench.report.table import load
    from sasa_bench.results.columns import COLUMNS

    extra = {"throttled_samples": 2, "energy_j": 0.5}
    gpu_row = factory.record("unfold", 0.01, noise=0.0, cold_samples_s=(0.02, 0.03, 0.04), extra=extra)
    table = load(factory.results_file(tmp_path / "a.jsonl", [gpu_row, factory.record("conv3x3")]))
    new = ["differs", "time_cold_s", "time_cold_p20_s", "time_cold_p80_s", "throttled_samples", "energy_j"]
    assert list(table.columns) == [*COLUMNS, *new]
    row = table[table.impl == "unfold"].iloc[0]
    assert (row.time_median_s, row.time_cold_s, row.throttled_samples) == (pytest.approx(0.01), 0.03, 2)
    assert 0.02 < row.time_cold_p20_s < 0.03 < row.time_cold_p80_s < 0.04
    assert table[table.impl == "conv3x3"].time_cold_s.isna().all()
    without = load(factory.results_file(tmp_path / "b.jsonl", [factory.record("conv3x3")]))
    assert "time_cold_s" not in without.columns


def test_the_flush_writes_one_buffer_and_reads_another_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_bytes = 4096
    properties = SimpleNamespace(L2_cache_size=cache_bytes, uuid="none")
    zeros, empty = torch.zeros, torch.empty
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    monkeypatch.setattr(nvml, "find", absent_nvml)
    touched: dict[str, tuple[int, int]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            touched[func.overloadpacket.__name__] = (args[0].data_ptr(), args[0].nbytes)
            return func(*args, **(kwargs or {}))

    device = gpu.current()
    with Watch():
        device.flush()
    (written, written_bytes), (read, read_bytes) = touched["zero_"], touched["amin"]
    assert written != read
    assert min(written_bytes, read_bytes) >= 2 * cache_bytes


def absent_nvml(name: str) -> None:
    raise nvml.NvmlAbsentError("no NVML here")
