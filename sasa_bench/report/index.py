"""A folder of results files as pages: a report for each file, and an index of them."""

from __future__ import annotations

from pathlib import Path

from sasa_bench.report import page, report
from sasa_bench.report.findings import answers
from sasa_bench.report.table import frame
from sasa_bench.results.file import ResultsError, read


def write(folder: Path) -> list[Path]:
    """Write FILE.html beside each FILE.jsonl of `folder`, and index.html; returns their paths, the index last.

    Raises ResultsError for a folder without results files, or with one that cannot be reported.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ResultsError(f"{folder} holds no results file (*.jsonl): `sasa-bench run … --out {folder}/NAME.jsonl`")
    written, entries = [], []
    for file in files:
        results = read([file])
        out = file.with_suffix(".html")
        report.write(results, out)
        written.append(out)
        table = frame(results)
        machine = next(m for m in results.machines.values() if m.id in {row.machine for row in results.rows})
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
    written.append(folder / "index.html")
    page.write(page.render("index.html", entries=entries), written[-1])
    return written
