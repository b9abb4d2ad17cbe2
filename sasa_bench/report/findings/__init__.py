"""Answers computed from rows; none that the rows do not support."""

from sasa_bench.report.findings.answers import Answers, Tile, answers
from sasa_bench.report.findings.claims import FAILS, HOLDS, OPEN, PARTLY, Claim
from sasa_bench.report.findings.ratios import ATTENTION, CONVOLUTION, Ratio, ratio, span, tally, times

__all__ = [
    "ATTENTION", "CONVOLUTION", "FAILS", "HOLDS", "OPEN", "PARTLY", "Answers", "Claim", "Ratio", "Tile", "answers",
    "ratio", "span", "tally", "times",
]  # fmt: skip
