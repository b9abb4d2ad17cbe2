"""What a reader does with the page: sends a view as a link, copies, looks at samples, uses the keyboard, listens."""

from __future__ import annotations

from pathlib import Path

import factory
import pytest
from browser import Browser

from sasa_bench.case import Case
from sasa_bench.report import report
from sasa_bench.results.file import read


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with two axes, a row that failed and an answer."""
    folder = tmp_path_factory.mktemp("use")
    rows = [*factory.sweep(), factory.failed("naive", "error", "RuntimeError: boom | pipe", case=Case(threads=2))]
    rows += [
        factory.record(impl, 0.004 * scale, case=Case(kernel_size=k, channels=32, threads=2))
        for k in (3, 5, 7, 9)
        for impl, scale in (("unfold", k * k / 9), ("blocked", k / 3), ("conv3x3", 1.5))
    ]
    report.write(read([factory.results_file(folder / "a.jsonl", rows)]), folder / "a.html")
    return folder / "a.html"


def drawn(browser: Browser) -> None:
    browser.ask("document.getElementById('charts').scrollIntoView()")
    browser.wait_for("return document.querySelector('#chart-kernel_size svg.marks')")


def choose(browser: Browser, label: str, value: str) -> None:
    browser.ask(
        "var menus = Array.from(document.querySelectorAll('#chart-kernel_size .vega-bind'));"
        "var found = menus.filter(m => m.querySelector('.vega-bind-name').textContent.trim() === arguments[0])[0];"
        "var select = found.querySelector('select');"
        "select.value = arguments[1];"
        "['input', 'change'].forEach(function (name) { select.dispatchEvent(new Event(name)); });",
        label,
        value,
    )


def menus(browser: Browser) -> dict[str, str]:
    return browser.ask(
        "return Object.fromEntries(Array.from(document.querySelectorAll('#chart-kernel_size .vega-bind')).map("
        "row => [row.querySelector('.vega-bind-name').textContent.trim(), row.querySelector('select').value]))"
    )


def test_what_is_chosen_stands_in_the_address_and_the_address_chooses(browser: Browser, page: Path) -> None:
    browser.open(page)
    drawn(browser)
    assert "#suite" not in browser.ask("return location.href")
    choose(browser, "along", "channels")
    choose(browser, "show", "peak_memory_bytes")
    address = browser.wait_for("return location.hash.indexOf('show=peak_memory_bytes') > 0 && location.href")
    assert "suite=kernel_size" in address
    assert "x=channels" in address
    browser.ask("location.href = 'about:blank'")
    browser.driver.get(address)
    drawn(browser)
    found = menus(browser)
    assert (found["along"], found["show"]) == ("channels", "peak_memory_bytes")
    assert browser.ask("return scrollY > 0"), "the chart that the address names is in sight"


def test_an_address_may_hide_implementations_and_one_that_names_nothing_known_is_harmless(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    browser.ask("location.hash = 'suite=kernel_size&hide=unfold&show=no_such&x=colour&channels=1'")
    drawn(browser)
    lines = (
        "return document.querySelectorAll('#chart-kernel_size .mark-symbol.role-mark path[fill=\"#0072b2\"]').length"
    )
    browser.wait_for("return document.querySelectorAll('#chart-kernel_size .mark-symbol.role-mark path').length > 0")
    assert browser.ask(lines) == 0
    assert menus(browser)["show"] == "time_median_s"
    assert browser.complaints() == []


def test_the_chart_draws_the_limits_of_the_time_and_of_nothing_else(browser: Browser, page: Path) -> None:
    browser.open(page)
    drawn(browser)
    texts = "Array.from(document.querySelectorAll('#chart-kernel_size .role-mark text'))"
    words = f"return {texts}.map(text => text.textContent).filter(Boolean)"
    browser.wait_for(f"{words}.length == 2")
    assert set(browser.ask(words)) == {"roofline", "fastest 3×3 convolution"}
    choose(browser, "show", "flops")
    browser.wait_for(f"{words}.length == 0")


def markdown(browser: Browser, selector: str) -> str:
    return browser.driver.execute_async_script(
        "var done = arguments[1]; asMarkdown(document.querySelector(arguments[0])).then(done);", selector
    )


def test_an_answer_and_a_table_can_be_copied_as_markdown(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 5")
    answer = markdown(browser, ".card")
    assert answer.startswith("### Which implementation of attention?")
    assert "- `blocked` is the fastest" in answer
    table = markdown(browser, "#rows").splitlines()
    assert len(table) == 2 + 25, "every row of the file"
    assert {line.count(" | ") for line in table} == {table[0].count(" | ")}
    assert any("boom \\| pipe" in line for line in table)
    browser.ask("document.querySelector('#table button.copy').click()")
    browser.wait_for("return document.querySelector('#table button.copy').textContent == 'Copied'")


def test_a_copied_table_holds_what_the_filter_leaves(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 5")
    browser.ask(
        "var box = document.querySelector('#table ~ * input[type=search]'); box.value = 'boom';"
        "box.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length == 1")
    assert len(markdown(browser, "#rows").splitlines()) == 3


def test_the_samples_of_a_chosen_row_are_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.ask("document.getElementById('samples').scrollIntoView()")
    points = "document.querySelectorAll('#chart-samples .mark-symbol.role-mark path').length"
    browser.wait_for(f"return {points} == 21")
    browser.wait_for("return document.querySelectorAll('#chart-distribution .mark-rect.role-mark path').length > 2")
    said = browser.ask("return document.querySelector('[data-said]').textContent")
    assert said.startswith("21 samples, p20 to p80 spans")
    browser.ask(
        "var menu = document.querySelector('[data-level=impl]'); menu.value = 'conv3x3';"
        "menu.dispatchEvent(new Event('change'))"
    )
    assert browser.ask("return document.querySelector('[data-level=case]').options.length") == 8
    assert browser.complaints() == []


def test_on_a_phone_the_navigation_ends_before_the_theme_button(browser: Browser, page: Path) -> None:
    browser.open(page, 390, 844)
    right, left, hidden = browser.ask(
        "var nav = document.querySelector('header nav'), button = document.querySelector('header button');"
        "nav.scrollLeft = nav.scrollWidth; var last = nav.lastElementChild.getBoundingClientRect();"
        "return [last.right, button.getBoundingClientRect().left, nav.scrollWidth - nav.clientWidth]"
    )
    assert hidden > 0
    assert right <= left


def test_the_keyboard_reaches_the_content_first(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    browser.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.ask("return document.activeElement.textContent") == "Skip to the content"
    assert browser.ask("return document.activeElement.getBoundingClientRect().left >= 0"), (
        "in sight while it is focused"
    )


def test_the_keyboard_hides_an_implementation_and_brings_it_back(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    drawn(browser)
    lines = "document.querySelectorAll('#chart-kernel_size .mark-line path:not([stroke-dasharray=\"2,3\"])').length"
    browser.wait_for(f"return {lines} == 3")
    summary = browser.driver.find_element(By.CSS_SELECTOR, "details.names summary")
    browser.ask("arguments[0].focus()", summary)
    summary.send_keys(Keys.ENTER)
    summary.send_keys(Keys.TAB)
    browser.driver.switch_to.active_element.send_keys(Keys.SPACE)
    browser.wait_for(f"return {lines} == 2")
    assert "hide=unfold" in browser.ask("return location.hash")
    browser.driver.switch_to.active_element.send_keys(Keys.SPACE)
    browser.wait_for(f"return {lines} == 3")
    assert "hide" not in browser.ask("return location.hash")
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_a_screen_reader_finds_no_serious_fault(browser: Browser, page: Path, width: int, theme: str) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python, of the extra dev")
    script = next(Path(axe.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    browser.open(page, width, 2400, theme)
    browser.wait_for("return document.querySelectorAll('#rows tbody tr').length > 5")
    drawn(browser)
    browser.driver.set_script_timeout(120)
    browser.ask(script)
    found = browser.driver.execute_async_script(
        "var done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(function (result) {"
        "done(result.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html.slice(0, 200))])); });"
    )
    assert [fault for fault in found if fault[0] in ("serious", "critical")] == []
