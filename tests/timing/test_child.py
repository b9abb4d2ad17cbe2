"""What the child's side of a worker does around the measurement itself."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sasa_bench import impls
from sasa_bench.case import Case
from sasa_bench.impls._native import Library, missing_compiler
from sasa_bench.timing import child
from sasa_bench.timing.process import Request

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="there is no C++ compiler")


def library(folder: Path, name: str, code: str) -> Library:
    source = folder / f"{name}.cpp"
    source.write_text(code, encoding="utf-8")
    return Library(name, source)


@pytest.fixture
def with_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Library]:
    """`unfold` and `blocked` as if each had native code, that of `blocked` broken; `naive` without any."""
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    found = {
        "unfold": library(tmp_path, "right", "extern int seven() { return 7; }\n"),
        "blocked": library(tmp_path, "broken", "this is no C++\n"),
    }
    get = impls.get

    def with_library(name: str) -> impls.Impl:
        impl = get(name)
        native = [found[name]] if name in found else []
        return replace(impl, info=replace(impl.info, native=lambda case: native))

    monkeypatch.setattr(impls, "get", with_library)
    return found


def test_native_code_of_all_implementations_is_compiled_at_once(
    with_native: dict[str, Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, compile_one = threading.Barrier(2, timeout=60), Library._compile

    def together(self: Library, path: Path) -> None:
        both.wait()
        compile_one(self, path)

    monkeypatch.setattr(Library, "_compile", together)
    said: list[tuple[str, str]] = []
    request = Request(Case(channels=8, resolution=5), ("naive", "unfold", "blocked", "no-such-name"), 0, {})
    child._compile_together(request, lambda name, stage: said.append((name, stage)))
    assert said == [("unfold", "build")]
    assert with_native["unfold"].is_built()
    assert not with_native["blocked"].is_built()


def test_what_a_case_does_not_need_is_not_compiled(with_native: dict[str, Library]) -> None:
    said: list[str] = []
    request = Request(Case(channels=8, resolution=5), ("naive",), 0, {})
    child._compile_together(request, lambda name, stage: said.append(name))
    assert said == []
    assert not with_native["unfold"].is_built()


@pytest.mark.parametrize("name", ["fused", "fused_packed", "onnx_fused"])
def test_implementations_in_native_code_name_it_ahead(name: str) -> None:
    impl = impls.get(name)
    if impl.missing():
        pytest.skip(impl.missing())
    libraries = impl.info.native(Case())
    assert libraries
    assert all(library.source.is_file() for library in libraries)
