"""The folder of what is made once and used again: compiled code, tunables, the script of the pages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """$SASA_BENCH_CACHE, else `sasa-bench` in the user's cache, by the XDG Base Directory Specification."""
    if own := os.environ.get("SASA_BENCH_CACHE"):
        return Path(own)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification says to ignore a relative one.
    return (caches if caches.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "sasa-bench"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that others see either whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
