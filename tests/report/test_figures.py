from __future__ import annotations

import itertools
from pathlib import Path

import factory
import numpy as np
import pandas as pd
import pytest

from sasa_bench.case import Case
from sasa_bench.report.figures import draw, file_name, overview, save, save_all
from sasa_bench.report.panels import panels
from sasa_bench.report.styles import BASELINE_COLOUR, COLOURS, MARKERS, style
from sasa_bench.report.table import frame, load
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.record import ImplInfo
from sasa_bench.suite import load as load_suite

RED_BLIND = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
GREEN_BLIND = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
"""Machado, Oliveira and Fernandes 2009, on linear RGB."""
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, ground: str) -> float:
    high, low = sorted((float(linear(c) @ LUMINANCE) for c in (colour, ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def many(count: int) -> dict[str, ImplInfo]:
    return {f"impl{i}": ImplInfo(f"impl{i}", "local_attention", "", i) for i in range(count)}


@pytest.mark.parametrize("colour", [*COLOURS, BASELINE_COLOUR])
def test_every_colour_is_seen_on_white_and_on_black(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 2
    assert contrast(colour, "#14151a") >= 2


def test_no_two_implementations_look_alike_to_the_colour_blind() -> None:
    looks = style(many(40), list(many(40)))
    for a, b in itertools.combinations(looks.values(), 2):
        same_shape = a.shape == b.shape and a.dash == b.dash
        seen = [
            np.abs(np.cbrt(m @ linear(a.colour)) - np.cbrt(m @ linear(b.colour))).max()
            for m in (RED_BLIND, GREEN_BLIND)
        ]
        assert not same_shape or min(seen) > 0.05, (a, b)


def test_an_implementation_looks_the_same_on_every_page() -> None:
    impls = many(20)
    assert style(impls, ["impl7", "impl3"])["impl7"] == style(impls, list(impls))["impl7"]


SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.toml"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_no_two_implementations_of_a_chart_share_a_colour(suite: Path) -> None:
    from sasa_bench.impls import index, names

    impls = {name: ImplInfo(name, "local_attention", "", index(name)) for name in names()}
    shown = list(dict.fromkeys(name for name in load_suite(suite).impls if name in impls))
    assert len({look.colour for look in style(impls, shown).values()}) == len(shown)
    whole = style(impls, list(impls))
    assert whole["fused"].colour != whole["conv1x1"].colour


def test_markers_and_colours_repeat_at_different_places() -> None:
    assert np.gcd(len(COLOURS), len(MARKERS)) == 1


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return load(factory.results_file(tmp_path / "a.jsonl", factory.sweep()))


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_figures_have_the_same_bytes_every_time(table: pd.DataFrame, tmp_path: Path, form: str) -> None:
    first = save_all(table, {}, tmp_path / "first", (form,))
    second = save_all(table, {}, tmp_path / "second", (form,))
    assert [path.name for path in first] == [
        f"kernel_size-{q}-1.{form}" for q in ("time_median_s", "peak_memory_bytes", "flops")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_axes_that_change_together_share_one_plot(tmp_path: Path) -> None:
    cases = [Case(channels=c, kernel_size=k, threads=2) for c, k in ((32, 9), (64, 13), (128, 19))]
    rows = [factory.record(name, 0.01, case=case) for case in cases for name in ("unfold", "conv3x3")]
    (panel,) = panels(load(factory.results_file(tmp_path / "a.jsonl", rows)))
    assert {panel.x, *panel.coupled} == {"channels", "kernel_size"}
    assert panel.data["x_tick"].nunique() == 3


def test_the_overview_needs_the_baseline(tmp_path: Path) -> None:
    rows = [row for row in factory.sweep() if row.impl != "conv3x3"]
    results = read([factory.results_file(tmp_path / "a.jsonl", rows)])
    with pytest.raises(ResultsError, match="nothing to draw"):
        overview(frame(results), results.impls, "local_attention")


def test_the_overview_has_a_line_for_each_attention_and_for_its_flops(table: pd.DataFrame, tmp_path: Path) -> None:
    figure = overview(table, {}, "local_attention")
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert labels == {"unfold", "blocked", "by FLOPs", "fastest 3×3"}
    save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("ends", [(0.93e-3, 0.98e-3), (2.2e-3, 4.8e-3), (1e-3, 8e-2)])
def test_an_axis_of_a_figure_has_labels_to_read_it_by_however_short_it_is(
    tmp_path: Path, ends: tuple[float, float]
) -> None:
    cases = [Case(kernel_size=k, threads=2) for k in (3, 7)]
    rows = [factory.record("unfold", end, noise=0, case=case) for end, case in zip(ends, cases, strict=True)]
    (panel,) = panels(load(factory.results_file(tmp_path / "a.jsonl", rows)))
    axes = draw(panel, "time_median_s", style({}, ["unfold"])).axes[0]
    low, high = axes.get_ylim()
    labels = {axes.yaxis.get_major_formatter()(tick, 0) for tick in axes.get_yticks() if low <= tick <= high}
    assert len(labels) >= 3, labels


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "a/b", "..", "con:aux", "a\x00b", "x" * 300])
def test_the_name_of_a_foreign_suite_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    path = (tmp_path / f"{file_name(name)}-time-1.svg").resolve()
    assert path.parent == tmp_path.resolve()
    path.write_text("")
