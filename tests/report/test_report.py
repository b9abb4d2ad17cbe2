from __future__ import annotations

import base64
import gzip
import io
import re
from dataclasses import replace
from pathlib import Path

import factory
import pandas as pd
import pytest
from browser import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from sasa_bench.case import Case
from sasa_bench.report import compare, index, page, report
from sasa_bench.report.table import load
from sasa_bench.results.columns import COLUMNS
from sasa_bench.results.file import ResultsError, read
from sasa_bench.results.record import Record

SIZES = [(1280, 900), (390, 844)]
THEMES = ["light", "dark"]
SWEEP = ("unfold", "blocked", "conv3x3")


def broken() -> list[Record]:
    case = Case(kernel_size=11, threads=2)
    return [
        factory.failed("naive", "error", "the worker was killed by SIGKILL (usually out of memory)", case=case),
        factory.failed("unfold", "wrong", "y is off by 3.0e-01, 300 times its budget of 1.0e-03", case=case),
        factory.failed("blocked", "skipped", "heads <b>must</b> divide channels", case=case),
        factory.failed("conv3x3", "timeout", "stage 'time' took longer than 120 s", case=case),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a sweep in which some rows failed."""
    folder = tmp_path_factory.mktemp("report")
    results = read([factory.results_file(folder / "a.jsonl", [*factory.sweep(), *broken()])])
    report.write(results, folder / "a.html")
    return folder / "a.html"


def open_charts(browser: Browser) -> None:
    browser.wait_for("return document.querySelectorAll('#chart-kernel_size svg path[aria-label]').length > 0")


LINES = "document.querySelectorAll('#chart-kernel_size .mark-line path:not([stroke-dasharray=\"2,3\"])').length"
"""Lines of implementations: those of limits are dotted."""


def lines(browser: Browser) -> int:
    return int(browser.ask(f"return {LINES}"))


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_report_opens_offline_without_complaint_or_request(
    browser: Browser, made: Path, width: int, height: int, theme: str
) -> None:
    browser.open(made, width, height, theme)
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 0")
    browser.ask("document.documentElement.style.scrollBehavior = 'auto'; window.scrollTo(0, 1500)")
    open_charts(browser)
    assert lines(browser) == len(SWEEP)
    assert browser.ask("return document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    paper = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.mark.parametrize("theme", THEMES)
def test_on_paper_are_charts_and_tables_without_controls_and_in_light_colours(
    browser: Browser, made: Path, theme: str
) -> None:
    visible = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    controls = ["header.top", ".dt-search input", ".vega-bindings select", ".dtcc-button", ".screen"]
    browser.open(made, theme=theme)
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 0")
    browser.show_as_printed()
    browser.wait_for("return [...document.querySelectorAll('.chart')].every(chart => chart.querySelector('svg.marks'))")
    assert browser.ask(visible, ".chart svg.marks") == browser.ask("return document.querySelectorAll('.chart').length")
    assert browser.ask(visible, "#rows tbody tr") > 0
    for control in controls:
        assert browser.ask("return document.querySelectorAll(arguments[0]).length", control) > 0, control
        assert browser.ask(visible, control) == 0, control
    wide = "var rows = document.querySelector('#rows'); return rows.scrollWidth - rows.parentNode.clientWidth"
    assert browser.ask(wide) <= 1, "a column is cut off"
    assert browser.ask("return document.querySelector('#rows thead th').getBoundingClientRect().height") > 5
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.ask(style, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask(style, "body", "color") == "rgb(0, 0, 0)"
    assert browser.ask(style, "#rows tbody td", "color") == "rgb(0, 0, 0)"
    assert browser.ask(style, ".chart svg.marks text", "fill") == "rgb(0, 0, 0)"
    assert browser.complaints() == []


def test_a_page_that_asks_for_something_is_found_out(browser: Browser, tmp_path: Path) -> None:
    asking = tmp_path / "asking.html"
    asking.write_text("<script src='https://example.invalid/vega.js'></script>")
    browser.open(asking)
    assert browser.requests() == ["https://example.invalid/vega.js"]
    assert browser.complaints()


def test_the_theme_can_be_switched(browser: Browser, made: Path) -> None:
    browser.open(made)
    button = browser.driver.find_element(By.CSS_SELECTOR, "header button")
    paper = "return getComputedStyle(document.body).backgroundColor"
    before = browser.ask(paper)
    button.click()
    assert browser.ask(paper) != before
    button.click()
    assert browser.ask(paper) == before


def test_hovering_over_a_mark_shows_its_values(browser: Browser, made: Path) -> None:
    browser.open(made, 1280, 2400)
    open_charts(browser)
    mark = browser.driver.find_element(By.CSS_SELECTOR, "#chart-kernel_size .mark-symbol.role-mark path")
    browser.ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
    ActionChains(browser.driver).move_to_element(mark).perform()
    browser.wait_for("return document.querySelector('#vg-tooltip-element.visible') !== null")
    told = browser.driver.find_element(By.ID, "vg-tooltip-element").text
    assert told.splitlines()[0] in SWEEP
    for word in ("kernel size", "p20", "p80", "ms", "MiB", "FLOP"):
        assert word in told


def test_a_click_on_a_name_removes_its_line_and_another_brings_it_back(browser: Browser, made: Path) -> None:
    browser.open(made, 1280, 2400)
    open_charts(browser)
    label = browser.driver.find_element(By.CSS_SELECTOR, "#chart-kernel_size .role-legend-label text")
    ActionChains(browser.driver).move_to_element(label).click().perform()
    browser.wait_for(f"return {LINES} == 2")
    label = browser.driver.find_element(By.CSS_SELECTOR, "#chart-kernel_size .role-legend-label text")
    ActionChains(browser.driver).move_to_element(label).click().perform()
    browser.wait_for(f"return {LINES} == 3")


def test_the_quantity_can_be_chosen(browser: Browser, made: Path) -> None:
    browser.open(made, 1280, 2400)
    open_charts(browser)
    select = browser.driver.find_element(By.CSS_SELECTOR, "#chart-kernel_size select[name=quantity]")
    choices = [option.text for option in select.find_elements(By.TAG_NAME, "option")]
    assert choices[:4] == ["time, median", "time / conv3x3", "time / fastest conv3x3", "peak memory"]
    select.find_elements(By.TAG_NAME, "option")[1].click()
    title = "return document.querySelector('#chart-kernel_size .role-title-text text').textContent"
    browser.wait_for(f"{title}.includes('time of conv3x3')")
    assert browser.complaints() == []


@pytest.mark.parametrize("ends", [(1.1e-3, 1.9e-3), (2.2e-3, 4.8e-3), (1e-3, 8e-2)])
def test_an_axis_has_labels_to_read_it_by_however_short_it_is(
    browser: Browser, tmp_path: Path, ends: tuple[float, float]
) -> None:
    cases = [Case(kernel_size=k, threads=2) for k in (3, 7)]
    rows = [factory.record("unfold", end, noise=0, case=case) for end, case in zip(ends, cases, strict=True)]
    report.write(read([factory.results_file(tmp_path / "a.jsonl", rows)]), tmp_path / "a.html")
    browser.open(tmp_path / "a.html", 1280, 2400)
    open_charts(browser)
    marks = "#chart-kernel_size .role-axis .role-axis-label text"
    words = browser.ask(f"return [...document.querySelectorAll('{marks}')].map(mark => mark.textContent)")
    assert len({word for word in words if word.endswith("s")}) >= 3, words


def test_the_table_filters_and_sorts(browser: Browser, made: Path) -> None:
    browser.open(made)
    browser.wait_for("return document.querySelector('.dt-search input')")  # until then one row says that it loads
    count = "return document.querySelectorAll('#rows tbody tr').length"
    everything = browser.ask(count)
    assert everything == len(factory.sweep()) + len(broken())
    search = browser.driver.find_element(By.CSS_SELECTOR, ".dt-search input")
    search.send_keys("blocked")
    browser.wait_for(f"{count} < {everything}")
    shown = browser.ask("return [...document.querySelectorAll('#rows tbody tr')].map(row => row.textContent)")
    assert len(shown) == 5
    assert all("blocked" in row for row in shown)
    title = "//span[@class='dt-column-title'][text()='time, ms']"
    browser.ask("arguments[0].click()", browser.driver.find_element(By.XPATH, title))
    column = (
        "var titles = [...document.querySelectorAll('.dt-scroll-head .dt-column-title')];"
        "var at = titles.findIndex(title => title.textContent == 'time, ms');"
        "return [...document.querySelectorAll('#rows tbody tr')].map(r => parseFloat(r.cells[at].textContent))"
    )
    times = [time for time in browser.ask(column) if time is not None]
    assert times == sorted(times)


def test_cold_times_stand_in_the_table_where_rows_have_them(tmp_path: Path) -> None:
    cold = [factory.record(cold_samples_s=(0.0123, 0.0123, 0.0123)), factory.record("conv3x3")]
    text = report.html(read([factory.results_file(tmp_path / "a.jsonl", cold)]))
    assert "cold, ms" in text
    assert "12.3" in text[text.index("cold, ms") :]
    assert "cold, ms" not in report.html(read([factory.results_file(tmp_path / "b.jsonl", factory.sweep())]))


def test_failed_skipped_and_wrong_rows_stand_with_their_reasons(made: Path) -> None:
    text = made.read_text()
    section = text[text.index('id="failed"') :]
    for row in broken():
        assert row.status in section
        assert str(page.escape(row.reason)) in section
    assert "heads <b>must</b>" not in section


def test_the_rows_can_be_saved_in_full(made: Path) -> None:
    links = re.findall(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', made.read_text())
    files = {name: base64.b64decode(content) for name, content in links}
    assert set(files) == {"a.csv", "a.parquet"}
    csv, parquet = pd.read_csv(io.BytesIO(files["a.csv"])), pd.read_parquet(io.BytesIO(files["a.parquet"]))
    assert len(csv) == len(parquet) == len(factory.sweep()) + len(broken())
    assert list(parquet.columns) == list(csv.columns) == [*COLUMNS, "differs", "above_roof"]


def test_a_large_table_is_saved_compressed(tmp_path: Path) -> None:
    table = load(factory.results_file(tmp_path / "a.jsonl", factory.sweep()))
    many = pd.concat([table] * 400)
    link = page.downloads(many, "many")[0]
    assert link["name"] == "many.csv.gz"
    content = gzip.decompress(base64.b64decode(link["address"].partition(",")[2]))
    assert len(pd.read_csv(io.BytesIO(content))) == len(many)


@pytest.mark.slow
def test_ten_thousand_rows_open_within_three_seconds(browser: Browser, tmp_path: Path) -> None:
    rows = factory.large_sweep(10_000)
    assert len(rows) == 10_000
    report.write(read([factory.results_file(tmp_path / "large.jsonl", rows)]), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 8e6
    seconds = browser.open_counted(tmp_path / "large.html")
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 0")
    assert 0.1 < seconds() < 3
    assert browser.complaints() == []


def test_a_file_where_nothing_ran_is_still_a_report(browser: Browser, tmp_path: Path) -> None:
    report.write(read([factory.results_file(tmp_path / "a.jsonl", broken())]), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    text = browser.ask("return document.body.innerText")
    assert "nothing to plot" in text
    assert "No row has a time: the reasons are below." in text
    assert "Answers" not in text
    assert "out of memory" in text
    assert browser.complaints() == []


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no rows to report"):
        report.html(read([factory.results_file(tmp_path / "a.jsonl", [])]))


def other_machine(tmp_path: Path) -> Path:
    made_on = factory.machine(cpu="Other CPU", cores=8)
    rows = [factory.record(r.impl, 0.02, case=r.case.with_(threads=8), machine=made_on.id) for r in factory.sweep()]
    return factory.results_file(tmp_path / "other.jsonl", rows, made_on)


def test_unlike_machines_are_refused_and_the_message_names_the_way(tmp_path: Path) -> None:
    files = [factory.results_file(tmp_path / "a.jsonl", factory.sweep()), other_machine(tmp_path)]
    with pytest.raises(ResultsError, match="--compare"):
        report.html(read(files))


def test_versions_on_the_same_hardware_are_compared_by_time(tmp_path: Path) -> None:
    newer = factory.machine(commit="fedcba987654")
    rows = [
        factory.record(r.impl, 2 * float(pd.Series(r.samples_s).median()), case=r.case, machine=newer.id)
        if r.impl == "unfold"
        else replace(r, machine=newer.id)
        for r in factory.sweep()
    ]
    files = [
        factory.results_file(tmp_path / "old.jsonl", factory.sweep()),
        factory.results_file(tmp_path / "new.jsonl", rows, newer),
    ]
    runs = compare.load(files)
    pairs = list(compare._pairs(runs[0], runs[1], alike=True))
    by_impl = {pair.a.impl: pair.ratio for pair in pairs}
    assert len(pairs) == len(rows)
    assert by_impl["unfold"].value == pytest.approx(2, rel=0.1)
    assert "4 slower, 8 too close to call" in compare.html(runs)


def test_unlike_machines_side_by_side_share_no_time_ratio(browser: Browser, tmp_path: Path) -> None:
    files = [factory.results_file(tmp_path / "a.jsonl", factory.sweep()), other_machine(tmp_path)]
    page.write(compare.html(compare.load(files)), tmp_path / "both.html")
    browser.open(tmp_path / "both.html", 1280, 3000)
    browser.wait_for("return document.querySelectorAll('.chart svg').length > 1")
    text = browser.ask("return document.body.innerText")
    assert "Different hardware: each time is divided by that of conv3x3 on its own machine" in text
    assert "in A and" in text
    assert "faster" not in text.partition("B: other next to")[2].partition("Charts")[0]
    assert browser.complaints() == []
    assert browser.requests() == []


def test_comparing_needs_two_files(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="two results files"):
        compare.load([factory.results_file(tmp_path / "a.jsonl", factory.sweep())])


def test_the_index_links_a_report_for_each_file(tmp_path: Path) -> None:
    factory.results_file(tmp_path / "cpu.jsonl", factory.sweep())
    other_machine(tmp_path)
    written = index.write(tmp_path)
    names = ["cpu.html", "other.html", "index-compare.html", "index-history.html", "index.html"]
    assert [path.name for path in written] == names
    text = written[-1].read_text()
    assert all(f'href="{name}"' in text for name in names[:-1])
    assert "other next to A: cpu" in written[2].read_text()
    assert "local attention" in text


def test_the_index_of_one_file_compares_nothing(tmp_path: Path) -> None:
    factory.results_file(tmp_path / "cpu.jsonl", factory.sweep())
    assert [path.name for path in index.write(tmp_path)] == ["cpu.html", "index.html"]


def test_files_without_a_common_case_are_not_compared(tmp_path: Path) -> None:
    for suite in ("channels", "resolution"):
        factory.results_file(tmp_path / f"{suite}.jsonl", [factory.record("fused", suite=suite)])
    assert [path.name for path in index.write(tmp_path)] == ["channels.html", "resolution.html", "index.html"]


def test_an_empty_folder_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results file"):
        index.write(tmp_path)
