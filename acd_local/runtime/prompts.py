"""From a conversation to the two token sequences that the streams decode, within one stream's context.

System prompts are texts or embedding rows; the latter stand in the sequences as negative ids (see `runtime.rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from acd_local.errors import ContextError, UsageError
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.rows import RowTable
from acd_local.runtime.template import ChatTemplate, Message, Role
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt

# Room for the answer, where max_tokens does not say how much: a quarter of the context, at most this many tokens.
ANSWER_ROOM = 512

_ROLES: tuple[Role, Role] = ("user", "assistant")

Positive: TypeAlias = SoftPrompt | str | None
Negative: TypeAlias = AdversarialText | AdversarialRows | SoftPrompt | str | None


@dataclass(frozen=True)
class Opening:
    """What precedes the conversation in one stream; `soft` stands at the beginning of the system message."""

    messages: tuple[Message, ...]
    soft: SoftPrompt | None = None


@dataclass(frozen=True)
class Framing:
    """What stands around a conversation in either stream.

    Attributes:
        positive: system prompt of the stream that is sampled from; None: none.
        negative: system prompt of the negative stream; None: none. Not read where no contrast is taken.
        wrapper: what is made of the last user message, with one {prompt} in it; the same in both streams.
        shots: (user, assistant) turns that precede the conversation in the positive stream.

    Raises:
        UsageError: an `AdversarialText` or `AdversarialRows` stands anywhere but in `negative`.
    """

    positive: Positive
    negative: Negative
    wrapper: str = "{prompt}"
    shots: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        places = [*self.positive_texts(), None if isinstance(self.positive, SoftPrompt) else self.positive]
        if not all(isinstance(text, str | None) for text in places):
            raise UsageError("an adversarial prompt may only stand in the negative stream")
        if not isinstance(self.negative, Negative):
            raise UsageError(f"a negative prompt must be a text or a soft prompt, not {type(self.negative).__name__}")
        if self.wrapper.count("{prompt}") != 1:
            raise UsageError("a wrapper must hold {prompt} exactly once")

    @classmethod
    def of(cls, pair: PromptPair, soft: SoftPair | None = None) -> Self:
        """The pair's own two prompts: its texts, or the soft prompts."""
        return cls(pair.safe, pair.adversarial) if soft is None else cls(soft.safe, soft.adversarial)

    def positive_texts(self) -> list[str | None]:
        """Every text that the positive stream reads besides the conversation."""
        positive = None if isinstance(self.positive, SoftPrompt) else self.positive
        return [positive, self.wrapper, *(text for shot in self.shots for text in shot)]

    def openings(self, system: str | None, *, contrast: bool) -> list[Opening]:
        """What precedes the conversation in each stream; the application's `system` prompt is the same in both."""
        shots = tuple(Message(role, text) for shot in self.shots for role, text in zip(_ROLES, shot, strict=True))
        openings = [_opening(self.positive, system, shots)]
        if contrast:
            negative = self.negative
            if isinstance(negative, AdversarialText | AdversarialRows):
                openings.append(_opening(negative.reveal_for_negative_stream(), system))
            else:
                openings.append(_opening(negative, system))
        return openings

    def wrap(self, turns: Sequence[Message]) -> list[Message]:
        *past, last = turns
        return [*past, Message(last.role, self.wrapper.replace("{prompt}", last.content))]


@dataclass(frozen=True)
class Prompt:
    """What both streams have to hold before an answer starts.

    Attributes:
        safe, adversarial: token ids of the whole conversation under either system prompt; the latter is None where no
            contrast is taken.
        safe_prefix, adversarial_prefix: the part that the framing alone decides.
        dropped: how many of the given messages were left out at the front.
        room: tokens that the answer may have.
    """

    safe: list[int]
    adversarial: list[int] | None
    safe_prefix: list[int]
    adversarial_prefix: list[int]
    dropped: int
    room: int


