"""Results files side by side: each has a letter, and what is compared is what both measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import factory
import pytest

from sasa_bench.case import Case
from sasa_bench.cli import main
from sasa_bench.report import compare, index, report
from sasa_bench.report.findings import answers
from sasa_bench.report.table import frame
from sasa_bench.results.file import ResultsError, Writer, read


def test_more_files_than_letters_are_all_compared(tmp_path: Path) -> None:
    paths = [factory.results_file(tmp_path / f"{n:02}.jsonl", [factory.record("unfold", 0.01 + n)]) for n in range(29)]
    runs = compare.load(paths)
    assert [run.letter for run in runs][24:] == ["Y", "Z", "AA", "AB", "AC"]
    page = compare.html(runs)
    assert all(f"{run.label} next to" in page for run in runs[1:])


def test_every_core_of_one_machine_is_set_against_every_core_of_another_and_nothing_else(tmp_path: Path) -> None:
    runs = []
    for cores in (2, 8):
        made_on = factory.machine(cpu=f"CPU of {cores}", cores=cores)
        rows = [
            factory.record("unfold", 0.01 * threads, case=Case(threads=threads), machine=made_on.id)
            for threads in (1, cores)
        ]
        runs.append(factory.results_file(tmp_path / f"{cores}.jsonl", rows, made_on))
    first, other = compare.load(runs)
    pairs = [(pair.a.case.threads, pair.b.case.threads) for pair in compare._pairs(first, other, False)]
    assert sorted(pairs) == [(1, 1), (2, 8)]


def test_the_answers_to_two_files_compare_no_row_of_one_with_a_row_of_the_other(tmp_path: Path) -> None:
    case = Case(threads=2)
    paths = [
        factory.results_file(tmp_path / f"{name}.jsonl", [factory.record(name, 0.01, case=case)])
        for name in ("conv3x3", "unfold")
    ]
    both = read(paths)
    assert (answers(both, frame(both)).verdict, answers(both, frame(both)).tiles) == ("", [])
    one = read([factory.results_file(tmp_path / "c.jsonl", [row for path in paths for row in read([path]).rows])])
    assert answers(one, frame(one)).verdict


def test_rows_of_a_machine_that_no_line_describes_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = factory.results_file(tmp_path / "a.jsonl", [factory.record()])
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "machine"]
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "b.jsonl").write_text(path.read_text())
    for use in (
        lambda: report.html(read([path])),
        lambda: compare.load([path, tmp_path / "b.jsonl"]),
        lambda: index.write(tmp_path),
    ):
        with pytest.raises(ResultsError, match="no line of kind machine describes"):
            use()
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--choose-from", str(path)])
    assert stop.value.code == 1
    assert "no line of kind machine describes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "a.jsonl", "b.jsonl", "--compare", "--figures", "figures"], "drop --compare"),
        (["run", "smoke", "--slurm", "partition=x", "--keep-models", "models"], "--keep-models keeps files"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        factory.results_file(tmp_path / f"{name}.jsonl", [factory.record()])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    assert words in capsys.readouterr().err


def test_a_baseline_of_another_environment_is_not_taken(tmp_path: Path) -> None:
    """Rows of one file, made on one machine with two versions of torch."""
    other = factory.machine(libraries={"torch": "2.14.0"})
    paths = []
    for name, cpu in (("a", "Test CPU"), ("b", "Another CPU")):
        here, there = (replace(machine, cpu=cpu) for machine in (factory.machine(), other))
        rows = [factory.record("unfold", machine=here.id), factory.record("conv3x3", machine=there.id)]
        path = factory.results_file(tmp_path / f"{name}.jsonl", rows, here)
        with Writer(path) as writer:
            writer.machine(there)
        paths.append(path)
    said = compare.html(compare.load(paths))
    assert "No case has `conv3x3` and another implementation ok in both files." in said or (
        "No case has <code>conv3x3</code> and another implementation ok in both files." in said
    )
