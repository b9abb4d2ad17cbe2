from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import factory
import pytest

from sasa_bench import ops
from sasa_bench.case import Case
from sasa_bench.paper.tables import published
from sasa_bench.report.findings import FAILS, HOLDS, OPEN, PARTLY, Answers, answers, ratio, times
from sasa_bench.report.panels import places
from sasa_bench.report.report import html
from sasa_bench.report.table import frame
from sasa_bench.results.file import read
from sasa_bench.results.record import Record


def found(tmp_path: Path, rows: list[Record]) -> Answers:
    results = read([factory.results_file(tmp_path / "a.jsonl", rows)])
    return answers(results, frame(results))


def sentences(answers: Answers) -> str:
    return "\n".join(s for by_suite in answers.groups.values() for said in by_suite.values() for s in said)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.6, "0.60"), (0.994, "0.99"), (0.0421, "0.042"), (1.04, "1.0"), (5.44, "5.4"), (9.96, "10"), (103, "100"),
     (2345, "2,300"), (float("inf"), "∞")],
)  # fmt: skip
def test_ratios_are_written_without_powers_of_ten(value: float, words: str) -> None:
    assert times(value) == words


def test_the_interval_of_a_ratio_holds_it() -> None:
    found = ratio(factory.record("unfold", 0.02), factory.record("conv3x3", 0.01))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2, rel=0.05)
    assert found.decided


def test_few_samples_decide_nothing() -> None:
    found = ratio(factory.record("unfold", 0.02, count=3), factory.record("conv3x3", 0.01, count=3))
    assert not found.decided
    assert "too few samples" in str(found)


def test_the_verdict_names_ratio_flops_and_the_fastest(tmp_path: Path) -> None:
    said = found(tmp_path, factory.sweep()).verdict
    assert said.startswith(
        "At the paper's 7×7 window, local attention takes 1.3 times as long as the fastest 3×3 convolution"
    )
    assert "0.44 of its FLOPs" in said
    assert said.endswith(". `blocked` is the fastest.")


def test_where_attention_is_faster_the_verdict_says_so(tmp_path: Path) -> None:
    case = Case(threads=2)
    rows = [factory.record("unfold", 0.001, case=case), factory.record("conv3x3", 0.002, case=case)]
    answers = found(tmp_path, rows)
    assert re.search(r"is faster than the fastest 3×3 convolution: it takes 0\.(49|50|51) of the time", answers.verdict)
    assert {claim.text: claim.verdict for claim in answers.claims}[
        "It is still slower in wall-clock time, for lack of optimised kernels."
    ] == FAILS


def test_a_network_without_attention_is_no_case_of_attention(tmp_path: Path) -> None:
    with_it = Case(scope="network", network="resnet50", stem="conv", attention_groups="1234", resolution=224, threads=2)
    rows = [
        factory.record(name, slow, case=case)
        for case, slow in ((with_it, 0.03), (with_it.with_(attention_groups="none"), 0.01))
        for name, slow in (("unfold", slow), ("conv3x3", 0.02))
    ]
    answers = found(tmp_path, rows)
    assert "1.5 times as long" in answers.verdict
    assert "cases" not in answers.verdict


def test_equal_times_are_not_ranked(tmp_path: Path) -> None:
    case = Case(threads=2)
    rows = [factory.record(name, 0.002, noise=0.2, case=case) for name in ("unfold", "blocked", "conv3x3")]
    answers = found(tmp_path, rows)
    assert "cannot be distinguished by time" in answers.verdict
    assert "The fastest" not in answers.verdict
    assert "No implementation of attention is faster than the others beyond the uncertainty." in sentences(answers)
    assert OPEN in {claim.verdict for claim in answers.claims}


def test_two_that_tie_far_ahead_of_the_rest_are_both_named(tmp_path: Path) -> None:
    case = Case(threads=2)
    times_of = {"unfold": 0.02, "blocked": 0.002, "naive": 0.00201, "conv3x3": 0.004}
    rows = [factory.record(name, median, noise=0.1, case=case) for name, median in times_of.items()]
    answers = found(tmp_path, rows)
    tied = "`blocked` and `naive` (too close to call between them) are the fastest"
    assert f"{tied} at its one point, " in sentences(answers)
    assert answers.verdict.endswith(f"{tied}.")
    assert "attention by `blocked`, `naive`, `unfold`; 3×3 convolutions by `conv3x3`." in answers.compared


