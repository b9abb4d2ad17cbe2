from __future__ import annotations

import random
from pathlib import Path

import pytest

from sasa_bench.case import CHOICES, Case, UserError
from sasa_bench.cli import starter
from sasa_bench.library import run
from sasa_bench.timing.prepared import prepare
from sasa_bench.timing.settings import Settings

QUICK = Settings(warmup_s=0.001, sample_s=0.001, budget_s=0.01, least=3, most=7)


def judged(path: Path, case: Case) -> dict[str, object]:
    return prepare(str(path), case, random.randrange(1 << 31), lambda stage: None, {}).row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
@pytest.mark.parametrize("border", CHOICES["border"])
def test_a_new_kernel_is_correct_as_it_is(tmp_path: Path, position: str, border: str, dtype: str) -> None:
    path = tmp_path / "mine.py"
    starter.write(path)
    shape = {"kernel_size": 5, "channels": 12, "heads": 2, "resolution": "4x7", "batch": 2, "threads": 1}
    for mode in CHOICES["mode"]:
        row = judged(path, Case(position=position, border=border, dtype=dtype, mode=mode, **shape))
        assert (row["status"], row["reason"]) == ("ok", "")
    if position != "absolute":
        row = judged(path, Case(scope="core", position=position, border=border, dtype=dtype, mode="training", **shape))
        assert (row["status"], row["reason"]) == ("ok", "")


def test_it_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "swift_kernel.py"
    starter.write(path)
    assert "my_kernel" not in path.read_text()
    assert '"swift_kernel"' in path.read_text()


def test_a_forward_only_kernel_is_skipped_in_training_and_measured_forward(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    starter.write(path)
    text = path.read_text()
    changed = text.replace(
        "    return None\n\n\ndef missing",
        '    return "no backward pass" if case.mode != "forward" else None\n\n\ndef missing',
    )
    assert changed != text
    path.write_text(changed)
    cases = [Case(channels=8, heads=2, resolution=5, threads=1, mode=mode) for mode in CHOICES["mode"]]
    rows = run(cases, impls=[path], settings=QUICK)
    assert list(zip(rows["mode"], rows["status"], rows["reason"], strict=True)) == [
        ("forward", "ok", ""),
        ("backward", "skipped", "no backward pass"),
        ("training", "skipped", "no backward pass"),
    ]
    assert rows["time_median_s"].notna().tolist() == [True, False, False]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("precious = 1\n")
    with pytest.raises(UserError, match="already exists"):
        starter.write(path)
    assert path.read_text() == "precious = 1\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kernel", r"give a \.py file"),
        ("my-kernel.py", r"give a \.py file"),
        ("2.py", r"give a \.py file"),
        ("unfold.py", "already an implementation"),
        ("nowhere/mine.py", "cannot be written"),
    ],
)
def test_a_name_that_will_not_do_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        starter.write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
