"""What a gate run found, for people and for CI: text, Markdown, JUnit XML, JSON, HTML."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from tabulate import tabulate

from sasa_bench.gate import page
from sasa_bench.gate.decision import Result, files, state
from sasa_bench.gate.evidence import Share
from sasa_bench.gate.names import short_names
from sasa_bench.gate.verdicts import EQUIVALENT, FAILING, INCONCLUSIVE, NOT_RUN, PASS, SKIPPED, CaseVerdict
from sasa_bench.results.fields import printable
from sasa_bench.results.file import replace_text
from sasa_bench.results.format import seconds

MOST_ROWS = 15
"""Rows of a table in a comment on a pull request; the page has all of them."""

MEANING = {
    "PASS": "nothing became slower beyond its margin",
    "REGRESSION": "something became slower, or an exact figure became worse",
    "CONTAMINATED": "identical code measured differently, so the times of this run are not valid; run it again",
}


def meaning(result: Result) -> str:
    """The verdict of the run in words; of one that is INCONCLUSIVE how many cases are open, and why."""
    if result.verdict == PASS and result.unchanged:
        return "base and head are the same files, so nothing was timed"
    if result.verdict in MEANING:
        return MEANING[result.verdict]
    counts = Counter(case.verdict for case in result.cases)
    asked = {
        INCONCLUSIVE: "could not be decided",
        NOT_RUN: "" if result.rules.allow_not_run else "ran in neither arm",
    }
    said = [_cases(counts[verdict], words) for verdict, words in asked.items() if words and counts[verdict]]
    return " and ".join(said) or "no case was timed"


def _cases(count: int, words: str) -> str:
    return f"{count} case{'s' * (count != 1)} {words}"


def text(result: Result) -> str:
    """A summary for the terminal, the few that matter first."""
    counts = Counter(case.verdict for case in result.cases)
    lines = [f"{result.verdict}: {meaning(result)}"]
    if result.contaminated:
        lines.append(f"contaminated: {printable(result.contaminated)}")
    lines += [f"note: {printable(note)}" for note in result.notes]
    for name, arm in result.arms.items():
        said = printable(files(arm))
        source = f"{arm['source']} {state(arm)}".strip()
        lines.append(f"{name}: {source}, files {said}, torch {arm['torch']}, package in {arm['folder']}")
    lines += measured_by(result)
    notable = [case for case in result.cases if case.verdict != EQUIVALENT]
    if notable:
        lines += ["", tabulate(_rows(result, notable), headers="keys", tablefmt="simple")]
    quiet = [case for case in result.cases if case.detectable is not None and case.verdict == EQUIVALENT]
    if quiet:
        worst = max(case.detectable or 0.0 for case in quiet)
        noisiest = "in the noisiest " if len(quiet) > 1 else ""
        lines += ["", f"{_cases(len(quiet), 'equivalent')}; {noisiest}a slow-down of {worst:.1%} would have shown"]
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines.append(_cases(len(result.cases), f"({said}) in {result.spent_s:.0f} s"))
    return "\n".join(lines) + "\n"


def markdown(result: Result) -> str:
    """A comment for a pull request: the verdict, the few cases that matter, and where the page is."""
    lines = [f"## Performance gate: {result.verdict}", "", f"{meaning(result).capitalize()}.", ""]
    if result.contaminated:
        lines += [f"> {printable(result.contaminated)}", ""]
    notable = [case for case in result.cases if case.verdict != EQUIVALENT]
    if notable:
        rows = [{k: v.replace("|", r"\|") for k, v in row.items()} for row in _rows(result, notable[:MOST_ROWS])]
        lines += [tabulate(rows, headers="keys", tablefmt="github"), ""]
    if len(notable) > MOST_ROWS:
        lines += [f"{len(notable) - MOST_ROWS} more are in gate.html.", ""]
    counts = Counter(case.verdict for case in result.cases)
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {result.spent_s:.0f} s.")
    if result.notes or result.shares:
        lines += ["", *(f"- {printable(line)}" for line in [*result.notes, *measured_by(result)])]
    if link := run_link(os.environ):
        lines += ["", f"[The CI run]({link}); gate.html has every case"]
    return "\n".join(lines) + "\n"


def run_link(environment: Mapping[str, str]) -> str:
    """The page of the workflow run that this is, where GitHub or GitLab names it; else ""."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    if all(environment.get(name) for name in names):
        server, repository, run = (environment[name] for name in names)
        return f"{server}/{repository}/actions/runs/{run}"
    return environment.get("CI_JOB_URL", "")


