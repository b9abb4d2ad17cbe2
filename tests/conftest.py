"""A headless Chromium that reaches no network, for tests of pages; and threads that sleep while they wait."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Browser

# Several test processes share a few cores; the workers they start set their own policy, and the threads of their case.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles a program for each set of vector instructions to see that it runs, and starts a pool of compilers.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if importlib.util.find_spec("hypothesis"):  # tests of a GPU do without
    from hypothesis import settings

    # An example that takes long says that the machine is busy.
    settings.register_profile("busy", deadline=None)
    settings.load_profile("busy")

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--proxy-server=127.0.0.1:9",
)
"""The last one sends every request over the network to a port where nothing listens."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="also what repeats in more builds and sizes what is shown"
    )


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage, of which some tests ask for many, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--exhaustive"):
        return
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(
                pytest.mark.skip(reason="repeats in more builds or sizes what is shown; see `make test-all`")
            )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, leave out what has no such tests: a machine with a GPU need not have what the rest imports."""
    if config.getoption("-m") != "gpu":
        return None
    if collection_path.is_dir():
        files = list(collection_path.rglob("test_*.py"))
    else:
        files = [collection_path] if collection_path.name.startswith("test_") else []
    return (bool(files) and not any("mark.gpu" in file.read_text() for file in files)) or None


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the session. Where there is none the test is skipped, but fails in CI."""
    from browser import Browser
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    chromedriver = shutil.which("chromedriver")
    if not program or not chromedriver:
        reason = "needs chromium and chromedriver (apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(service=Service(chromedriver), options=options)
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of few channels and blocks: the same code in a fraction of the time."""
    from sasa_bench.networks import resnet, retinanet

    monkeypatch.setattr(resnet, "WIDTH", 16)
    monkeypatch.setitem(resnet.BLOCKS, 26, (1, 1, 2, 1))
    monkeypatch.setattr(retinanet, "WIDTH", 32)
