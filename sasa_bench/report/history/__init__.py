"""Past results files over commits: what changed, and when."""

from sasa_bench.report.history.changes import best_split, change_points, least_results
from sasa_bench.report.history.history import Change, History, load
from sasa_bench.report.history.outputs import html, render, rows
from sasa_bench.report.history.series import HistoryError, Run, Series

__all__ = [
    "Change", "History", "HistoryError", "Run", "Series", "best_split", "change_points", "html", "least_results",
    "load", "render", "rows",
]  # fmt: skip
