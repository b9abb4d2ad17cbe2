"""Merging does not depend on the order of the files, and names what was measured twice."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import factory
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_bench.case import Case
from sasa_bench.cli import cli
from sasa_bench.results.file import Writer, read
from sasa_bench.results.machine import Machine
from sasa_bench.results.merge import MergeConflictError, merge, write
from sasa_bench.results.record import Conditions, ImplInfo, Part, Record, Results, Roof

IMPLS = {
    "unfold": ImplInfo("unfold", "local_attention", "windows", 2),
    "conv3x3": ImplInfo("conv3x3", "convolution", "a convolution", 4),
    "mine.py": ImplInfo("mine", "an op of my own", "from a file", 9),
}


def machine(cores: int = 2, **changes: Any) -> Machine:
    plain: dict[str, Any] = {
        "cpu": "A CPU",
        "cores": cores,
        "isa": ("avx2",),
        "memory_bytes": 1 << 34,
        "gpu": "",
        "driver": "",
        "os": "Linux 6",
        "python": "3.11",
        "libraries": {"torch": "2", "numpy": "2"},
        "environment": {},
        "commit": "abc",
        "dirty": False,
    }
    return Machine(**plain | changes)


cases = st.builds(
    Case,
    kernel_size=st.sampled_from([1, 3, 7, 19]),
    channels=st.sampled_from([8, 64, 512]),
    resolution=st.sampled_from([1, 7, "6x10", 63]),
    mode=st.sampled_from(["forward", "backward", "training"]),
    device=st.sampled_from(["cpu", "cuda"]),
)


def row(case: Case, impl: str = "unfold", on: Machine | None = None, **changes: Any) -> Record:
    plain: dict[str, Any] = {"suite": "s", "op": "local_attention", "status": "ok", "samples_s": (0.1, 0.2)}
    return Record(impl=impl, case=case, machine=(on or machine()).id, **plain | changes)


def results(rows: list[Record], machines: list[Machine], peak: float = 1e9) -> Results:
    roofs = {(m.id, "cpu", "float32", 2): Roof(m.id, "cpu", "float32", 2, peak, 2e9 - peak / 2) for m in machines}
    conditions = [Conditions(machine=m.id, moment="before", at="2026-01-01", load=peak / 1e9) for m in machines]
    infos = {info.name: info for info in IMPLS.values()}
    return Results(rows, {m.id: m for m in machines}, infos, roofs, conditions=conditions)


MACHINES = [machine(), machine(16), machine(commit="def"), machine(libraries={"numpy": "2", "torch": "2"})]

parts = st.lists(
    st.builds(
        lambda rows, peak: results(
            [row(case, impl, on, extra={"b": 1, "a": [2]}) for case, impl, on in rows], MACHINES, peak
        ),
        st.lists(
            st.tuples(cases, st.sampled_from(["unfold", "conv3x3", "mine"]), st.sampled_from(MACHINES[:2])), max_size=8
        ),
        st.sampled_from([1e9, 2e9, 3e9]),
    ),
    min_size=1,
    max_size=4,
)


def merged(*some: Results) -> Results:
    return merge([(str(number), part) for number, part in enumerate(some)]).results


@given(parts, st.randoms())
@settings(max_examples=40)
def test_merging_is_commutative_associative_and_idempotent(some: list[Results], random: Any) -> None:
    whole = merged(*some)
    shuffled = random.sample(some, len(some))
    assert merged(*shuffled) == whole
    assert merged(merged(*some[:2]), merged(*some[2:])) == whole
    assert merged(whole, whole) == whole
    assert len({(r.key, r.machine) for r in whole.rows}) == len(whole.rows)


@given(some=parts, random=st.randoms())
@settings(max_examples=10)
def test_a_merged_file_is_byte_identical_whatever_the_order(
    some: list[Results], random: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    paths = []
    for number, part in enumerate(some):
        paths.append(folder / f"{number}.jsonl")
        with Writer(paths[-1]) as writer:
            for each in part.machines.values():
                writer.machine(each)
            writer.impls(part.impls.values())
            for roof in part.roofs.values():
                writer.roof(roof)
            for found in part.conditions:
                writer.conditions(found)
            writer.rows(random.sample(part.rows, len(part.rows)))

    def through_files(order: list[Path], name: str) -> bytes:
        write(merge([(path.name, read([path])) for path in order]).results, folder / name)
        return (folder / name).read_bytes()

    once = through_files(paths, "once")
    assert through_files(random.sample(paths, len(paths)), "shuffled") == once
    assert through_files([folder / "once", *paths, folder / "shuffled"], "again") == once
    assert not list(folder.glob("*.partial"))


def test_rows_stand_in_the_order_of_the_axes_with_numbers_by_size_and_implementations_as_registered() -> None:
    grid = [Case(resolution=r, mode=m) for r in (7, "6x10", 28) for m in ("forward", "training")]
    wanted = sorted(grid, key=lambda case: (case.height, case.width, case.mode != "forward"))
    mixed = results([row(case, impl) for case in reversed(grid) for impl in ("conv3x3", "unfold")], [machine()])
    assert [(r.case, r.impl) for r in merged(mixed).rows] == [(c, i) for c in wanted for i in ("unfold", "conv3x3")]


def test_a_row_measured_twice_with_different_results_is_refused_and_named_with_its_files() -> None:
    one = results([row(Case(batch=3), started_at="2026-01-01")], [machine()])
    other = results([row(Case(batch=3), samples_s=(0.3,), on=MACHINES[2])], MACHINES[2:3])
    with pytest.raises(MergeConflictError, match="1 row was measured more than once") as refused:
        merge([("a.jsonl", one), ("b.jsonl", other)])
    assert len(refused.value.conflicts) == 1
    for word in ("s, unfold, batch=3", "A-CPU-2c", "a.jsonl (started 2026-01-01)", "b.jsonl"):
        assert word in refused.value.conflicts[0]


def test_unlike_machines_keep_a_row_each() -> None:
    both = [results([row(Case(), on=on)], [on]) for on in MACHINES[:2]]
    assert len(merged(*both).rows) == 2


def test_of_several_roofs_of_a_machine_the_best_stays() -> None:
    found = merged(results([], [machine()], 1e9), results([], [machine()], 3e9))
    (roof,) = found.roofs.values()
    assert (roof.peak_flops_per_s, roof.bandwidth_bytes_per_s) == (3e9, 1.5e9)


def test_merge_knows_everything_that_a_results_file_can_hold() -> None:
    of_reading = {"warnings", "files"}
    assert {f.name for f in fields(Results)} - of_reading == {
        "rows",
        "machines",
        "impls",
        "roofs",
        "parts",
        "conditions",
    }


def store(path: Path, content: Results) -> Path:
    write(content, path)
    return path


def test_the_verb_writes_one_file_and_says_what_it_kept_once(tmp_path: Path) -> None:
    a = store(tmp_path / "a.jsonl", results([row(Case())], [machine()]))
    b = store(tmp_path / "b.jsonl", results([row(Case()), row(Case(batch=1))], [machine()]))
    said = CliRunner().invoke(cli, ["merge", str(a), str(b), "--out", str(tmp_path / "new" / "c.jsonl")])
    assert said.exit_code == 0, said.output
    assert "2 rows from 2 files, 1 kind of machine" in said.output
    assert "kept once: s, unfold, the default case" in said.output
    again = CliRunner().invoke(cli, ["merge", str(a), "--out", str(b)])
    assert again.exit_code
    assert "b.jsonl already exists: list it among the files" in again.output
    assert CliRunner().invoke(cli, ["merge", str(a), str(b), "--out", str(b)]).exit_code == 0
    assert b.read_bytes() == (tmp_path / "new" / "c.jsonl").read_bytes()


def test_the_verb_writes_nothing_on_a_conflict(tmp_path: Path) -> None:
    a = store(tmp_path / "a.jsonl", results([row(Case())], [machine()]))
    b = store(tmp_path / "b.jsonl", results([replace(row(Case()), samples_s=(9.0,))], [machine()]))
    said = CliRunner().invoke(cli, ["merge", str(a), str(b), "--out", str(tmp_path / "c.jsonl")])
    assert isinstance(said.exception, MergeConflictError)
    assert "conflict: s, unfold, the default case" in said.output
    assert not (tmp_path / "c.jsonl").exists()


def test_a_shard_that_no_file_holds_is_named_until_it_is_there(tmp_path: Path) -> None:
    files = []
    for number in (1, 2, 3):
        path = factory.results_file(tmp_path / f"{number}.jsonl", [factory.record(case=Case(batch=number, threads=2))])
        with Writer(path) as writer:
            writer.part(Part(("kernel_size",), 3, number))
        files.append((path.name, read([path])))
    two = merge([files[2], files[0]])
    assert two.missing == ["kernel_size: no file holds 2/3"]
    write(two.results, tmp_path / "two.jsonl")
    whole = merge([("two.jsonl", read([tmp_path / "two.jsonl"])), files[1]])
    assert whole.missing == []
    assert whole.results.parts == set()
    assert merge(files).missing == []


def test_rows_of_one_case_that_were_measured_apart_are_told(tmp_path: Path) -> None:
    one, other = Case(threads=2), Case(kernel_size=9, threads=2)
    made = {
        "a": [factory.record("unfold", case=one), factory.record("conv3x3", case=one)],
        "b": [factory.record("blocked", case=one)],
        "c": [factory.record("blocked", case=other)],
    }
    files = {name: factory.results_file(tmp_path / f"{name}.jsonl", rows) for name, rows in made.items()}
    assert merge([(name, read([files[name]])) for name in "ab"]).apart == 1
    assert merge([(name, read([files[name]])) for name in "ac"]).apart == 0
    said = CliRunner().invoke(cli, ["merge", str(files["a"]), str(files["b"]), "--out", str(tmp_path / "all.jsonl")])
    assert "1 case has rows of several files: ratios between these are not interleaved" in said.output
