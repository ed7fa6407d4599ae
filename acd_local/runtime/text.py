"""Turns token bytes into text that is safe to show: whole characters, stop strings held back, controls disarmed."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence


class TextStream:
    """Turns token bytes into text pieces: UTF-8 is never split, stop strings are never half-printed.

    `push` and `finish` return what may be shown now; text that could still become a stop string waits.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, piece: bytes) -> str:
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return the rest: bytes of an unfinished character become U+FFFD, held text is released."""
        if self.stopped_by is not None:
            return ""
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return shown + ("" if self.stopped_by is not None else rest)

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._held + text
        hits = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            at, self.stopped_by = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


# C0 and C1 controls but tab and newline, DEL, and the invisible bidirectional controls that reorder a line.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def refused_character(text: str) -> str | None:
    """Find the first character that no prompt may hold: a control, one that reorders a line, half a surrogate pair."""
    found = next((c for c in text if _UNSAFE.match(c) or unicodedata.category(c) == "Cs"), None)
    return found and f"U+{ord(found):04X}"


def disarm(text: str) -> str:
    """Make escape and control characters harmless for a terminal, and leave the others: ESC becomes U+241B and so on.

    `visible` is for people who look for what a text hides.
    """
    return _UNSAFE.sub(_harmless, text)


def _harmless(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


_UNUSUAL = re.compile(r"[^ -~\n\t]")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u200c\u200d\u00ad"  # of emoji and of Persian; the soft hyphen


def visible(text: object, most: int | None = None) -> str:
    """Make a text in which nothing hides: control, bidirectional and other invisible format characters as <U+XXXX>."""
    shown = _UNUSUAL.sub(_named, str(text))
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def _named(match: re.Match[str]) -> str:
    c = match[0]
    return f"<U+{ord(c):04X}>" if unicodedata.category(c) in _HIDDEN and c not in _JOINERS else c


def plain(text: object, most: int | None = None) -> str:
    """Make a text of one line in which nothing hides."""
    return visible(" ".join(str(text).split()), most)


def shorten(text: object, most: int) -> str:
    """Make one line of at most that many characters: what stands in its middle goes first."""
    line, head = plain(text), (most - 1) * 2 // 3
    return line if len(line) <= most else f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"
