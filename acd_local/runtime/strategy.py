"""Defines execution strategies: what is decoded when, until an answer's tokens are chosen.

A strategy knows token ids and logits, no text, no templates and no caches: it yields its choices, and requests for rows
to be decoded. Whoever drives it decides how they are decoded: alone, or together with other conversations. Which tokens
come out is `choice.Chooser`'s matter; strategies differ in time alone. `stepwise` is the plain one: both streams, token
by token. `deferred.deferred` lets the safe stream run ahead.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from acd_local.runtime.choice import Chooser, TokenChoice
from acd_local.runtime.llama import Logits

T = TypeVar("T")
S = TypeVar("S")
Stream = Literal["safe", "adversarial"]

# Next-token logits of both streams after the prompt, each (n_vocab,); the second is None where no contrast is taken.
StreamLogits = tuple[Logits, Logits | None]


@dataclass(frozen=True)
class StreamRequest:
    """Rows of one stream to be decoded.

    Attributes:
        start: answer tokens that the stream is to hold before `tokens`; what it holds beyond is forgotten first.
        wanted: for each token whether the logits after it are needed; None: the last one's alone.
    """

    stream: Stream
    start: int
    tokens: Sequence[int]
    wanted: Sequence[bool] | None = None


# Requests are decoded together, and answered by the logits of each, shape (wanted rows, n_vocab).
Strategy: TypeAlias = Generator[TokenChoice | Sequence[StreamRequest], list[Logits], None]


def stepwise(first: StreamLogits, chooser: Chooser, *, limit: int, start: int = 0) -> Strategy:
    """Decode both streams side by side: every choice is the contrast of logits that were decoded together.

    Args:
        limit: tokens at most.
        start: tokens that the answer has already; `first` is what follows them.

    Raises:
        NumericalError: a stream produced NaN.
    """
    safe, adversarial = first
    for position in range(start, limit):
        choice = chooser.choose(chooser.candidates(safe, position), adversarial)
        if choice is None:
            return
        yield choice
        if choice.ends or position + 1 == limit:
            return
        both: tuple[Stream, ...] = ("safe", "adversarial")
        streams = both if chooser.settings.contrasts(position + 1) else both[:1]
        logits = yield [StreamRequest(stream, position, [choice.token]) for stream in streams]
        safe, adversarial = logits[0][0], logits[1][0] if len(logits) > 1 else None


def advance(generator: Generator[T, S, None], value: S) -> T | None:
    """Send a value; return what the generator yields, None where it ends."""
    try:
        return generator.send(value)
    except StopIteration:
        return None
