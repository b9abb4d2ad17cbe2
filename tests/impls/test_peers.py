"""Other people's ways to local attention: what each computes, what it refuses, and that readers mark what differs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import factory
import pytest
import torch
from agreement import agree

from sasa_bench import impls, ops
from sasa_bench.case import Case
from sasa_bench.ops.halo_attention import halo_block
from sasa_bench.ops.tensors import leaves, random_tensors, step
from sasa_bench.report import report, sections
from sasa_bench.report.findings import answers
from sasa_bench.report.table import footnotes, frame, marked, render
from sasa_bench.results.file import Writer, read
from sasa_bench.results.record import DIFFERS, ImplInfo, Record, Results
from sasa_bench.suite import load
from sasa_bench.timing.check import compute_reference
from sasa_bench.timing.prepared import prepare

HALO_ATTENTION = ops.get("halo_attention")
LOCAL_ATTENTION = ops.get("local_attention")
NEIGHBORHOOD_ATTENTION = ops.get("neighborhood_attention")
PER_CHANNEL_ATTENTION = ops.get("per_channel_attention")

DIFFERING = [name for name in impls.names() if impls.get(name).info.differs]
TINY = Case(channels=8, heads=2, kernel_size=3, resolution="4x6", batch=2)


def reason(name: str, case: Case) -> str:
    """Why an implementation cannot do a case; empty where it can."""
    return impls.get(name).supports(case) or ""


def test_one_that_differs_has_an_op_a_reference_and_a_cost_of_its_own() -> None:
    assert len(DIFFERING) >= 3
    for name in DIFFERING:
        op = impls.get(name).op
        assert op is not LOCAL_ATTENTION
        assert op.name in ops.BUILTIN
        assert not impls.get(name).attend, "a model must not take it for the layer of the paper"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["none", "absolute"])
def test_natten_shifts_its_window_at_borders(position: str, dtype: str) -> None:
    agree("natten", Case(channels=16, heads=2, kernel_size=5, resolution="5x9", position=position, dtype=dtype))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(position="relative"), "no position term"),
        (Case(position="none", mode="training"), "no backward pass"),
        (Case(position="none", channels=40, heads=2), "power of two: 20 given"),
        (Case(position="none", resolution="5x9"), "windows from 2 x 2 to the map of 5 x 9 pixels"),
    ],
)
def test_natten_says_what_it_cannot_do_on_a_cpu(case: Case, words: str) -> None:
    assert words in reason("natten", case)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("resolution", "kernel_size"), [(12, 5), ("9x15", 7), ("7x5", 1)])
def test_halo_attention_is_that_of_timm(mode: str, resolution: object, kernel_size: int) -> None:
    agree(
        "halo_attention",
        Case(channels=12, heads=3, kernel_size=kernel_size, resolution=resolution, mode=mode),  # type: ignore[arg-type]
    )


def test_the_block_of_halo_attention_divides_the_map() -> None:
    sides = {56: 8, 28: 7, 14: 7, 7: 7, 13: 1, "12x18": 6}
    assert {r: halo_block(Case(resolution=r)) for r in sides} == sides  # type: ignore[arg-type]


def test_with_one_channel_a_head_and_no_positions_the_softmax_by_channel_is_that_of_the_paper() -> None:
    case = TINY.with_(heads=8, position="none", border="zero", scope="core")
    t = random_tensors(LOCAL_ATTENTION, case, random.randrange(1 << 31))
    torch.testing.assert_close(PER_CHANNEL_ATTENTION.reference(case, t), LOCAL_ATTENTION.reference(case, t))


def test_with_more_channels_a_head_it_is_not() -> None:
    case = TINY.with_(position="none", border="zero", scope="core")
    t = random_tensors(LOCAL_ATTENTION, case, random.randrange(1 << 31))
    assert (PER_CHANNEL_ATTENTION.reference(case, t) - LOCAL_ATTENTION.reference(case, t)).abs().max() > 0.01


def test_away_from_borders_a_shifted_window_is_that_of_the_paper() -> None:
    case = TINY.with_(position="none", scope="core", resolution=7)
    t = random_tensors(LOCAL_ATTENTION, case, random.randrange(1 << 31))
    ours, theirs = LOCAL_ATTENTION.reference(case, t), NEIGHBORHOOD_ATTENTION.reference(case, t)
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1])
    assert (ours[..., 0, :] - theirs[..., 0, :]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("op", "case"),
    [(PER_CHANNEL_ATTENTION, TINY), (NEIGHBORHOOD_ATTENTION, TINY.with_(position="none")), (HALO_ATTENTION, TINY)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_their_parameters_are_those_of_the_tensors(op: object, case: Case) -> None:
    tensors = random_tensors(op, case, 0)  # type: ignore[arg-type]
    assert op.cost(case).params == sum(t.numel() for name, t in tensors.items() if name != "x")  # type: ignore[attr-defined]


def test_a_dense_bias_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    said = reason("sdpa_dense", Case(resolution=500))
    assert "2 images x 8 heads x 250000 queries x 250000 keys x 4 bytes, held 2 times, is 7451 GiB" in said
    assert "1 images x 1 heads" in reason("sdpa_dense", Case(resolution=500, position="none"))
    assert reason("sdpa_dense", Case(resolution=14, mode="training")) == ""


def test_what_is_compiled_for_the_cpu_without_a_usable_backward_pass_says_so() -> None:
    assert "no backward pass on the CPU" in reason("flex_attention", Case(mode="training"))
    assert "wrong gradients or crashes" in reason("compiled_blocked", Case(mode="backward"))


def test_without_a_compiler_compiled_implementations_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name in ("flex_attention", "compiled_unfold", "compiled_blocked", "compiled_sdpa_dense"):
        assert "apt-get install g++" in (impls.get(name).missing() or "")


def test_compiled_unfolding_agrees_in_its_backward_pass_and_compiles_in_build_alone() -> None:
    """What is checked, and later timed, is what build compiled: no call compiles again."""
    if missing := impls.get("compiled_unfold").missing():
        pytest.skip(missing)
    case = TINY.with_(mode="backward", threads=torch.get_num_threads())
    prepared = prepare("compiled_unfold", case, random.randrange(1 << 31), lambda what: None, {})
    assert prepared.row["status"] == "ok", prepared.row["reason"]
    assert prepared.row["extra"]["build_s"] > 0.5
    assert prepared.step is not None
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            prepared.step()


def test_many_cases_in_one_process_stay_compiled() -> None:
    """torch runs a function uncompiled beyond a number of cases: each case has a function of its own."""
    from sasa_bench.impls._compiled import one_graph

    def make(n: int) -> object:
        def add(x: torch.Tensor) -> torch.Tensor:
            return x + n

        return one_graph(add)

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(4):
            assert (make(n)(torch.ones(n + 2)) == n + 1).all()  # type: ignore[operator]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 4


HOW = "its window is elsewhere"


def written(path: Path, rows: list[Record]) -> Results:
    """A results file in which `mine` differs, as a run writes it."""
    made = factory.results_file(path, rows)
    with Writer(made) as writer:
        writer.impls([ImplInfo("mine", "another_op", "made up", 7, HOW)])
    return read([made])


@pytest.fixture
def results(tmp_path: Path) -> Results:
    rows = factory.sweep()
    mine = [replace(row, impl="mine", op="another_op") for row in rows if row.impl == "blocked"]
    fast = [replace(row, samples_s=tuple(s / 10 for s in row.samples_s), extra={"build_s": 3.0}) for row in mine]
    return written(tmp_path / "a.jsonl", [*rows, *fast])


def test_tables_mark_it_and_say_how_it_differs(results: Results) -> None:
    table = frame(results)
    assert set(table[table["impl"] == "mine"]["differs"]) == {HOW}
    assert set(table[table["impl"] != "mine"]["differs"]) == {""}
    for form in ("text", "markdown"):
        text = render(table, form).decode()
        assert f"mine{DIFFERS}" in text
        assert f"\n{DIFFERS} mine computes another function: {HOW}.\n" in text
    assert HOW in render(table, "csv").decode()
    assert set(marked(table)["impl"]) == {"unfold", "blocked", "conv3x3", f"mine{DIFFERS}"}
    assert len(footnotes(table)) == 1


def test_it_is_compared_and_never_the_fastest(results: Results) -> None:
    found = answers(results, frame(results))
    assert "`blocked` is the fastest." in found.verdict
    said = [s for by_suite in found.groups.values() for of_suite in by_suite.values() for s in of_suite]
    about = [sentence for sentence in said if "`mine`" in sentence]
    assert about == [
        f"`mine` {DIFFERS} takes 0.10 times as long as the fastest attention at all 4 points, and computes another "
        f"function: {HOW}."
    ]


def test_the_report_has_a_table_of_who_computes_what_where_one_differs(results: Results, tmp_path: Path) -> None:
    table = frame(results)
    entries = {entry["name"]: entry for entry in sections.peer_rows(table, results)}
    assert entries[f"mine{DIFFERS}"]["function"] == HOW
    assert entries[f"mine{DIFFERS}"]["build"] == "3 s"
    assert entries["blocked"]["function"] == "exact"
    assert entries["blocked"]["ran"] == "4 of 4"
    assert "conv3x3" not in entries
    page = report.html(results)
    assert "Who computes what" in page
    assert f"mine{DIFFERS}" in page
    plain = read([factory.results_file(tmp_path / "b.jsonl", factory.sweep())])
    assert sections.peer_rows(frame(plain), plain) == []
    assert "Who computes what" not in report.html(plain)


def test_a_file_from_before_the_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    factory.results_file(path, factory.sweep())
    path.write_text(path.read_text().replace(', "differs": ""', ""))
    assert (frame(read([path]))["differs"] == "").all()


def test_the_suite_of_peers_has_all_of_them() -> None:
    suite = load(Path(__file__).parents[2] / "suites" / "peers.toml")
    assert set(DIFFERING) <= set(suite.impls)
    assert {(c.channels, c.height) for c in suite.cases} == {(64, 56), (128, 28), (256, 14)}


def test_a_halo_reference_of_one_block_is_attention_over_the_padded_map() -> None:
    """An independent count: with one block for the whole map, every query sees every key of it."""
    case = Case(channels=4, heads=1, kernel_size=3, resolution=3, batch=1)
    t = random_tensors(HALO_ATTENTION, case, random.randrange(1 << 31))
    q = torch.einsum("oc,cij->oij", t["w_q"][:, :, 0, 0], t["x"][0])
    k, v = torch.einsum("oc,cij->oij", t["w_kv"][:, :, 0, 0], t["x"][0]).split(4)
    k, v = (torch.nn.functional.pad(m, (1, 1, 1, 1)) for m in (k, v))
    y = HALO_ATTENTION.reference(case, t)[0]
    for i in range(3):
        for j in range(3):
            logits = torch.stack(
                [
                    q[:, i, j] @ (k[:, a, b] / 2 + t["height_rel"][4 + a - i] + t["width_rel"][4 + b - j])
                    for a in range(5)
                    for b in range(5)
                ]
            )
            torch.testing.assert_close(y[:, i, j], v.flatten(1) @ logits.softmax(0))


def test_gradients_reach_every_parameter_of_the_layer_of_timm() -> None:
    impl = impls.get("halo_attention")
    if impl.missing():
        pytest.skip(impl.missing() or "")
    case = impl.computes(TINY.with_(mode="training"))
    reference = compute_reference(impl.op, case, random.randrange(1 << 31))
    tensors = leaves(reference.tensors, case)
    assert reference.grad_y is not None
    _, *gradients = step(case, impl.build(case, tensors), tensors, reference.grad_y.float())()
    assert all(gradient.abs().max() > 0 for gradient in gradients)
