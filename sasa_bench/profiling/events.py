"""The events of a Chrome trace one after another, whatever the size of the file."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sasa_bench.case import UserError

CHUNK = 1 << 20
LARGEST = 1 << 24
"""Characters of one event at most; more than that between two of them is no trace."""
_START = re.compile(r'"traceEvents"\s*:\s*\[')
CUT = 16
"""Characters before the end of a file in which a word, a number or a character may have been cut off."""
_BETWEEN = re.compile(r"[\s,]*")


class TraceError(UserError):
    """A file that is not a Chrome trace; the message states which and why."""


class Events:
    """Iterates over the events of `path`, plain or gzipped: a list, or an object with a list `traceEvents`.

    Holds one event and one chunk of text at a time. `cut_off` is set at the end of a file that stops before its list
    does, as that of a process that was killed; the events before are given.

    Raises TraceError for a file that cannot be read or holds no events.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_off = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                yield from self._events(_text(file))
        except OSError as error:
            raise TraceError(f"{self.path} cannot be read as a trace: {error.strerror or error}") from None
        except zlib.error as error:
            raise self._refused(f"it cannot be unpacked: {error}") from None

    def _events(self, chunks: Iterator[str]) -> Iterator[dict[str, Any]]:
        text = next(chunks, "")
        while not (found := self._first(text)):
            if len(text) > LARGEST or not (chunk := next(chunks, "")):
                raise self._refused("it has no list of events, as `traceEvents` or by itself")
            text += chunk
        at, decode = found, json.JSONDecoder(strict=False).raw_decode
        while True:
            gap = _BETWEEN.match(text, at)
            at = gap.end() if gap else at
            if text.startswith("]", at):
                return
            try:
                event, at = decode(text, at)
            except json.JSONDecodeError as error:
                if len(text) - at > LARGEST:
                    raise self._refused(f"an event is not JSON ({error.msg})") from None
                if not (chunk := next(chunks, "")):
                    if not error.msg.startswith("Unterminated") and error.pos < len(text.rstrip()) - CUT:
                        raise self._refused(f"an event is not JSON ({error.msg}): {text[at : at + 60]!r}") from None
                    self.cut_off = True
                    return
                text, at = text[at:] + chunk, 0
                continue
            if not isinstance(event, dict):
                raise self._refused(f"an event is {event!r}")
            yield event

    @staticmethod
    def _first(text: str) -> int:
        """Where the first event may start; 0 where that is not known yet."""
        if text.lstrip().startswith("["):
            return text.index("[") + 1
        found = _START.search(text)
        return found.end() if found else 0

    def _refused(self, why: str) -> TraceError:
        return TraceError(f"{self.path} is not a Chrome trace: {why}; give one of torch.profiler or of ONNX Runtime")


def _text(file: IO[bytes]) -> Iterator[str]:
    """The text of a file, plain or gzipped, in chunks; it ends where a gzipped one is cut off.

    Names of operators are no valid UTF-8 in some versions of torch: what is not becomes U+FFFD.
    """
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    unpack = zlib.decompressobj(wbits=31)
    while chunk := file.read(CHUNK):
        while packed and chunk:
            yield decode(unpack.decompress(chunk))
            chunk = unpack.unused_data
            if unpack.eof:
                unpack = zlib.decompressobj(wbits=31)
        if chunk:
            yield decode(chunk)
