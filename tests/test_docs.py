"""docs/architecture.md describes the package as it is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()


def rooms() -> set[str]:
    """The folders and files of the package, as the table of rooms writes them."""
    hidden = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed", "__pycache__"}
    entries = [path for path in (ROOT / "sasa_bench").iterdir() if path.name not in hidden]
    return {f"sasa_bench/{path.name}{'/' * path.is_dir()}" for path in entries}


def test_the_table_of_rooms_names_every_room_and_no_other() -> None:
    table = TEXT[TEXT.index("## Rooms") : TEXT.index("## To add something")]
    assert set(re.findall(r"^\| `(sasa_bench/[\w./]+)`", table, flags=re.MULTILINE)) == rooms()


def test_the_order_of_the_rooms_is_that_of_the_contract() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    order = [name.strip().removeprefix("sasa_bench.") for layer in layers for name in layer.split("|")]
    table = TEXT[TEXT.index("## Rooms") : TEXT.index("## To add something")]
    written = re.findall(r"^\| `sasa_bench/(\w+)", table, flags=re.MULTILINE)
    assert written == order


def test_every_path_that_the_page_names_exists() -> None:
    for path in re.findall(r"`((?:sasa_bench|suites|docs|tests)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


def test_the_package_keeps_its_promise_of_few_entries_at_the_top() -> None:
    entries = [p for p in (ROOT / "sasa_bench").iterdir() if p.name != "__pycache__"]
    assert sum(p.is_file() for p in entries) <= 9
    assert sum(p.is_dir() for p in entries) <= 12


def test_no_file_but_a_kernel_is_longer_than_350_lines() -> None:
    kernels = {".cu", ".cpp", ".h"}
    for path in (ROOT / "sasa_bench").rglob("*"):
        if path.is_file() and path.suffix not in kernels and "__pycache__" not in path.parts:
            assert len(path.read_text(errors="replace").splitlines()) <= 350, path
