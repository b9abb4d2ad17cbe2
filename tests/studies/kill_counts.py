"""What a study of commands that are ended counts, as a CSV file and half done."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from sasa_bench import cli


@dataclass
class Count:
    """kills       commands that were started to be ended
    running     of them, those that were ended before they were done
    unreadable  files that cannot be read afterwards
    lost        rows that were in a file before and are not in it afterwards; one that not every worker had measured may
                have been replaced
    split       cases of which a file has some rows but not all
    unequal     final tables that differ from that of an undisturbed run in more than times
    tracebacks  outputs with a traceback
    """

    command: str
    way: str
    kills: int = 0
    running: int = 0
    unreadable: int = 0
    lost: int = 0
    split: int = 0
    unequal: int = 0
    tracebacks: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def flawless(self) -> bool:
        """Whether nothing went wrong."""
        return not any((self.unreadable, self.lost, self.split, self.unequal, self.tracebacks))


def as_csv(counts: Sequence[Count]) -> str:
    """One line for each command and way."""
    names = [each.name for each in fields(Count) if each.name != "remarks"]
    lines = [",".join(str(getattr(count, name)) for name in names) for count in counts]
    return "\n".join([",".join(names), *lines]) + "\n"


def digest() -> str:
    """Of every file of the package: counts of two versions of it do not belong in one table."""
    files = sorted(Path(cli.__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def begun_in(path: Path) -> list[Count]:
    """The counts of a study that was stopped; none where there is no such file, or of another package."""
    if not path.exists():
        return []
    head, *lines = path.read_text().splitlines()
    if head != digest():
        print(f"{path} counts kills of another version of the package: the study starts again", flush=True)
        return []
    rows = [dict(row) for row in csv.DictReader(lines)]
    return [Count(row.pop("command"), row.pop("way"), **{k: int(v) for k, v in row.items()}) for row in rows]
