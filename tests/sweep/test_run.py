"""What the loop of a run makes of what a worker reports."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import factory
import pytest
from tasks import INFOS, SUITE

from sasa_bench.results.record import Record
from sasa_bench.sweep.plan import Plan, Task
from sasa_bench.sweep.run import Summary, _record

TASK = Task(SUITE.name, SUITE.cases[0], tuple(INFOS))


def row(values: dict[str, Any]) -> Record:
    return _record(Plan([TASK], 0, INFOS), TASK, "unfold", factory.machine(), values)


def test_a_row_reads_back_as_it_is() -> None:
    found = row({"status": "ok", "samples_s": [0.25, 0.5], "extra": {"gain": 2.0}})
    assert (found.worker_samples, found.extra, found.machine) == ((2,), {"gain": 2.0}, factory.machine().id)
    assert Record.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"status": "skipped", "reason": 7}, "reason = 7 is no str"),
        ({"status": "ok", "samples_s": [0.0]}, "a time of 0 s"),
        ({"status": "ok", "flops": 1 << 70}, "flops = a huge number is out of range"),
        ({"status": "ok", "extra": {"gain": float("nan")}}, "not JSON compliant"),
        ({"status": "perfect"}, "'perfect' is not one of"),
        ({"status": "ok", "bogus": 1}, "bogus"),
    ],
)
def test_what_no_reader_takes_is_a_row_with_that_reason(values: dict[str, Any], words: str) -> None:
    found = row(values)
    assert (found.status, found.samples_s) == ("error", ())
    assert found.reason.startswith("its figures cannot be stored: ")
    assert words in found.reason
    assert Record.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_a_later_worker_finds_replaces_what_the_first_one_counted() -> None:
    summary = Summary(2, 0)
    first = [factory.record("unfold"), factory.record("conv3x3")]
    summary.take(first)
    assert (dict(summary.counts), summary.done) == ({"ok": 2}, 2)
    failed = first[0].joined({"status": "wrong", "reason": "another answer"})
    summary.take([failed, replace(first[1], samples_s=(0.1, 1.0, 9.0) * 7)])
    assert (dict(summary.counts), summary.done, summary.noisy) == ({"ok": 1, "wrong": 1}, 2, 1)
