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

FORMAT = 2
"""Which lists of files beside the objects are valid; it changes when what they name does."""

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


def compiled(words: Sequence[str], source: str, store: Path) -> Path:
    """The object of `source`, compiled unless the store holds one of the same command and the same files.

    Which files a command reads is known once it has run. Those that are reached from the folder of the source are told
    apart by their content, wherever that folder lies, others by size and time.

    Raises subprocess.CalledProcessError where the compiler fails.
    """
    command = compile_words(words, source)
    folder = Path(source).parent.resolve()
    read = store / f"{_key(command, source, folder)}.json"
    if (found := _object(read, folder)) and found.exists():
        return found
    store.mkdir(parents=True, exist_ok=True)
    with read.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=store) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := _object(read, folder)) and found.exists():
            return found
        fresh, depends = Path(scratch) / "fresh.o", Path(scratch) / "depends"
        subprocess.run([*command, "-MD", "-MF", str(depends), "-o", str(fresh)], check=True)
        named = {_named(path, source, folder) for path in prerequisites(os.fsdecode(depends.read_bytes()))}
        named.add(os.path.basename(source))
        if unread := [name for name in named if not (folder / name).exists()]:
            raise OSError(f"{source} was compiled from {unread[0]}, which is not there")
        # Of another revision that reads other files too, so that neither displaces the other's objects.
        known = json.loads(read.read_text(encoding="utf-8")) if read.exists() else []
        (Path(scratch) / "read").write_text(json.dumps(sorted(named.union(known))), encoding="utf-8")
        os.replace(Path(scratch) / "read", read)
        found = _object(read, folder)
        assert found is not None
        os.replace(fresh, found)
    return found


def prerequisites(rule: str) -> list[str]:
    """The files that a rule of -MD names, as make reads it: a space or # in a name is behind a backslash, $ is $$."""
    words = re.findall(r"(?:\\.|[^\\\s])+", rule.replace("\\\n", " ").partition(": ")[2])
    return [re.sub(r"\\(.)", r"\1", word).replace("$$", "$") for word in words]


def _key(words: Sequence[str], source: str, folder: Path) -> str:
    """A name for the command, wherever its folder lies, and for the names of the files there: a new header may hide one
    of the same name elsewhere."""
    named = [word.replace(os.path.dirname(source), ".") if os.path.dirname(source) else word for word in words]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.h*"))
    return hashlib.sha256(repr((FORMAT, named, files)).encode()).hexdigest()[:24]


def _named(path: str, source: str, folder: Path) -> str:
    """A file that was read, from the folder of the source where it was reached from there; else its absolute path."""
    spelled = os.path.join(os.getcwd(), path)
    for top in (os.path.join(os.getcwd(), os.path.dirname(source)), str(folder)):
        if spelled.startswith(os.path.join(top, "")):
            return spelled.removeprefix(os.path.join(top, ""))
    return os.path.realpath(path)


def _object(read: Path, folder: Path) -> Path | None:
    """The object of the files listed in `read`, as they are now; None where nothing was compiled yet."""
    if not read.exists():
        return None
    whole = hashlib.sha256(read.stem.encode())
    for name in json.loads(read.read_text(encoding="utf-8")):
        path = folder / name  # of an absolute name that name itself
        own = not os.path.isabs(name)
        state = path.read_bytes() if own and path.is_file() else repr(_stat(path)).encode()
        whole.update(name.encode() + b"\0" + hashlib.sha256(state).digest())
    return read.with_name(f"{whole.hexdigest()[:24]}.o")


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


def _stat(path: Path) -> list[int]:
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
    except OSError as error:
        print(f"{LAUNCHER}: {error}", file=sys.stderr)
        return 1
    return link(words, source, found, os.environ[SEED])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