def test_points_with_too_few_samples_are_not_called_close(tmp_path: Path) -> None:
    few = {batch: Case(threads=2, batch=batch) for batch in (1, 2, 4)}
    rows = [factory.record("unfold", 0.004, count=2, case=case) for case in few.values()]
    rows += [factory.record("conv3x3", 0.002, count=2, case=case) for case in few.values()]
    answers = found(tmp_path, rows)
    assert "there are too few samples to compare" in answers.verdict
    assert "of 3 points: too uncertain to tell at 3." in sentences(answers)
    faster = Case(threads=2, batch=8)
    rows += [factory.record("unfold", 0.001, case=faster), factory.record("conv3x3", 0.002, case=faster)]
    claim = next(c for c in found(tmp_path / "more", rows).claims if c.text.startswith("It is still slower"))
    assert claim.verdict == OPEN, "three of four points are unknown"
    assert claim.figures.endswith("faster at 1 of 4 points, too uncertain to tell at 3 of 4 points.")


@pytest.mark.parametrize(("slow", "verdict"), [(0, OPEN), (1, PARTLY), (2, HOLDS)])
def test_a_claim_holds_in_part_where_it_is_too_close_to_call_as_often_as_not(
    slow: int, verdict: str, tmp_path: Path
) -> None:
    rows = []
    for batch, median in enumerate([0.004] * slow + [0.002], 1):
        case = Case(threads=2, batch=batch)
        rows += [
            factory.record("unfold", median, noise=0.2, case=case),
            factory.record("conv3x3", 0.002, noise=0.2, case=case),
        ]
    claim = next(c for c in found(tmp_path, rows).claims if c.text.startswith("It is still slower"))
    assert claim.verdict == verdict, claim.figures


def test_the_crossing_is_found_between_its_neighbours(tmp_path: Path) -> None:
    said = sentences(found(tmp_path, factory.sweep()))
    assert "`blocked` becomes slower than the fastest 3×3 convolution between kernel size 5 and 7: from 0.9" in said


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    answers = found(tmp_path, [row for row in factory.sweep() if row.impl != "conv3x3"])
    assert answers.verdict == ""
    assert answers.tiles == []
    assert "conv3x3" not in sentences(answers)
    assert "`blocked` is the fastest at" in sentences(answers)


def test_rows_that_failed_support_no_sentence(tmp_path: Path) -> None:
    rows = [factory.failed(name, "error", "boom") for name in ("unfold", "conv3x3")]
    answers = found(tmp_path, rows)
    assert answers.verdict == ""
    assert answers.groups == {}
    assert all("cost model" in claim.figures for claim in answers.claims)


def test_the_claims_about_work_follow_from_the_cost_model(tmp_path: Path) -> None:
    case = Case(kernel_size=19, channels=128, threads=2)
    rows = [*factory.sweep(), factory.record("blocked", 0.009, case=case), factory.record("conv3x3", 0.0022, case=case)]
    claims = {claim.text: claim for claim in found(tmp_path, rows).claims}
    assert len(claims) >= 5
    fewer = next(claim for text, claim in claims.items() if "fewer FLOPs" in text)
    equal = next(claim for text, claim in claims.items() if "window of 19" in text)
    assert fewer.verdict == HOLDS
    assert fewer.figures.startswith("0.44 of the FLOPs")
    assert equal.verdict == HOLDS
    assert "0.96 of the FLOPs without the position term" in equal.figures
    assert re.search(r"The time: 4\.[01] \(", equal.figures)


def test_memory_stands_next_to_memory(tmp_path: Path) -> None:
    case = Case(threads=2)
    rows = [
        factory.record("unfold", 0.002, case=case, peak_memory_bytes=8 << 20),
        factory.record("blocked", 0.004, case=case, peak_memory_bytes=2 << 20),
        factory.record("conv3x3", 0.001, case=case, peak_memory_bytes=1 << 20),
    ]
    said = sentences(found(tmp_path, rows))
    assert "The fastest attention needs 8.0 times the peak memory of the fastest 3×3 convolution." in said
    assert "`blocked` needs the least memory: 2.0 times that of" in said
    assert "takes up to 8.0 times." in said


def networks(slow: float, **changes: Any) -> list[Record]:
    """ResNet-50 with each stem, `slow` times as slow as its convolutional counterpart."""
    rows = []
    for stem in ("conv", "aware_values"):
        case = Case(
            scope="network", network="resnet50", stem=stem, attention_groups="1234", resolution=224, batch=1, threads=2
        ).with_(**changes)
        plain = case.with_(stem="conv", attention_groups="none", position="none")
        found = ops.get("convolution").cost(plain)
        work = {"flops": found.flops, "params": found.params}
        rows.append(factory.record("unfold", 0.1 * slow, case=case))
        rows.append(factory.record("conv3x3", 0.1, case=case, **work))
    return rows


