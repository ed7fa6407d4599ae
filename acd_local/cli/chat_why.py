"""Which tokens of an answer the contrast changed, and what the safe stream alone would have said there."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acd_local.answers import TokenRecord

END = "(end)"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class Span:
    """A run of unchanged text (`instead` is None), or one changed token and its alternative ("" ends the answer)."""

    text: str
    instead: str | None = None

    def parts(self) -> tuple[str, str, str, str]:
        """Split a changed token for the eye: text before the bracket, said, instead, text after the bracket.

        A leading space that both have and the newlines that were said stand outside, so that the text reads on.
        """
        said, instead = self.text, self.instead or ""
        before = " " if said[:1] == " " and said.strip() and instead[:1] in (" ", "") else ""
        after = "\n" * said.count("\n")
        return before, _shown(said[len(before) :]), _shown(instead[len(before) :]), after


def _shown(text: str) -> str:
    if not text:
        return END
    return (text if text.strip(" ") else text.replace(" ", "␣")).translate(_VISIBLE)


def spans(tokens: Sequence[TokenRecord], piece: Callable[[int], bytes]) -> list[Span]:
    """Cut the answer into spans; `piece` gives a token's bytes (a character may be spread over several tokens)."""
    found: list[Span] = []
    for unit, text in _characters(tokens, piece):
        changed = next((token for token in unit if token.changed), None)
        if changed is not None:
            found.append(Span(text, changed.safe_text))
        elif found and found[-1].instead is None:
            found[-1] = Span(found[-1].text + text)
        else:
            found.append(Span(text))
    return [span for span in found if span.text or span.instead is not None]


def _characters(
    tokens: Sequence[TokenRecord], piece: Callable[[int], bytes]
) -> Iterator[tuple[list[TokenRecord], str]]:
    """Find the shortest runs of tokens that hold whole characters, with their text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    unit: list[TokenRecord] = []
    text = ""
    for token in tokens:
        unit.append(token)
        text += decoder.decode(piece(token.token) if "\ufffd" in token.text else token.text.encode())
        if not decoder.getstate()[0]:
            yield unit, text
            unit, text = [], ""
    if unit:
        yield unit, text + decoder.decode(b"", final=True)


def as_text(found: Sequence[Span]) -> str:
    """Write spans without colour: `[said|would have said]`."""
    return "".join(s.text if s.instead is None else "{}[{}|{}]{}".format(*s.parts()) for s in found)