def measured_by(result: Result) -> list[str]:
    """A line for each node that measured, where the cases were spread over machines."""
    nodes: dict[tuple[str, str], list[Share]] = defaultdict(list)
    for share in result.shares:
        nodes[share.node, share.machine].append(share)
    return [
        f"{node} ({machine}): {_cases(sum(len(s.keys) for s in shares), 'in')} {len(shares)} "
        f"task{'s' * (len(shares) > 1)}, {sum(s.spent_s for s in shares):.0f} s"
        for (node, machine), shares in sorted(nodes.items())
    ]


def junit(result: Result) -> str:
    """JUnit XML: a failure for each case that fails the run, an error for one that was not decided or did not run."""
    suite = ElementTree.Element("testsuite", name="sasa-bench gate", time=f"{result.spent_s:.1f}")
    failures = errors = skipped = 0
    for case in result.cases:
        element = ElementTree.SubElement(suite, "testcase", classname="gate", name=printable(case.key))
        if case.key in result.nodes:
            properties = ElementTree.SubElement(element, "properties")
            ElementTree.SubElement(properties, "property", name="node", value=result.nodes[case.key])
        message = printable(f"{case.verdict}: {_ratio(case)} {case.reason}".strip())
        if case.verdict in FAILING:
            failures += 1
            ElementTree.SubElement(element, "failure", message=message)
        elif case.verdict == INCONCLUSIVE or (case.verdict == NOT_RUN and not result.rules.allow_not_run):
            errors += 1
            ElementTree.SubElement(element, "error", message=message)
        elif case.verdict in (NOT_RUN, SKIPPED):
            skipped += 1
            ElementTree.SubElement(element, "skipped", message=message)
    if result.contaminated:
        errors += 1
        element = ElementTree.SubElement(suite, "testcase", classname="gate", name="noise floor")
        ElementTree.SubElement(element, "error", message=printable(result.contaminated))
    total = len(result.cases) + bool(result.contaminated)
    suite.attrib |= {"tests": str(total), "failures": str(failures), "errors": str(errors), "skipped": str(skipped)}
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_json(result: Result) -> str:
    """Everything but the blocks of the pairs."""
    values = {
        "verdict": result.verdict,
        "exit_status": result.exit_status,
        "contaminated": result.contaminated,
        "notes": result.notes,
        "spent_s": result.spent_s,
        "rules": asdict(result.rules),
        "arms": result.arms,
        "cases": [asdict(case) for case in result.cases],
        "shares": [asdict(share) for share in result.shares],
        "pairs": [{"phase": phase, "head": pair.head, "floor": pair.floor} for phase, pair in result.pairs],
    }
    return json.dumps(_plain(values), indent=1, allow_nan=False) + "\n"


def html(result: Result) -> str:
    """The page, see page.html."""
    return page.html(result, meaning(result), _rows(result, result.cases), measured_by(result))


def write_all(result: Result, folder: Path) -> list[Path]:
    """gate.txt, gate.md, gate.xml, gate.json and gate.html in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, Callable[[Result], str]] = {
        "txt": text,
        "md": markdown,
        "xml": junit,
        "json": to_json,
        "html": html,
    }
    paths = []
    for suffix, form in forms.items():
        path = folder / f"gate.{suffix}"
        replace_text(path, form(result))
        paths.append(path)
    return paths


def _rows(result: Result, cases: Sequence[CaseVerdict]) -> list[dict[str, str]]:
    nodes, names = result.nodes, short_names([case.key for case in result.cases])
    return [
        {
            "verdict": case.verdict,
            "case": printable(names[case.key]),
            "head / base": _ratio(case),
            "base": seconds(case.seconds) if case.seconds else "",
        }
        | ({"node": nodes.get(case.key, "")} if nodes else {})
        | {"reason": printable(case.reason)}
        for case in cases
    ]


def _ratio(case: CaseVerdict) -> str:
    if case.ratio is None:
        return ""
    bounds = ""
    if case.low is not None and case.high is not None:
        bounds = f" [{case.low:.3f}, {case.high:.3f}]"
    return f"{case.ratio:.3f}{bounds}"


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
