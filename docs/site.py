"""What the documentation site takes from the repository: reference results, changelog, commands, API, notes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reports/reference"
SHOWN = {".html", ".jsonl", ".svg", ".md", ".csv"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the laboratory notebook, a page for each file in docs/notes, to the navigation."""
    notes = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs/notes").glob("*.md"))
    if notes and config.nav is not None:
        config.nav = [*config.nav, {"Notes": notes}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of reports/reference, the changelog, and the pages of the commands and of the public functions."""
    for path in sorted(REFERENCE.rglob("*")):
        if path.is_file() and path.suffix in SHOWN:
            at = f"reference/{path.relative_to(REFERENCE).as_posix()}"
            files.append(File.generated(config, at, abs_src_path=str(path)))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    files.append(File.generated(config, "api.html", content=_script("api").page()))
    files.append(File.generated(config, "commands.md", content=_script("commands").page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links into the repository into links of the site, or into plain text where the site has no such page."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+reports/reference/", f"]({up}reference/", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!reference/)(?!\w+\.md)[^)]+\)", r"\1", markdown)


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
