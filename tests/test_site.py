"""The documentation site, as `make docs` builds it, and the commands on its pages."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import textstat
from pages import FENCED, called_in_blocks

from sasa_bench.cli import cli
from sasa_bench.cli.options import overrides
from sasa_bench.suite import load, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a block that calls sasa-bench, and of every whole command in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text()
        inline = re.findall(r"`(sasa-bench \w[^\s`]* [^`…\[]+)`", FENCED.sub("", text).replace("\n", " "))
        found += [(page.name, line.strip()) for line in called_in_blocks(text) + inline]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_on_a_page_is_one_that_the_program_takes(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verb, options and values are parsed as the program parses them; files of the reader's own need not exist."""
    monkeypatch.chdir(tmp_path)
    verb, *arguments = shlex.split(command, comments=True)[1:]
    try:
        cli.commands[verb].make_context(verb, list(arguments))
    except click.BadParameter as error:
        if "does not exist" not in str(error):
            pytest.fail(f"{page}: {command}: {error}")
    for suite in re.findall(r"(?<!\S)suites/(\w+)\.toml", command):
        assert suite in shipped(), page
    if verb == "profile" and (named := arguments[0]) in shipped():
        held = [arguments[i + 1] for i, word in enumerate(arguments) if word == "-c"]
        assert len(load(Path(named), overrides(held, None)).cases) == 1, f"{page}: {command} leaves more than one case"


def test_the_set_up_without_torch_names_every_dependency_but_torch() -> None:
    """On the page that shows it; extras are named where they are needed."""
    page = (ROOT / "docs/start.md").read_text().replace("\\\n", " ")
    [listed] = re.findall(r"pip install --no-deps dist/\*\.whl\n *pip install (.*)", page)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}
    assert set(listed.split()) == names - {"torch"}


@pytest.mark.parametrize(
    "path",
    sorted({path for page in PAGES for path in re.findall(r"`(suites/\w+\.toml|tests/[\w/]+\.py)`", page.read_text())}),
)
def test_a_file_of_the_repository_that_a_page_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "target", sorted({t for page in PAGES for t in re.findall(r"`make ([a-z][a-z-]+)", page.read_text())})
)
def test_a_make_target_that_a_page_names_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_generated_tables_are_those_of_today() -> None:
    """The tables of suites, axes and implementations, and the answer of the README from committed results."""
    found = list(runpy.run_path(str(ROOT / "docs/tables.py"))["renewed"]())
    assert ROOT / "README.md" in [page for page, _ in found]
    assert [page for page, text in found if page.read_text() != text] == [], "python docs/tables.py renews them"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    missing = [page for page in (ROOT / "docs").glob("*.md") if not (site / f"{page.stem}.html").exists()]
    assert not missing
    assert (site / "api.html").exists()


def test_its_page_of_commands_has_the_help_of_each_and_the_environment_variables(site: Path) -> None:
    text = (site / "commands.html").read_text()
    assert [verb for verb in cli.commands if f'id="{verb}"' not in text] == []
    assert all(word in text for word in ("--merge-base", "SASA_BENCH_CACHE"))


def test_it_holds_the_reference_results_and_their_index(site: Path) -> None:
    committed = {path.name for path in (ROOT / "reports/reference").glob("*.html")}
    assert committed
    assert committed <= {path.name for path in (site / "reference").iterdir()}


def test_its_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', page.read_text()
        )
        assert not [source for pair in loaded for source in pair if source.startswith(("http", "//"))], page


def prose(page: Path) -> str:
    """The sentences of a page, without code, tables, headings and addresses."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"^(?:\||#|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"\n\s*- ", ". ", text).replace("*", "")


GUIDES = [
    "index.md",
    "start.md",
    "report.md",
    "tutorial.md",
    "layer.md",
    "profile.md",
    "gate.md",
    "slurm.md",
    "library.md",
]


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs" / name for name in GUIDES)], ids=lambda p: p.name)
def test_a_guide_reads_easily(page: Path) -> None:
    """Grade 11 of Flesch and Kincaid at most."""
    words = re.sub(r"[^A-Za-z.,;:?!' \n-]", " ", re.sub(r"\S*\d\S*", "ten", prose(page)))
    assert textstat.flesch_kincaid_grade(words) <= 11


def test_the_pages_use_the_words_of_the_field() -> None:
    prose = runpy.run_path(str(ROOT / "docs/prose.py"))
    assert prose["main"]([]) == 0


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("It is measured anew.", 1, "anew"),
        ("Fine.\nA kernel becomes dearer here.", 2, "dearer"),
        ("Arms take turns.", 1, "take turns"),
        ("`sasa-bench doctor` tells what is missing.", 1, "`sasa-bench doctor` tells"),
    ],
)
def test_other_words_are_found_with_their_line(text: str, line: int, words: str) -> None:
    flawed = runpy.run_path(str(ROOT / "docs/prose.py"))["flawed"]
    assert [found[:2] for found in flawed(text)] == [(line, words)]
    assert list(flawed(f"```sh\n{text}\n```")) == []


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_is_short() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().split()) <= 700
    sentences = re.split(r"(?<=[.:;?!])\s+", prose(readme))
    assert not [sentence for sentence in sentences if len(sentence.split()) > 30]
