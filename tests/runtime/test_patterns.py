"""Regular expressions of schemas."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest

ALPHABET = [
    "a",
    "b",
    "c",
    "1",
    "_",
    "-",
    " ",
    "\n",
    "é",
    '"',
    "\\",
    "/",
    "[",
    "]",
    "&",
    "٣",
    "\xa0",
    "\ufeff",
    ".",
    "$",
    "\r",
]
READ_BY_BOTH = [
    "^yes|no$", "a", "^a", "a$", "^a$", "^$", "(^a|b)$", "(?:a|^b)c", "a|b|^c$", "[a-c]+", "[^a]", "^[^a]{2}$", "a{2}",
    "^a{1,2}$", "^(ab)*$", r"^[\w-]+$", r"^\S+$", r"^\W$", r"^[^\W]$", "^.$", "x|", r"^[a\]b]$", "^[-a]$", "^[a-]$",
    r"^\x61\u0062$", "^[&&b]$", "^[[]$", "^a.b$", r"^\.$", r"^\/$", r'^[/"\\]$', r"\$a", r"^[^\s\d]$", "^(a|b)+?$",
    r"^\d+$", r"^\D$", "^(?P<n>a)b?$",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", READ_BY_BOTH)
def test_patterns_mean_what_python_and_ecma_262_say(accepts: Callable[[object, str], bool], pattern: str) -> None:
    """Every allowed text matches for Python; every text that matches in ASCII is allowed."""
    rng = random.Random(pattern)
    strict = re.sub(r"(?<!\\)\$", r"\\Z", pattern)  # Python's $ is there before a last newline as well
    for _ in range(80):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(4)))
        allowed = accepts({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False))
        assert not allowed or re.search(pattern, text), text
        if re.search(strict, text, re.ASCII) and text.isascii() and "\r" not in text:
            assert allowed, text


def test_escapes_of_ecma_262(accepts: Callable[[object, str], bool]) -> None:
    for pattern, text in (
        (r"^\ud83d\ude00$", "😀"),
        (r"^\u{1f600}$", "😀"),
        (r"^\cJ$", "\n"),
        (r"^[\b]$", "\b"),
        (r"^\p{L}+$", "aé"),
    ):
        assert accepts({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False)), pattern
        assert not accepts({"type": "string", "pattern": pattern}, '"1"'), pattern
