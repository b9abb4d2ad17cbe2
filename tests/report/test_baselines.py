from __future__ import annotations

from pathlib import Path
from statistics import median

import factory
import pytest

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.report.table import load
from sasa_bench.results.record import Record

CASE = Case(kernel_size=7, threads=2)
THREE = ops.get("convolution").cost(CASE.with_(kernel_size=3))


def convolution(impl: str, median_s: float, **changes: object) -> Record:
    """A 3 x 3 convolution of any name."""
    return factory.record(impl, median_s, **{"op": "convolution", "case": CASE, "flops": THREE.flops} | changes)


def test_the_fastest_convolution_of_the_case_is_the_one_compared_with(tmp_path: Path) -> None:
    rows = [
        factory.record("unfold", 0.012, case=CASE),
        convolution("conv3x3", 0.006),
        convolution("conv3x3_channels_last", 0.005),
        convolution("onnx_conv3x3", 0.004),
        convolution("conv1x1", 0.001, flops=ops.get("convolution").cost(CASE.with_(kernel_size=1)).flops),
        convolution("conv_kxk", 0.002, flops=ops.get("convolution").cost(CASE).flops),
    ]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows)).set_index("impl")
    assert set(table.best_conv3x3) == {"onnx_conv3x3"}
    best, plain = (median(next(r for r in rows if r.impl == n).samples_s) for n in ("onnx_conv3x3", "conv3x3"))
    time = median(rows[0].samples_s)
    assert table.time_vs_best_conv3x3["unfold"] == pytest.approx(time / best)
    assert table.time_vs_conv3x3["unfold"] == pytest.approx(time / plain)
    for name in ("time_vs_conv3x3", "time_vs_best_conv3x3"):
        row = table.loc["unfold"]
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert table.loc["onnx_conv3x3", ["time_vs_best_conv3x3_low", "time_vs_best_conv3x3_high"]].tolist() == [1, 1]


def test_one_that_failed_is_no_baseline(tmp_path: Path) -> None:
    rows = [
        factory.record("unfold", 0.012, case=CASE),
        convolution("conv3x3", 0.006),
        factory.failed("conv3x3_packed", "wrong", "y is off", op="convolution", case=CASE),
    ]
    table = load(factory.results_file(tmp_path / "a.jsonl", rows)).set_index("impl")
    assert table.best_conv3x3["unfold"] == "conv3x3"
    assert table.time_vs_best_conv3x3.isna()["conv3x3_packed"]


def test_rows_of_two_files_or_of_two_versions_of_torch_are_never_compared(tmp_path: Path) -> None:
    first = factory.results_file(tmp_path / "a.jsonl", [factory.record("unfold", case=CASE)])
    second = factory.results_file(tmp_path / "b.jsonl", [convolution("conv3x3", 0.006)])
    assert load(first, second).time_vs_conv3x3.isna()[0]
    newer = factory.machine(libraries={"torch": "2.14.0"})
    rows = [factory.record("unfold", case=CASE), convolution("conv3x3", 0.006, machine=newer.id)]
    assert load(factory.results_file(tmp_path / "c.jsonl", rows)).time_vs_conv3x3.isna()[0]


def test_over_several_workers_the_interval_is_that_of_their_ratios(tmp_path: Path) -> None:
    """Both drift together from worker to worker, by half: the ratio is known far better than either time."""
    drift = [1.0, 1.5, 1.2, 0.8, 1.1]
    noise = [1.0, 1.01, 0.99, 1.0, 1.02]
    rows = [
        factory.record("unfold", case=CASE, samples_s=tuple(0.01 * d for d in drift), worker_samples=(1,) * 5),
        convolution("conv3x3", 0, samples_s=tuple(0.005 * d * n for d, n in zip(drift, noise, strict=True))),
    ]
    rows[1] = convolution("conv3x3", 0, samples_s=rows[1].samples_s, worker_samples=(1,) * 5)
    row = load(factory.results_file(tmp_path / "a.jsonl", rows)).set_index("impl").loc["unfold"]
    assert 1.9 < row.time_vs_conv3x3_low < 2 < row.time_vs_conv3x3_high < 2.05