class PromptBuilder:
    """Renders conversations under two system prompts and keeps them within `n_ctx` tokens.

    Args:
        table: gives soft prompts their ids.
    """

    def __init__(self, template: ChatTemplate, n_ctx: int, table: RowTable) -> None:
        self._template = template
        self._n_ctx = n_ctx
        self._table = table
        self._adversarial: set[str] = set()
        self._prefixes: dict[Opening, list[int]] = {}

    def keep_negative(self, rows: AdversarialRows) -> None:
        """From now on these rows are refused in the positive stream, also as a `SoftPrompt` that holds a copy."""
        self._adversarial.add(rows.digest)

    def build(
        self,
        framing: Framing,
        system: str | None,
        turns: Sequence[Message],
        *,
        contrast: bool,
        max_tokens: int | None,
        overflow: str,
    ) -> Prompt:
        """The prompt of the next answer.

        Args:
            framing: both system prompts.
            system: the application's own system prompt; it follows the framing's, the same in both streams.
            turns: user and assistant messages, the last from the user.
            contrast: whether the adversarial stream is needed.
            max_tokens: the answer's room, None for a default.
            overflow: where it does not fit, "drop" the oldest whole turns until half the context is free, or "error".

        Raises:
            ContextError: the last message alone does not fit, or turns would have to be dropped under "error".
            UsageError: no user message at the end, or adversarial rows in the positive stream.
            PairError: the model cannot take a soft prompt.
        """
        if not turns or turns[-1].role != "user":
            raise UsageError("the conversation must end with a user message")
        if isinstance(framing.negative, AdversarialRows):
            self.keep_negative(framing.negative)
        if isinstance(framing.positive, SoftPrompt) and framing.positive.digest in self._adversarial:
            raise UsageError("the soft prompt is an adversarial one, which may only stand in the negative stream")
        openings = framing.openings(system, contrast=contrast)
        turns = framing.wrap(turns)
        room = min(self._n_ctx // 4, ANSWER_ROOM) if max_tokens is None else max_tokens
        encoded, dropped = self._fit(openings, turns, room, overflow, explicit=max_tokens is not None)
        longest = max(map(len, encoded))
        prefixes = [self._prefix(opening) for opening in openings]
        return Prompt(
            safe=encoded[0],
            adversarial=encoded[1] if contrast else None,
            safe_prefix=prefixes[0],
            adversarial_prefix=prefixes[-1],
            dropped=dropped,
            room=self._n_ctx - longest if max_tokens is None else min(max_tokens, self._n_ctx - longest),
        )

    def _fit(
        self, openings: Sequence[Opening], turns: Sequence[Message], room: int, overflow: str, *, explicit: bool
    ) -> tuple[list[list[int]], int]:
        encoded = self._encode(openings, turns)
        longest = max(map(len, encoded))
        if longest + room <= self._n_ctx:
            return encoded, 0
        if overflow == "drop" and longest + min(room, self._n_ctx // 2) <= self._n_ctx:
            return encoded, 0  # dropping turns frees half of the context: a longer answer gets what there is
        starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > 0]
        if overflow == "error" and (starts or explicit):
            raise ContextError(
                f"the conversation ({longest} tokens) and its answer ({room}) do not fit the context of "
                f"{self._n_ctx} tokens per stream: use a larger --ctx-size, or --overflow drop"
            )
        start = 0
        for start in starts:
            encoded = self._encode(openings, turns[start:])
            if max(map(len, encoded)) <= self._n_ctx // 2:
                break
        longest = max(map(len, encoded))
        if longest >= self._n_ctx:
            raise ContextError(
                f"the message is {longest} tokens long with its system prompt and leaves no room for an answer: the "
                f"context holds {self._n_ctx} per stream; shorten it or use a larger --ctx-size"
            )
        return encoded, start

    def _encode(self, openings: Sequence[Opening], turns: Sequence[Message]) -> list[list[int]]:
        return [self._template.encode([*o.messages, *turns], rows=self._rows(o)) for o in openings]

    def _prefix(self, opening: Opening) -> list[int]:
        if opening not in self._prefixes:
            if len(self._prefixes) > 64:
                self._prefixes.clear()
            self._prefixes[opening] = self._template.prefix(opening.messages, rows=self._rows(opening))
        return self._prefixes[opening]

    def _rows(self, opening: Opening) -> Sequence[int]:
        return () if opening.soft is None else self._table.add(opening.soft.rows, opening.soft.digest)


def _opening(prompt: Positive, system: str | None, shots: tuple[Message, ...] = ()) -> Opening:
    soft = prompt if isinstance(prompt, SoftPrompt) else None
    text = "\n\n".join(filter(None, (None if isinstance(prompt, SoftPrompt) else prompt, system)))
    return Opening((*([Message("system", text)] if text else []), *shots), soft)
