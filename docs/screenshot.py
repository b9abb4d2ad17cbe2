"""The picture of the README, the report of a results file: python docs/screenshot.py reports/reference/NAME.jsonl

Needs Chromium. Writes docs/images/report.png.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from sasa_bench.report import report
from sasa_bench.results.file import read

OUT = Path(__file__).parent / "images/report.png"
WIDTH, HEIGHT = 1100, 820
COLOURS = 64
"""Few enough for a small file, enough for text, lines and a gradient of none."""


def take(results: Path, out: Path) -> None:
    """The top of the report of `results` as a PNG file. Raises FileNotFoundError without Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if program is None:
        raise FileNotFoundError("docs/screenshot.py needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page, raw = Path(folder) / "report.html", Path(folder) / "raw.png"
        report.write(read([results]), page)
        options = [
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--disable-gpu",
            "--disable-background-networking",
        ]
        options += [f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=8000", f"--screenshot={raw}"]
        subprocess.run([program, *options, page.as_uri()], check=True, capture_output=True)
        out.parent.mkdir(exist_ok=True)
        with Image.open(raw) as picture:
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), OUT)
