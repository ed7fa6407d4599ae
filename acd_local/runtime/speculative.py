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
from typing import TypeAlias, TypeVar

from acd_local.runtime.choice import Chooser, TokenChoice
from acd_local.runtime.drafts import Drafter
from acd_local.runtime.llama import Logits

T = TypeVar("T")
S = TypeVar("S")

# Next-token logits of both streams after the prompt, each (n_vocab,); the second is None where no contrast is taken.
StreamLogits = tuple[Logits, Logits | None]


@dataclass(frozen=True)
class Rows:
    """An answer's tokens to be decoded, with the logits behind each of them.

    Attributes:
        start: answer tokens that the streams are to hold before; what they hold beyond is forgotten first.
        contrasts: whether in both streams, or in the safe one alone.
    """

    start: int
    tokens: Sequence[int]
    contrasts: bool


# Rows are answered by the logits of each stream that they were decoded in, shape (len(tokens), n_vocab).
Choices: TypeAlias = Generator[TokenChoice | Rows, list[Logits], None]


def choose_tokens(
    first: StreamLogits, chooser: Chooser, drafter: Drafter, *, limit: int, said: Sequence[int] = ()
) -> Choices:
    """Choose an answer's tokens to its end.

    Args:
        first: what follows the prompt and `said`.
        drafter: has seen these; where it proposes tokens, both streams must be able to forget their last ones.
        limit: tokens of the answer at most.
        said: tokens that it has already.

    Raises:
        NumericalError: a stream produced NaN.
    """
    answer = list(said)
    safe, adversarial = [first[0]], [first[1]]
    draft: Sequence[int] = ()
    while True:
        new = 0
        for safe_row, adversarial_row, drafted in zip(safe, adversarial, [*draft, None], strict=True):
            choice = chooser.choose(safe_row, adversarial_row, len(answer))
            if choice is None:
                return
            right = choice.token == drafted
            drafter.accepted += right
            yield choice
            answer.append(choice.token)
            new += 1
            if choice.ends or len(answer) == limit:
                return
            if not right:
                break
        drafter.add(answer[-new:])
        contrasts = chooser.settings.contrasts(len(answer))
        room = chooser.settings.same_until(len(answer), limit) - len(answer)
        draft = drafter.draft(2 if contrasts else 1, room - 1)
        logits = yield Rows(len(answer) - 1, [answer[-1], *draft], contrasts)
        safe = list(logits[0])
        adversarial = list(logits[1]) if contrasts else [None] * len(safe)


def advance(generator: Generator[T, S, None], value: S) -> T | None:
    """Send a value; return what the generator yields, None where it ends."""
    try:
        return generator.send(value)
    except StopIteration:
        return None
