"""The launcher that links one object in many orders, and the layouts that a gate gives its arms."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from sasa_bench.gate import relink
from sasa_bench.gate.layout import laid_out
from sasa_bench.impls._native import Library, missing_compiler

pytestmark = pytest.mark.skipif(
    bool(relink.missing() or missing_compiler()), reason=str(relink.missing() or missing_compiler())
)

FUNCTIONS = [f"function_{i}" for i in range(12)]
SOURCE = "#include <outside.h>\n" + "".join(
    f'extern "C" int {name}() {{ return {i} + OUTSIDE; }}\n' for i, name in enumerate(FUNCTIONS)
)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    for name, text in (("own/a.cpp", SOURCE), ("headers/outside.h", "#define OUTSIDE 0\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return Library("a", tmp_path / "own/a.cpp", flags=("-O2", f"-I{tmp_path / 'headers'}"))


def linked(
    library: Library, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[int]]:
    """The functions of a library that is built in this environment, by address, and what they return."""
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        loaded = ctypes.CDLL(str(library.build()))
    address = {name: ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in FUNCTIONS}
    return sorted(FUNCTIONS, key=address.__getitem__), [getattr(loaded, name)() for name in FUNCTIONS]


def test_an_object_is_compiled_once_and_linked_in_another_order_for_each_pair(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    orders = []
    with laid_out(relink.PAIR, tmp_path) as layout:
        assert layout.why == ""
        assert layout.note() == ""
        for _ in range(2):
            order, values = linked(library, layout.environment("head"), monkeypatch)
            assert values == list(range(len(FUNCTIONS)))
            orders.append(order)
            layout.settle()
        assert layout.linked == {"head": 1}
        assert "for each pair: base 0, head 1, copy 0" in layout.note()
    assert len({tuple(order) for order in [*orders, FUNCTIONS]}) == 3
    assert len(list((tmp_path / "cache/objects").glob("*.o"))) == 1
    assert not list(tmp_path.glob("layouts-*"))

    (tmp_path / "headers/outside.h").write_text("#define OUTSIDE 100\n")
    with laid_out(relink.PAIR, tmp_path) as layout:
        assert linked(library, layout.environment("head"), monkeypatch)[1][0] == 100


def test_linked_for_a_run_head_differs_from_base_and_base_from_its_copy_does_not(tmp_path: Path) -> None:
    with laid_out(relink.RUN, tmp_path) as layout:
        seeds = [layout.environment(arm)[relink.SEED] for arm in ("base", "copy", "head", "head")]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def value_of(source: Path, store: Path) -> int:
    """What `function` of a source returns once it is compiled through the store and linked."""
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
    found = relink.compiled(command, str(source), store)
    assert relink.link(command, str(source), found, "seed") == 0
    return int(ctypes.CDLL(str(source.with_suffix(".so"))).function())


@pytest.mark.parametrize("top", ["my projects", "#1 $HOME"])
def test_a_path_with_a_space_or_a_sign_of_make_hides_no_file_that_was_read(tmp_path: Path, top: str) -> None:
    store = tmp_path / top / "objects"
    found = []
    for name in ("base", "head"):
        source = tmp_path / top / name / "csrc/a.cpp"
        source.parent.mkdir(parents=True)
        (source.parent / "value.h").write_text(f"#define VALUE {len(found)}\n")
        source.write_text('#include "value.h"\nextern "C" int function() { return VALUE; }\n')
        found.append(value_of(source, store))
    assert found == [0, 1]


def test_a_source_that_is_a_link_is_compiled_with_the_headers_beside_the_link(tmp_path: Path) -> None:
    for name in ("library", "csrc"):
        (tmp_path / name).mkdir()
    (tmp_path / "library/real.cpp").write_text('#include "value.h"\nextern "C" int function() { return VALUE; }\n')
    (tmp_path / "csrc/a.cpp").symlink_to("../library/real.cpp")
    for value in (1, 2):
        (tmp_path / "csrc/value.h").write_text(f"#define VALUE {value}\n")
        relink.compiled(
            ["g++", "-shared", "-fPIC", str(tmp_path / "csrc/a.cpp")], str(tmp_path / "csrc/a.cpp"), tmp_path
        )
    assert len(list(tmp_path.glob("*.o"))) == 2


def test_the_files_of_a_rule_are_read_as_make_reads_them() -> None:
    rule = "fresh.o: /usr/include/a.h \\\n /home/me/my\\ work/b.h \\\n c\\#.h $$d.h\n"
    assert relink.prerequisites(rule) == ["/usr/include/a.h", "/home/me/my work/b.h", "c#.h", "$d.h"]


def test_where_the_cache_cannot_be_written_objects_are_kept_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, where the folder of the cache should be")
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    with laid_out(relink.PAIR, tmp_path) as layout:
        assert layout.environment("head")[relink.OBJECTS] == str(layout.folder / "objects")


@pytest.mark.parametrize("header", ["beside.h", "operators/below.h", "operators/part.inc", "../elsewhere/above.h"])
def test_checkouts_share_an_object_until_a_file_that_it_read_differs(tmp_path: Path, header: str) -> None:
    store = tmp_path / "objects"
    sources = []
    for name, value in (("x", 1), ("y", 1), ("z", 2)):
        source = tmp_path / name / "csrc/a.cpp"
        included = source.parent / header
        included.parent.mkdir(parents=True)
        source.parent.mkdir(exist_ok=True)
        included.write_text(f"#define VALUE {value}\n")
        source.write_text(f'#include "{header}"\nextern "C" int function() {{ return VALUE; }}\n')
        sources.append(source)
    assert [value_of(source, store) for source in sources] == [1, 1, 2]
    assert len(list(store.glob("*.o"))) == 2
    assert relink.compiled(["g++", "-shared", str(sources[0]), "-o", "a.so"], str(sources[0]), store).exists()


def test_a_new_header_that_hides_another_one_is_seen(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "include/value.h").write_text("#define VALUE 1\n")
    source = tmp_path / "csrc/a.cpp"
    source.write_text('#include "value.h"\nextern "C" int function() { return VALUE; }\n')
    command = ["g++", "-shared", "-fPIC", f"-I{tmp_path / 'include'}", str(source), "-o", "a.so"]
    first = relink.compiled(command, str(source), tmp_path / "objects")
    assert relink.compiled(command, str(source), tmp_path / "objects") == first
    (tmp_path / "csrc/value.h").write_text("#define VALUE 2\n")
    assert relink.compiled(command, str(source), tmp_path / "objects") != first


@pytest.mark.parametrize(
    "words",
    [["g++", "--version"], ["g++", "-c", "a.cpp", "-o", "a.o"], ["g++", "-shared", "a.cpp", "b.cpp", "-o", "l.so"]],
)
def test_other_commands_of_a_compiler_are_left_alone(words: list[str]) -> None:
    assert relink.source_of(words) is None


def test_gaps_keep_functions_aligned_and_below_the_largest() -> None:
    gaps = [gap for _, gap in relink.order([f".text.{i}" for i in range(200)], "seed")]
    assert {gap % 16 for gap in gaps} == {0}
    assert 0 < min(gaps) < max(gaps) < relink.LARGEST_GAP


def test_what_does_not_compile_ends_with_the_words_of_the_compiler(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.source.write_text("int broken( {\n")
    with laid_out(relink.PAIR, tmp_path) as layout:
        for name, value in layout.environment("base").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(relink.OBJECTS, str(tmp_path / "objects"))
        with pytest.raises(RuntimeError, match=r"cannot compile a\.cpp: .*error"):
            library.build()


def test_a_machine_whose_linker_cannot_order_functions_keeps_code_as_it_was_built_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relink, "LINKER", "ld.nothing_like_it")
    with laid_out(relink.PAIR, tmp_path) as layout:
        assert (layout.kind, layout.environment("head")) == (relink.BUILT, {})
        assert layout.note().startswith("layout: native code as it was built, because ld.nothing_like_it is not")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "g++ --no-such-option")
    with laid_out(relink.PAIR, tmp_path) as layout:
        assert "no-such-option" in layout.note()