@pytest.mark.parametrize(("slow", "verdict"), [(3, HOLDS), (0.5, FAILS)])
def test_rows_of_networks_judge_the_claims_about_networks(slow: float, verdict: str, tmp_path: Path) -> None:
    claims = [claim for claim in found(tmp_path, networks(slow)).claims if "stem" in claim.text]
    work, clock = claims[:2], claims[2:]
    printed = {(cell.row, cell.quantity): cell.paper for cell in published() if cell.table == "T1"}
    plain = printed["ResNet-50 baseline", "flops"], printed["ResNet-50 baseline", "params"]
    for claim, row in zip(work, ("ResNet-50 conv stem + attention", "ResNet-50 full attention"), strict=True):
        assert claim.verdict == HOLDS
        assert f"({printed[row, 'flops']} for {plain[0]} B)" in claim.text
        assert f"({printed[row, 'params']} for {plain[1]} M)" in claim.text
        shares = [float(share) for share in re.findall(r"(0\.\d+) of the", claim.figures)]
        assert shares[0] == pytest.approx(float(printed[row, "flops"]) / float(plain[0]), abs=0.03)
        assert shares[1] == pytest.approx(float(printed[row, "params"]) / float(plain[1]), abs=0.01)
    assert [claim.verdict for claim in clock] == [verdict, verdict]
    assert "stem aware values" in clock[1].text


def test_networks_as_the_paper_says_are_folded_and_others_are_not(tmp_path: Path) -> None:
    groups = [row for n in ("resnet26", "resnet38", "resnet50") for row in networks(2, network=n)]
    worse = [replace(row, flops=row.flops * 2) if row.impl == "unfold" else row for row in networks(2) if row.flops]
    for rows, folded in ((groups, True), (worse, False), (networks(2), False)):
        page = html(read([factory.results_file(tmp_path / f"{len(rows)}{folded}.jsonl", rows)]))
        assert ('<details class="folded">' in page) == folded


def test_a_network_that_costs_more_does_not_hold_what_the_paper_says(tmp_path: Path) -> None:
    rows = [replace(row, flops=row.flops * (2 if row.impl == "unfold" else 1)) for row in networks(2) if row.flops]
    claims = [claim for claim in found(tmp_path, rows).claims if "of the FLOPs" in claim.figures]
    assert {claim.verdict for claim in claims} == {PARTLY}
    assert len(claims) == 2


def test_networks_that_the_paper_gives_no_figures_of_are_only_timed(tmp_path: Path) -> None:
    claims = found(tmp_path, networks(2, resolution=96)).claims
    assert len(claims) == 2
    assert all("times as long" in claim.figures for claim in claims)


def test_where_the_paper_counts_as_many_flops_it_claims_fewer_parameters_only(tmp_path: Path) -> None:
    claims = {claim.text: claim for claim in found(tmp_path, networks(2, network="resnet26")).claims}
    (full,) = [text for text in claims if "aware values" in text and "fewer" in text]
    assert "fewer parameters" in full
    assert "FLOPs" not in full


def two_levels() -> tuple[float, ...]:
    """Samples beside a neighbour that comes and goes; the median is on the lower level."""
    return tuple(0.0008 if i % 20 < 11 else 0.008 for i in range(21))


def test_no_figure_is_given_for_samples_on_two_levels(tmp_path: Path) -> None:
    case = Case(threads=2)
    rows = [factory.record("unfold", samples_s=two_levels(), case=case), factory.record("conv3x3", 2e-4, case=case)]
    answers = found(tmp_path, rows)
    (tile,) = [tile for tile in answers.tiles if tile.label == "time"]
    assert (tile.value, tile.note) == ("too noisy", "samples scatter: the 95 % interval of a median spans more than 2×")
    assert "cannot be distinguished" in answers.verdict
    assert "(too noisy)" in str(ratio(*rows))


def test_a_row_that_is_too_noisy_is_not_called_the_fastest(tmp_path: Path) -> None:
    cases = [Case(kernel_size=7, channels=c, threads=2) for c in (64, 128)]
    noisy = [factory.record("unfold", samples_s=two_levels(), case=case) for case in cases]
    clear = [factory.record("blocked", 0.002, case=cases[0].with_(channels=32))]
    plain = [factory.record("conv3x3", 0.001, case=row.case) for row in (*noisy, *clear)]
    answers = found(tmp_path, [*noisy, *clear, *plain])
    assert "`blocked` is the fastest." in answers.verdict
    assert "2 of 3 cases are too noisy" in answers.verdict


