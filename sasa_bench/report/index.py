"""A folder of results files as pages: a report for each file, their comparison and history, and an index of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sasa_bench.case import Case
from sasa_bench.report import compare, history, page, report
from sasa_bench.report.findings import answers
from sasa_bench.report.table import frame
from sasa_bench.results.file import ResultsError, read

COMPARISON, HISTORY = "index-compare.html", "index-history.html"


def write(folder: Path) -> list[Path]:
    """Write FILE.html beside each FILE.jsonl of `folder`, and index.html; returns their paths, the index last.

    Of files that have a case in common also COMPARISON and HISTORY; no history where no row is ok, or where ruptures is
    not installed.

    Raises ResultsError for a folder without results files, or with one that cannot be reported.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ResultsError(
            f"{folder} holds no results file (*.jsonl): `sasa-bench run … --out {folder}/NAME.jsonl` writes one"
        )
    written, entries, cases = [], [], Counter[tuple[str, str, Case]]()
    for file in files:
        results = read([file])
        out = file.with_suffix(".html")
        try:
            report.write(results, out)
        except ResultsError as error:
            raise ResultsError(f"{file}: {error}") from None
        written.append(out)
        cases.update(compare.keyed(results).keys())
        table = frame(results)
        machine = results.used_machines()[0]
        entries.append(
            {
                "name": file.stem,
                "page": out.name,
                "file": file.name,
                "machine": page.describe(machine),
                "answers": answers(results, table),
                "suites": list(dict.fromkeys(table["suite"])),
                "counts": table["status"].value_counts().to_dict(),
                "started": str(min(table["started_at"]))[:10],
            }
        )
    together = _write_together(folder, files) if max(cases.values(), default=0) > 1 else []
    written += [path for path, _ in together]
    written.append(folder / "index.html")
    links = [{"page": path.name, "words": words} for path, words in together]
    page.write(page.render("index.html", entries=entries, links=links), written[-1])
    return written


def _write_together(folder: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """(page, what it shows) of all files together."""
    out = folder / COMPARISON
    page.write(compare.html(compare.load(files)), out)
    pages = [(out, "All files side by side")]
    try:
        found = history.load(files)
    except history.HistoryError:
        return pages
    out = folder / HISTORY
    page.write(history.html(found), out)
    return [*pages, (out, "Results over revisions")]
