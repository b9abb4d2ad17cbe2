"""What every page shares: the script of its charts is made once for a version of what makes it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import vl_convert

from sasa_bench.report import page


def test_the_script_of_charts_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def bundle(snippet: str) -> str:
        made.append(snippet)
        return f"{snippet} '</script>'"

    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "cache"))
    make = page.chart_script.__wrapped__
    first, second = make(), make()
    assert first == second == r"window.vegaEmbed = vegaEmbed; '<\/script>'"
    assert len(made) == 1
    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    assert make() == first
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_costs_a_page_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: snippet)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SASA_BENCH_CACHE", str(tmp_path / "file"))
    assert page.chart_script.__wrapped__() == "window.vegaEmbed = vegaEmbed;"
