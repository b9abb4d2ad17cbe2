"""The study of intervals counts what it says: pairs of files, cases and implementations, and those that contradict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import disjoint_intervals
import factory
import pytest
from disjoint_intervals import compare

from sasa_bench.case import Case, UserError
from sasa_bench.report.table import load


def run_of(path: Path, unfold_s: float, packed_s: float = 0.02) -> Path:
    """A file of two cases with three implementations each; times scatter by 1 % over three workers."""
    rows = []
    for kernel_size in (5, 7):
        case = Case(kernel_size=kernel_size, threads=2)
        for impl, seconds in (("unfold", unfold_s), ("conv3x3", 0.01), ("conv3x3_packed", packed_s)):
            flops = {"flops": factory.record("conv3x3", case=case).flops} if impl == "conv3x3_packed" else {}
            op = {"op": "convolution"} if impl == "conv3x3_packed" else {}
            samples = tuple(seconds * (1 + share) for share in (-0.01, 0.0, 0.01) for _ in range(7))
            if impl != "unfold":
                samples = (seconds,) * 21
            more = {"samples_s": samples, "worker_samples": (7, 7, 7), **flops, **op}
            rows.append(factory.record(impl, case=case, **more))
    return factory.results_file(path, rows)


def test_intervals_without_a_common_value_are_counted_in_every_pair_of_files(tmp_path: Path) -> None:
    paths = [run_of(tmp_path / f"{name}.jsonl", at) for name, at in {"a": 0.02, "b": 0.0201, "c": 0.03}.items()]
    found = compare([load(path) for path in paths], [path.name for path in paths])
    count, disjoint = found["time_vs_conv3x3"]
    assert count == 3 * 2 * 2  # three pairs of files, two cases, unfold and conv3x3_packed
    assert len(disjoint) == 2 * 2  # unfold of c against a and against b
    assert all("impl=unfold" in pair.where and "c.jsonl" in pair.where for pair in disjoint)
    for pair in disjoint:
        assert pair.first[1] < pair.second[0]


def test_the_ratio_to_the_best_counts_only_where_both_files_have_the_same_best(tmp_path: Path) -> None:
    same = [load(run_of(tmp_path / f"{name}.jsonl", 0.03)) for name in "ab"]
    assert compare(same, "ab")["time_vs_best_conv3x3"][0] == 2 * 2
    other = load(run_of(tmp_path / "c.jsonl", 0.03, packed_s=0.005))
    assert compare([same[0], other], "ac")["time_vs_best_conv3x3"] == (0, [])


def test_a_ratio_without_an_interval_is_not_counted(tmp_path: Path) -> None:
    first, second = (load(run_of(tmp_path / f"{name}.jsonl", at)) for name, at in {"a": 0.02, "b": 0.03}.items())
    unknown = first["impl"] == "unfold"
    first.loc[unknown, ["time_vs_conv3x3_low", "time_vs_conv3x3_high"]] = (0.0, float("inf"))
    assert compare([first, second], "ab")["time_vs_conv3x3"] == (2, [])  # conv3x3_packed in both cases


def test_files_of_two_machines_are_refused(tmp_path: Path) -> None:
    here = load(run_of(tmp_path / "a.jsonl", 0.02))
    elsewhere = here.assign(machine="another")
    with pytest.raises(UserError, match="more than one machine"):
        compare([here, elsewhere], "ab")


def test_the_command_prints_the_share_and_the_pairs(tmp_path: Path) -> None:
    files = [str(run_of(tmp_path / f"{name}.jsonl", at)) for name, at in {"a": 0.02, "c": 0.03}.items()]
    done = subprocess.run(
        [sys.executable, disjoint_intervals.__file__, "--list", *files], capture_output=True, text=True, check=True
    )
    assert "time_vs_conv3x3: 2 of 4 pairs of intervals are disjoint (50.00%)" in done.stdout
    assert "suite=kernel_size, impl=unfold" in done.stdout
