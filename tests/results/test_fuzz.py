"""Files that are damaged, made up or hostile: a table or one clear error, never a traceback, within a second."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import factory
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasa_bench.case import UserError
from sasa_bench.report.findings import answers
from sasa_bench.report.table import frame, has_parquet, render
from sasa_bench.results.file import read
from sasa_bench.results.record import STATUSES

MUTANTS = 2000
STRANGE: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, -1e-320, math.nan, math.inf, "", "x" * 10_000, "\x1b[2J\x00\u202e", "=1+1",
    "\ud800", [], [[]], [None], {}, {"a": {"b": []}}, "unfold", "conv3x3", "../../x", [1, "2"], "ok", "12",
]  # fmt: skip
"""Values to put where another belongs."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a small results file that is in order."""
    extra = {"build_s": 0.5, "clock": 0.9, "node_count": 12, "tile": 8, "note": "auto", "disturbed": 0.01}
    rows = [
        *factory.sweep()[:6],
        factory.record("gathered", 0.02, worker_samples=(7, 7, 7), cold_samples_s=(0.03, 0.04), extra=extra),
        factory.failed("naive", "error", "boom"),
    ]
    return factory.results_file(tmp_path_factory.mktemp("whole") / "a.jsonl", rows).read_text().splitlines()


def swap_value(text: str, rng: random.Random) -> str:
    """The line with the value at a random place replaced, removed or added."""
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("no line of a results file")
    place: Any = line
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return json.dumps(line)
        key = rng.choice(list(keys))
        if isinstance(place[key], (dict, list)) and rng.random() < 0.6:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        elif isinstance(place, dict) and rng.random() < 0.2:
            place[str(rng.choice(STRANGE))] = place[key]
        else:
            place[key] = rng.choice(STRANGE)
        return json.dumps(line)


def mutant(lines: list[str], seed: int) -> bytes:
    """The content of a damaged file."""
    rng = random.Random(seed)
    found = list(lines)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found))
        damage = rng.randrange(8)
        if damage < 3:
            with contextlib.suppress(ValueError, RecursionError):  # damaged already
                found[at] = swap_value(found[at], rng)
        elif damage == 3:
            rng.shuffle(found)
        elif damage == 4:
            found.insert(rng.randrange(len(found)), found[at])
        elif damage == 5:
            found[at] = found[at][: rng.randrange(len(found[at]) + 1)] or "{"
        elif damage == 6:
            found[at] = rng.choice(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "null", '"x"', "\\", "1e999", "\x85"])
        else:
            del found[at]
            found = found or ["{}"]
    content = "\n".join(found).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = rng.choice(
            [content.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + content, content[7:]]
        )
    if rng.random() < 0.3:
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.randbytes(rng.randint(0, 3)) + content[at + rng.randint(0, 3) :]
    return content + b"\n" * rng.randint(0, 1)


FORMS = ("csv", "text", "markdown", *(["parquet"] if has_parquet() else []))


@pytest.mark.slow
def test_a_damaged_file_is_a_right_table_or_one_clear_error(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = {row.key for row in read_lines(path, lines)}
    outcomes = {"read": 0, "refused": 0}
    for form in FORMS:
        render(frame(read([path])), form)  # imports what reading needs, which takes longer than reading
    slowest = 0.0
    unclear: list[str] = []

    @settings(max_examples=MUTANTS, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 1 << 40))
    def check(seed: int) -> None:
        nonlocal slowest
        path.write_bytes(mutant(lines, seed))
        started = time.process_time()
        try:
            results = read([path])
            if results.rows and seed % 4 == 0:
                table = frame(results)
                assert len(table) == len({(row.key, row.machine) for row in results.rows})
                if seed % 40 == 0:
                    for form in FORMS:
                        render(table, form)
                    answers(results, table)
        except UserError as error:
            outcomes["refused"] += 1
            if not str(error).isprintable():
                unclear.append(str(error))
        else:
            outcomes["read"] += 1
            for row in results.rows:
                assert row.status in STATUSES
                assert all(math.isfinite(seconds) and seconds > 0 for seconds in row.samples_s)
                assert "\x1b" not in f"{row.suite}{row.impl}{row.reason}{row.extra}"
        slowest = max(slowest, time.process_time() - started)

    check()
    assert whole
    assert outcomes["read"] > MUTANTS / 20
    assert outcomes["refused"] > MUTANTS / 20
    assert slowest < 1.0
    assert not unclear


def read_lines(path: Path, lines: list[str]) -> Any:
    """The rows of a file with these lines."""
    path.write_text("\n".join(lines) + "\n")
    return read([path]).rows
