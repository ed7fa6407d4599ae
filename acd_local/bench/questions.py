"""Read the texts that the measurements ask (questions.toml), and make prompts of them."""

from __future__ import annotations

import tomllib
from importlib import resources

from acd_local.engine import Engine

TEXTS: dict[str, list[str]] = tomllib.loads(resources.files(__package__).joinpath("questions.toml").read_text("utf-8"))


def text_of(kind: str, number: int) -> str:
    """Return a round's text; `kind`: "questions", or "repeats", whose answers copy them."""
    return TEXTS[kind][number % len(TEXTS[kind])]


def many_prompts(number: int) -> list[str]:
    """List a round's prompts; they differ from their first word on, so that no round finds another's in the caches."""
    return [f"{number}. {start}{question}" for start in TEXTS["instructions"] for question in TEXTS["questions"]]


def long_question(engine: Engine, number: int, length: int) -> str:
    """Return `length` tokens of the texts to repeat, from another place for each number."""
    words = " ".join(TEXTS["repeats"]).split()
    start = 37 * number % len(words)
    text = " ".join([f"{number}:", *(words[start:] + words[:start]) * 3])
    tokens = engine.vocab.tokenize(text, parse_special=False)[:length]
    return b"".join(map(engine.vocab.piece, tokens)).decode("utf-8", "replace")


def story(engine: Engine, length: int) -> str:
    """Return a request to continue a text of about `length` tokens; longer ones begin like shorter ones."""
    words = " ".join(TEXTS["repeats"]).split()
    text = " ".join(words * (1 + length // len(words)))
    tokens = engine.vocab.tokenize(text, parse_special=False)[:length]
    begun = b"".join(map(engine.vocab.piece, tokens)).decode("utf-8", "replace")
    return f"{begun}\n\nContinue this text with a long story."
