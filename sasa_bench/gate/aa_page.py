"""The tables of a journal: live runs by their rules, how far identical code differs, recorded runs decided again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sasa_bench.gate.aa import Rates, Run, in_words, interval, read_runs, recordings, replay, whole_pairs
from sasa_bench.gate.statistics import against_both, location
from sasa_bench.gate.verdicts import Rules
from sasa_bench.results.file import replace_text

RATIOS = (1.0, 1.05, 1.10)
"""Slow-downs with which recorded runs are decided again."""


def scatter(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how quiet the pairs of identical code are beside each neighbour and for each layout.

    Quantiles of |log(head / base)|, and the case whose head over both bases is furthest from 1 over all pairs, base and
    copy in either part: what noise that leans to one side does to the signed-rank test, which the margin must cover.
    """
    shown = []
    for kind, layout in sorted({(pair["beside"], pair["layout"]) for pair in pairs}):
        own = [pair for pair in pairs if (pair["beside"], pair["layout"]) == (kind, layout)]
        values = [abs(value) for pair in own for which in ("head", "floor") for value in pair[which].values()]
        cuts = statistics.quantiles(values, n=100)
        off = {}
        for key in own[0]["head"]:
            head, copy = [pair["head"][key] for pair in own], [pair["floor"][key] for pair in own]
            off[key] = location(against_both(head, copy) + against_both(copy, head))
        furthest = max(off, key=lambda key: abs(off[key]))
        quantiles = {f"p{percent}": f"{cuts[percent - 1]:.4f}" for percent in (50, 90, 99)}
        place = {"furthest case": furthest, "its head / both": f"{math.exp(off[furthest]):.3f}"}
        shown.append({"beside": kind, "layout": layout, "pairs": len(own)} | quantiles | place)
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def table(runs: Sequence[Run]) -> str:
    """Markdown: a line for each slow-down, neighbour and layout, with exact 95 % intervals."""
    groups: dict[tuple[float, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.ratio, run.beside, run.layout), []).append(run)
    shown = []
    for (ratio, beside, layout), own in sorted(groups.items()):
        rates = Rates.of(own)
        minutes = [run.seconds / 60 for run in own if run.seconds]
        shown.append(
            {
                "head is slower by": f"{ratio - 1:.0%}" if ratio > 1 else "nothing",
                "beside": beside,
                "layout": layout,
                "runs": rates.runs,
                "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in rates.verdicts.items()),
                "false alarms": interval(rates.false, rates.runs),
                "slow-downs found": f"{rates.found} of {rates.slowed}, {interval(rates.found, rates.slowed)}"
                if rates.slowed
                else "",
                "minutes": f"{statistics.median(minutes):.1f}, at most {max(minutes):.1f}" if minutes else "",
            }
        )
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def write_page(journal: Path, rules: Rules, replayed: bool = False) -> Path:
    """Write the tables of a journal beside it, as Markdown; `replayed`: with the recorded runs decided again."""
    parts = [f"# Error rates of the gate, from {journal.name}"]
    runs = read_runs(journal)
    for words in dict.fromkeys(run.rules for run in runs):
        own = [run for run in runs if run.rules == words]
        period = f"{min(run.at for run in own)} to {max(run.at for run in own)}"
        parts += [f"## Live runs, {period}", f"Rules: {words or 'not recorded'}.", table(own)]
    if pairs := whole_pairs(journal):
        parts += ["## How far identical code differs, pair by pair", scatter(pairs)]
    if replayed:
        recorded = recordings(journal, rules)
        decided = [run for ratio in RATIOS for run in replay(recorded, rules, ratio)]
        parts += [
            f"## Recorded runs, decided again ({len(recorded)})",
            f"Rules: {in_words(rules)}. No live runs: pairs that were measured once, decided in their order with each "
            "case slowed alone. The trials of one run share its noise, so the intervals, which take them as "
            "independent, are too narrow.",
            table(decided),
        ]
    page = journal.with_suffix(".md")
    replace_text(page, "\n\n".join(parts) + "\n")
    return page