def test_attention_has_to_beat_the_fastest_convolution_not_the_plain_one(tmp_path: Path) -> None:
    case = Case(kernel_size=7, threads=2)
    plain = factory.record("conv3x3", 0.010, case=case)
    rows = [
        factory.record("fused", 0.008, case=case),
        plain,
        factory.record("conv3x3_packed", 0.004, case=case, op="convolution", flops=plain.flops),
    ]
    answers = found(tmp_path, rows)
    assert "takes 2.0 times as long as the fastest 3×3 convolution" in answers.verdict
    assert answers.tile_case.startswith("fused over conv3x3_packed at")


def test_a_case_that_several_suites_hold_counts_once(tmp_path: Path) -> None:
    at_seven = [row for row in factory.sweep() if row.case.kernel_size == 7]
    twice = [replace(row, suite=suite) for row in at_seven for suite in ("kernel_size", "channels")]
    verdict = found(tmp_path, twice).verdict
    assert "local attention takes 1.3 times" in verdict
    assert "cases" not in verdict


def test_core_and_layer_are_never_in_one_range(tmp_path: Path) -> None:
    plain = {"layer": {"unfold": 0.004, "blocked": 0.003, "conv3x3": 0.002}}
    plain["core"] = {"unfold": 0.04, "blocked": 0.03, "conv3x3": 0.0002}
    rows = [
        factory.record(impl, at, case=Case(kernel_size=k, scope=scope, threads=2), noise=0.001)
        for scope, times_ in plain.items()
        for k in (3, 5, 7)
        for impl, at in times_.items()
    ]
    told = found(tmp_path, rows)
    said = sentences(told).splitlines()
    assert said
    assert all(line.startswith(("At scope layer: ", "At scope core: ")) for line in said)
    never = {line.split(": ")[0]: line for line in said if "Attention is never faster than" in line}
    assert "1.5 times" in never["At scope layer"]
    assert "150 times" in never["At scope core"]
    assert "1.5 times" in told.verdict


def test_the_verdict_names_no_fastest_where_the_rows_show_none(tmp_path: Path) -> None:
    rows = [
        factory.record("unfold", 0.020, noise=0.2),
        factory.record("blocked", 0.0201, noise=0.2),
        factory.record("conv3x3", 0.005),
    ]
    said = found(tmp_path, [replace(row, case=Case(kernel_size=7, threads=2)) for row in rows]).verdict
    assert "times as long as the fastest 3×3 convolution" in said
    assert said.endswith("Which implementation is the fastest is too close to call.")


def test_claims_set_no_row_of_one_file_against_a_row_of_another(tmp_path: Path) -> None:
    def file(name: str, position: str, window: int) -> Path:
        case = Case(kernel_size=window, position=position, threads=2)
        rows = [factory.record("unfold", 0.02 if position == "none" else 0.06, case=case)]
        return factory.results_file(tmp_path / name, [*rows, factory.record("conv3x3", 0.01, case=case)])

    apart = read([file("none.jsonl", "none", 3), file("relative.jsonl", "relative", 3), file("wide.jsonl", "none", 9)])
    texts = [claim.text for claim in answers(apart, frame(apart)).claims]
    assert not any("positions cost little" in text or "grows slowly" in text for text in texts)
    rows = [row for name in ("none", "relative", "wide") for row in read([tmp_path / f"{name}.jsonl"]).rows]
    together = read([factory.results_file(tmp_path / "all.jsonl", rows)])
    texts = [claim.text for claim in answers(together, frame(together)).claims]
    assert sum("positions cost little" in text or "grows slowly" in text for text in texts) == 2


def test_maps_with_as_many_pixels_are_cases_of_their_own(tmp_path: Path) -> None:
    rows = []
    for resolution, slow in (("28x56", 1.0), ("56x28", 4.0)):
        case = Case(kernel_size=7, resolution=resolution, threads=2)
        rows += [factory.record("unfold", 0.02 * slow, case=case), factory.record("conv3x3", 0.01, case=case)]
    assert "median of 2 cases; 2.0 to 8.0" in found(tmp_path, rows).verdict
    assert len(set(places("resolution", ["28x56", "56x28", "14x112"]).values())) == 3


def test_the_verdict_says_in_how_many_cases_the_rows_show_a_fastest(tmp_path: Path) -> None:
    rows = []
    for channels, unfold in ((64, 0.004), (128, 0.00201)):
        case = Case(kernel_size=7, channels=channels, threads=2)
        times_of = {"blocked": 0.002, "unfold": unfold, "conv3x3": 0.0005}
        rows += [factory.record(name, median, noise=0.1, case=case) for name, median in times_of.items()]
    said = found(tmp_path, rows).verdict
    assert said.endswith("`blocked` is the fastest in 1 of 2 cases.")
