"""Words that the project's pages avoid, with better ones: python docs/prose.py [PAGE.md...]

Without pages: README, CONTRIBUTING, SECURITY and docs, but not the notebooks in docs/notes. Prints PAGE:LINE for each,
then ends with status 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = r"(?:the (?:gate|program|command|worker|report|check|table|page)|sasa-bench|`[\w -]+`)"
RULES = {
    r"\bas a rule\b": "usually",
    r"\banew\b": "again",
    r"\bdearer\b": "slower",
    r"\blet go\b": "dropped",
    r"\bin turns\b|\btak(?:e|es|ing) turns\b": "interleaved",
    r"\bfor want of\b": "for lack of",
    r"\ball the same\b": "still",
    r"\bis there already\b|\bare there already\b": "already exists",
    r"\bgo(?:es)? on (?:where|with|from)\b": "resumes, continues",
    r"\bsees? to\b": "the verb of what is done",
    r"\bby itself\b|\bof itself\b": "automatically",
    r"\bneighbourhood attention\b": "neighborhood attention, the field's spelling",
    rf"{PROGRAMS} (?:tells|says|asks|judges|knows)\b": "reports, prints, checks",
}


def flawed(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, words found, better ones) of a Markdown text; code is left out."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        for pattern, better in RULES.items():
            for match in re.finditer(pattern, line, re.IGNORECASE) if not fenced else ():
                yield number, match[0], better


def pages() -> list[Path]:
    """The pages that are checked."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*top, *sorted((ROOT / "docs").glob("*.md"))]


def main(names: Sequence[str]) -> int:
    found = [
        f"{page}:{line}: {words!r}: write {better}"
        for page in ([Path(name) for name in names] or pages())
        for line, words, better in flawed(page.read_text())
    ]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
