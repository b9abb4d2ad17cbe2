"""The page of the public functions and classes, as the documentation site shows it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest

import sasa_bench

SCRIPT = Path(__file__).parent.parent / "docs" / "api.py"


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_api", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(script: types.ModuleType) -> str:
    return str(script.page())


@pytest.mark.parametrize("name", sasa_bench.__all__)
def test_every_public_name_has_a_docstring_of_its_own_and_stands_in_the_page(page: str, name: str) -> None:
    found = getattr(sasa_bench, name)
    docstring = found.__doc__
    assert docstring
    assert not docstring.startswith(f"{name}(")  # what a dataclass writes by itself
    assert f'id="{name}"' in page
    assert inspect.cleandoc(docstring).splitlines()[0].replace("'", "&#39;").split("->")[0].split("`")[0] in page


def test_nothing_private_stands_in_it_and_it_loads_nothing(page: str) -> None:
    names = set(re.findall(r'<section id="(\w+)">', page))
    assert names == set(sasa_bench.__all__)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!pdoc\.dev)', page)
