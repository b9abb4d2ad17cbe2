"""What tests of pages ask of a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver


class Browser:
    """`driver` with what the tests of pages ask."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Open a file at a size and in a theme; what earlier pages logged and stored is forgotten."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme})
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "all"})
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())

    def open_counted(self, path: Path) -> Callable[[], float]:
        """Open a file; the call that comes back says how many seconds its page has computed so far."""
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        before = self._computed_s()
        self.open(path)
        return lambda: self._computed_s() - before

    def _computed_s(self) -> float:
        found = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(float(metric["value"]) for metric in found if metric["name"] == "TaskDuration")

    def show_as_printed(self) -> None:
        """From now on the open page as it goes to a printer; the theme stays."""
        self.ask("window.dispatchEvent(new Event('beforeprint'))")
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})

    def ask(self, script: str, *values: Any) -> Any:
        """The value of a script that ends in `return …`."""
        return self.driver.execute_script(script, *values)

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The first true value of a script."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.ask(script))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since `open`."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since `open`, other than files and those that hold their own data."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]
