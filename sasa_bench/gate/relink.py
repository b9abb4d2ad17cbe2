"""A compiler launcher that links what it compiled in another order each time: `relink.py COMPILER ARGUMENTS...`.

Where the linker puts functions moves the time of tight loops by some percent, and lasts as long as the library does.
The gate sets CXX of its arms to this launcher, so native code of any revision is compiled once and linked for each
pair in a random order of functions, with gaps of random size between them.

Environment variables: SASA_BENCH_OBJECTS (the folder in which compiled objects are kept), SASA_BENCH_LAYOUT (the seed
of the order). Uses nothing but the standard library, and runs without site-packages, because it starts many times.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILT, RUN, PAIR = "built", "run", "pair"
LAYOUTS = (BUILT, RUN, PAIR)
"""built: as the compiler left it. run: linked once, head in another order than base and its copy, as an inert change of
the source does. pair: linked again for each pair, each arm in an order of its own, so that layout is noise."""
LAUNCHER, LINKER = "relink", "ld.gold"
OBJECTS, SEED = "SASA_BENCH_OBJECTS", "SASA_BENCH_LAYOUT"
LARGEST_GAP = 512
"""Bytes between two functions are a random multiple of 16 below this."""

_SECTION = re.compile(r"\]\s+(\.text\S*)\s+PROGBITS")


def missing() -> str | None:
    """None, or why native code cannot be linked again here, with what would help."""
    if shutil.which(LINKER) is None:
        return f"{LINKER} is not installed (package binutils-gold or binutils)"
    if shutil.which("readelf") is None:
        return "readelf is not installed (package binutils)"
    return None


def launcher(folder: Path) -> Path:
    """Write an executable to `folder` that runs this file; CXX may name it before a compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LAUNCHER
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def source_of(words: Sequence[str]) -> str | None:
    """The one source file of a command that compiles and links a shared library; None for any other command."""
    sources = [word for word in words if word.endswith((".cpp", ".cc", ".cxx", ".c"))]
    whole = "-shared" in words and "-c" not in words and "-o" in words and len(sources) == 1
    return sources[0] if whole else None


def compile_words(words: Sequence[str], source: str) -> list[str]:
    """The command that only compiles: no output, nothing for the linker, each function in a section of its own."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word == "-o":
            skip = not skip
        elif word != "-shared" and not word.startswith(("-l", "-L", "-Wl,")):
            kept.append(word)
    folder = os.path.dirname(source)
    return [*kept, "-ffunction-sections", *([f"-ffile-prefix-map={folder}=."] if folder else []), "-c"]


def key_of(words: Sequence[str], source: str) -> str:
    """A name for the object: of the command and the files beside the source, wherever their folder lies."""
    folder = Path(source).resolve().parent
    named = [word.replace(os.path.dirname(source), ".") if os.path.dirname(source) else word for word in words]
    whole = hashlib.sha256(repr(named).encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:24]


def compiled(words: Sequence[str], source: str, store: Path) -> Path:
    """The object of `source`, compiled unless the store holds it and no header elsewhere has changed.

    Raises subprocess.CalledProcessError where the compiler fails.
    """
    command = compile_words(words, source)
    found = store / f"{key_of(command, source)}.o"
    signature = found.with_suffix(".json")
    if _current(found, signature):
        return found
    store.mkdir(parents=True, exist_ok=True)
    with found.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=store) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _current(found, signature):
            return found
        fresh, depends = Path(scratch) / "fresh.o", Path(scratch) / "depends"
        subprocess.run([*command, "-MD", "-MF", str(depends), "-o", str(fresh)], check=True)
        own = str(Path(source).resolve().parent)
        text = depends.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")[2]
        outside = [path for path in text.split() if not str(Path(path).resolve()).startswith(own)]
        (Path(scratch) / "signature").write_text(json.dumps({path: _stat(path) for path in outside}), encoding="utf-8")
        os.replace(fresh, found)
        os.replace(Path(scratch) / "signature", signature)
    return found


def _current(found: Path, signature: Path) -> bool:
    if not (found.exists() and signature.exists()):
        return False
    known: dict[str, list[int]] = json.loads(signature.read_text(encoding="utf-8"))
    return all(_stat(path) == about for path, about in known.items())


def order(sections: Sequence[str], seed: str) -> list[tuple[str, int]]:
    """The sections in random order, each with the bytes of the gap before it."""
    draw = random.Random(seed)
    return [
        (section, 16 * draw.randrange(1, LARGEST_GAP // 16)) for section in draw.sample(list(sections), len(sections))
    ]


def link(words: Sequence[str], source: str, compiled_object: Path, seed: str) -> int:
    """Link the object in the order of `seed`; the exit status of the compiler."""
    read = subprocess.run(
        ["readelf", "-SW", compiled_object], capture_output=True, text=True, errors="replace", check=True
    )
    sections = sorted(set(_SECTION.findall(read.stdout)))
    with tempfile.TemporaryDirectory() as scratch:
        gaps, listed = Path(scratch) / "gaps.s", Path(scratch) / "order"
        text, names = [], []
        for number, (section, gap) in enumerate(order(sections, seed)):
            name = f".text.sasa_gap_{number}"
            text.append(f'.section {name},"ax",@progbits\n.balign 16\n.skip {gap}\n')
            names += [name, section]
        gaps.write_text("".join(text) + '.section .note.GNU-stack,"",@progbits\n', encoding="utf-8")
        listed.write_text("\n".join(names) + "\n", encoding="utf-8")
        inputs = {source: [str(compiled_object), str(gaps)]}
        linked = [part for word in words for part in inputs.get(word, [word])]
        return subprocess.run([*linked, "-fuse-ld=gold", f"-Wl,--section-ordering-file={listed}"]).returncode


def _stat(path: str) -> list[int]:
    try:
        about = os.stat(path)
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]


def main(words: list[str]) -> int:
    """Run a compiler's command; one that makes a shared library of one source is linked in random order."""
    source = source_of(words)
    if source is None or not os.environ.get(SEED) or not os.environ.get(OBJECTS):
        return subprocess.run(words).returncode
    try:
        found = compiled(words, source, Path(os.environ[OBJECTS]))
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    return link(words, source, found, os.environ[SEED])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
