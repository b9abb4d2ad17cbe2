"""The cache: where it is, and files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sasa_bench.results.cache import cache_directory, write_atomically


def test_the_cache_is_where_the_variable_says_else_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("SASA_BENCH_CACHE", raising=False)
    assert cache_directory() == tmp_path / "user" / "sasa-bench"
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


@pytest.mark.parametrize("stated", [None, "", "relative/folder"])
def test_without_an_absolute_cache_of_the_user_it_is_in_the_home_folder(
    stated: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SASA_BENCH_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if stated is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", stated)
    assert cache_directory() == tmp_path / ".cache" / "sasa-bench"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "file"
    write_atomically(path, b"first")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]
