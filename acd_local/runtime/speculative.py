"""Chooses an answer's tokens by speculative decoding: drafts are checked in one batch, in both streams at once.

What is drafted decides only which logits are there early. Every token is chosen anew from them, with the same draw, and
the first that differs ends a draft. So drafts change how long an answer takes, and not what it says (Leviathan et al.
2023, but with one draw for draft and check instead of rejection sampling).

The loop knows token ids and logits, no text, no templates and no caches: it yields its choices, and requests for rows
to be decoded. Whoever drives it decides how they are decoded: alone, or together with other conversations.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from acd_local.runtime.choice import Chooser, TokenChoice
from acd_local.runtime.drafts import Drafter
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
Choices: TypeAlias = Generator[TokenChoice | Sequence[StreamRequest], list[Logits], None]


def choose_tokens(
    first: StreamLogits, chooser: Chooser, *, limit: int, said: Sequence[int] = (), drafter: Drafter | None = None
) -> Choices:
    """Choose an answer's tokens to its end.

    Args:
        first: what follows the prompt and `said`.
        limit: tokens of the answer at most.
        said: tokens that it has already.
        drafter: proposes tokens; both streams must be able to forget their last ones. None: token by token.

    Raises:
        NumericalError: a stream produced NaN.
    """
    answer = list(said)
    safe, adversarial = [first[0]], [first[1]]
    draft: Sequence[int] = ()
    while True:
        accepted = 0
        for safe_row, adversarial_row, drafted in zip(safe, adversarial, [*draft, None], strict=True):
            choice = chooser.choose(safe_row, adversarial_row, len(answer))
            if choice is None:
                return
            yield choice
            answer.append(choice.token)
            if choice.ends or len(answer) == limit:
                return
            if choice.token != drafted:
                break
            accepted += 1
        contrasts = chooser.settings.contrasts(len(answer))
        draft = ()
        if drafter is not None:
            drafter.add(answer[-1 - accepted :])
            room = chooser.settings.same_until(len(answer), limit) - len(answer)
            draft = drafter.draft(2 if contrasts else 1, room - 1)
        logits = yield _both(answer, draft, contrasts)
        safe = list(logits[0])
        adversarial = list(logits[1]) if contrasts else [None] * len(safe)


def _both(answer: Sequence[int], draft: Sequence[int], contrasts: bool) -> list[StreamRequest]:
    """Ask for the logits behind the last token and each drafted one."""
    tokens = [answer[-1], *draft]
    wanted = [True] * len(tokens) if draft else None
    streams: tuple[Stream, ...] = ("safe", "adversarial") if contrasts else ("safe",)
    return [StreamRequest(stream, len(answer) - 1, tokens, wanted) for stream in streams]


def advance(generator: Generator[T, S, None], value: S) -> T | None:
    """Send a value; return what the generator yields, None where it ends."""
    try:
        return generator.send(value)
    except StopIteration:
        return None
