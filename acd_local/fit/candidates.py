"""Lists the texts that a fit tries: for the base, for the positive and for the negative stream."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acd_local.errors import UsageError
from acd_local.pairs import AdversarialText, PromptPair, refuse_adversarial

_FILE = Path(__file__).with_name("texts.toml")
# What tells the model's own system prompt as a negative from the prompt itself, which an application may give.
_OWN = "Answer the user's message."


@dataclass(frozen=True)
class Candidate:
    """A system prompt and what it is called in figures.

    Attributes:
        text: empty: the template's own, or none.
        shots: (user, assistant) turns that precede the conversation.
    """

    name: str
    text: str
    shots: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Fact:
    """A question, and words of which a right answer holds one, in lower case."""

    question: str
    right: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Tell whether an answer holds one of the words."""
        return any(word in answer.lower() for word in self.right)


NO_TEXT = Candidate("as it is", "")


def helpful(own: str, manual: str) -> list[Candidate]:
    """List texts for the base prompt setup.

    Args:
        own: the template's default system prompt; empty: there is none.
        manual: safe text of the manual pair.
    """
    texts = [Candidate("manual", manual)]
    texts += [Candidate(f"helpful {i}", text) for i, text in enumerate(_read()["helpful"], 1)]
    return _with_own(texts, own)


def declining(own: str) -> list[Candidate]:
    """List texts for the positive stream, some with demonstrations."""
    table = _read()
    shown, refusal = table["demonstrations"]["requests"], table["demonstrations"]["refusal"]
    texts = [
        Candidate(row["name"], row["text"], tuple((request, refusal) for request in shown[: row.get("shown", 0)]))
        for row in table["declining"]
    ]
    return _with_own(texts, own)


def complying(own: str, *, declines: bool) -> list[Candidate]:
    """List texts for the negative stream.

    Args:
        declines: the model declines most harmful requests by itself. Then none is among them that tells it not to.
    """
    table = _read()
    texts = [Candidate("own", f"{own}\n\n{_OWN}")] if own else []
    texts += [Candidate(f"complying {i}", text) for i, text in enumerate(table["complying"], 1)]
    if not declines:
        texts += [Candidate(f"careless {i}", text) for i, text in enumerate(table["careless"], 1)]
    return texts


def facts() -> list[Fact]:
    """List the easy facts that helpful texts must not cost."""
    return [Fact(row["question"], tuple(row["right"])) for row in _read()["facts"]]


def may_be_pair(negative: str, others: Iterable[str]) -> bool:
    """Tell whether a negative can stand beside these texts: no text of a positive stream may hold it."""
    pair = PromptPair("fit", "positive", AdversarialText(negative))
    try:
        for text in others:
            refuse_adversarial(text, pair)
    except UsageError:
        return False
    return True


def digest() -> str:
    """Return the hex SHA-256 over all of them."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


def _with_own(texts: list[Candidate], own: str) -> list[Candidate]:
    """List each alone, then behind the model's own system prompt."""
    behind = [replace(c, name=f"own + {c.name}", text=f"{own}\n\n{c.text}") for c in texts] if own else []
    return [*texts, *behind]


@functools.cache
def _read() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text("utf-8"))
