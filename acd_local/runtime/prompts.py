"""Turns a conversation into the two token sequences that the streams decode, within one stream's context.

System prompts are texts or embedding rows; the latter stand in the sequences as negative ids, see `runtime.embeddings`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from acd_local.errors import ContextError, UsageError
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.embeddings import EmbeddingTable
from acd_local.runtime.guard import TooLong, no_check
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.template import ChatTemplate, Message, Role
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt

# Room for the answer, where max_tokens does not say how much: a quarter of the context, at most this many tokens.
ANSWER_ROOM = 512

# A conversation with more characters than this per token of room is not rendered as a whole at first.
_CHARACTERS_PER_TOKEN = 64
# Characters up to which a conversation's tokens are counted though it does not fit: the error's text names them.
_COUNTED = 262_144

_WORDS = ("a", "Z")  # messages that begin and end with different characters

_ROLES: tuple[Role, Role] = ("user", "assistant")

# Token ids of one conversation in every stream, or None: it is too long. Arguments: first turn, tokens allowed.
_Attempt: TypeAlias = Callable[[int, int], list[list[int]] | None]

Positive: TypeAlias = SoftPrompt | str | None
Negative: TypeAlias = AdversarialText | AdversarialRows | SoftPrompt | str | None


def identity(prompt: Negative) -> object:
    """Return what tells a prompt from others, as JSON can hold it: a text itself, the digest of rows."""
    if isinstance(prompt, SoftPrompt | AdversarialRows):
        return {"rows": prompt.digest}
    return prompt.reveal_for_negative_stream() if isinstance(prompt, AdversarialText) else prompt


@dataclass(frozen=True)
class Preamble:
    """The messages before the conversation in one stream; `soft` stands at the beginning of the system message."""

    messages: tuple[Message, ...]
    soft: SoftPrompt | None = None


@dataclass(frozen=True)
class PromptSetup:
    """The texts that stand around a conversation in either stream.

    Attributes:
        positive: system prompt of the stream that is sampled from; None: the template's own, if it has one.
        negative: system prompt of the negative stream. Not read where no contrast is taken.
        wrapper: what is made of the last user message, with one {prompt} in it; the same in both streams.
        shots: (user, assistant) turns that precede the conversation in the positive stream.
        expert: whose positive stream the second one is, in place of the negative one's; see `expert.led`.

    Raises:
        UsageError: an `AdversarialText` or `AdversarialRows` stands anywhere but in `negative`, or there is a second
            stream too many.
    """

    positive: Positive = None
    negative: Negative = None
    wrapper: str = "{prompt}"
    shots: tuple[tuple[str, str], ...] = ()
    expert: PromptSetup | None = None

    def __post_init__(self) -> None:
        if self.expert is not None and not self._takes(self.expert):
            raise UsageError("an expert takes the place of the negative prompt, and has a positive stream alone")
        if not all(isinstance(text, str | None) for text in self.positive_texts()):
            raise UsageError("an adversarial prompt may only stand in the negative stream")
        if not isinstance(self.negative, Negative):
            raise UsageError(f"a negative prompt must be a text or a soft prompt, not {type(self.negative).__name__}")
        if self.wrapper.count("{prompt}") != 1:
            raise UsageError("a wrapper must hold {prompt} exactly once")

    def _takes(self, expert: object) -> bool:
        alone = isinstance(expert, PromptSetup) and expert.negative is None and expert.expert is None
        return alone and self.negative is None

    @classmethod
    def of(cls, pair: PromptPair | None, soft: SoftPair | None = None) -> Self:
        """Make a pair's own: its texts and demonstrations, or the soft prompts. Without a pair: the model as it is."""
        if pair is None:
            return cls()
        if soft is None:
            return cls(pair.safe, pair.adversarial, shots=pair.shots)
        return cls(soft.safe, soft.adversarial)

    def positive_texts(self) -> list[str | None]:
        """List every text that the positive stream reads besides the conversation."""
        positive = None if isinstance(self.positive, SoftPrompt) else self.positive
        own = [positive, self.wrapper, *(text for shot in self.shots for text in shot)]
        return own if self.expert is None else [*own, *self.expert.positive_texts()]

    def soft_prompts(self) -> list[SoftPrompt]:
        """List every soft prompt that a stream which is sampled from reads."""
        own = [self.positive] if isinstance(self.positive, SoftPrompt) else []
        return own if self.expert is None else [*own, *self.expert.soft_prompts()]

    def preambles(self, system: str | None, *, contrast: bool) -> list[Preamble]:
        """List what precedes the conversation in each stream; the application's `system` is the same in both."""
        shots = tuple(Message(role, text) for shot in self.shots for role, text in zip(_ROLES, shot, strict=True))
        preambles = [_preamble(self.positive, system, shots)]
        if contrast and self.expert is not None:
            preambles += self.expert.preambles(system, contrast=False)
        elif contrast:
            negative = self.negative
            if isinstance(negative, AdversarialText | AdversarialRows):
                preambles.append(_preamble(negative.reveal_for_negative_stream(), system))
            else:
                preambles.append(_preamble(negative, system))
        return preambles

    def wrap(self, turns: Sequence[Message]) -> list[Message]:
        *past, last = turns
        return [*past, Message(last.role, self.wrapper.replace("{prompt}", last.content))]


@dataclass(frozen=True)
class Prompt:
    """The tokens that both streams have to hold before an answer starts.

    Attributes:
        safe, adversarial: token ids of the whole conversation in either stream, the latter an expert's where there is
            one; None where no contrast is taken.
        safe_prefix, adversarial_prefix: the part that the prompt setup alone decides.
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

    def __init__(self, template: ChatTemplate, n_ctx: int, table: EmbeddingTable) -> None:
        self._template = template
        self._n_ctx = n_ctx
        self._table = table
        self._adversarial: set[str] = set()
        self._prefixes: dict[Preamble, list[int]] = {}

    def within(self, n_ctx: int) -> Self:
        """Copy the builder: the copy keeps conversations within another number of tokens."""
        other = copy.copy(self)
        other._n_ctx = n_ctx
        return other

    def keep_negative(self, rows: AdversarialRows) -> None:
        """Refuse these rows in the positive stream from now on, also as a `SoftPrompt` that holds a copy."""
        self._adversarial.add(rows.digest)

    def build(
        self,
        prompt_setup: PromptSetup,
        system: str | None,
        turns: Sequence[Message],
        *,
        contrast: bool,
        max_tokens: int | None,
        overflow: str,
        check: Callable[[], None] = no_check,
    ) -> Prompt:
        """Build the next answer's prompt. Takes no lock and may be called by several threads.

        Args:
            prompt_setup: both system prompts.
            system: the application's own system prompt; it follows the prompt setup's, the same in both streams.
            turns: user and assistant messages, the last from the user.
            contrast: whether the adversarial stream is needed.
            max_tokens: the answer's room, None for a default.
            overflow: where it does not fit, "drop" the oldest whole turns until half the context is free, or "error".
            check: asked every few milliseconds, may raise llama.DecodeAborted to end it.

        Raises:
            ContextError: the last message alone does not fit, or turns would have to be dropped under "error".
            UsageError: no user message at the end, or adversarial rows in the positive stream.
            PairError: the model cannot take a soft prompt.
        """
        if not turns or turns[-1].role != "user":
            raise UsageError("the conversation must end with a user message")
        if isinstance(prompt_setup.negative, AdversarialRows):
            self.keep_negative(prompt_setup.negative)
        if any(prompt.digest in self._adversarial for prompt in prompt_setup.soft_prompts()):
            raise UsageError("the soft prompt is an adversarial one, which may only stand in the negative stream")
        preambles = prompt_setup.preambles(system, contrast=contrast)
        turns = prompt_setup.wrap(turns)
        room = min(self._n_ctx // 4, ANSWER_ROOM) if max_tokens is None else max_tokens

        def attempt(start: int, limit: int) -> list[list[int]] | None:
            return self._encode(preambles, turns[start:], limit, check)

        encoded, dropped = self._fit(attempt, turns, room, overflow, explicit=max_tokens is not None)
        longest = max(map(len, encoded))
        prefixes = [self._prefix(preamble, check) for preamble in preambles]
        return Prompt(
            safe=encoded[0],
            adversarial=encoded[1] if contrast else None,
            safe_prefix=prefixes[0],
            adversarial_prefix=prefixes[-1],
            dropped=dropped,
            room=self._n_ctx - longest if max_tokens is None else min(max_tokens, self._n_ctx - longest),
        )

    def last_message(
        self,
        prompt_setup: PromptSetup,
        system: str | None,
        turns: Sequence[Message],
        tokens: Sequence[int],
        check: Callable[[], None] = no_check,
    ) -> tuple[int, int]:
        """Find where the last message begins and ends in the positive stream's prompt; either may be a token off.

        It is found by trying, as in `ChatTemplate.prefix`.

        Args:
            turns: those that are in the prompt.
            tokens: the prompt.
        """
        (preamble,) = prompt_setup.preambles(system, contrast=False)
        rows, past = self._rows(preamble), [*preamble.messages, *turns[:-1]]
        others = [self._template.encode([*past, Message("user", word)], rows=rows, check=check) for word in _WORDS]
        start = min(len(tokens) - 1, *(common_prefix(tokens, other) for other in others))
        behind = min(common_prefix(tokens[:start:-1], other[::-1]) for other in others)
        return start, len(tokens) - behind

    def _fit(
        self, attempt: _Attempt, turns: Sequence[Message], room: int, overflow: str, *, explicit: bool
    ) -> tuple[list[list[int]], int]:
        """Return the token ids, and how many turns they leave out."""
        starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > 0]
        if overflow == "error" and (starts or explicit):
            if (encoded := attempt(0, limit := self._n_ctx - room)) is None:
                raise ContextError(
                    f"the conversation ({_count(attempt, turns, 0, limit)} tokens) and its answer ({room}) do not fit "
                    f"the context of {self._n_ctx} tokens per stream: use a larger --ctx-size, or --overflow drop"
                )
            return encoded, 0
        if starts:
            # Dropping turns frees half of the context: a longer answer gets what there is.
            return self._drop(attempt, turns, starts, self._n_ctx - min(room, self._n_ctx // 2))
        return self._alone(attempt, turns, 0), 0

    def _drop(
        self, attempt: _Attempt, turns: Sequence[Message], starts: Sequence[int], enough: int
    ) -> tuple[list[list[int]], int]:
        """Encode the conversation, whole where it takes at most `enough` tokens.

        Else all from the first start on that leaves half of the context free; where none does, the last message.
        """
        short = sum(len(turn.content) for turn in turns) <= _CHARACTERS_PER_TOKEN * enough
        if short and (whole := attempt(0, enough)) is not None:
            return whole, 0
        n, found = _first_fit(len(starts), lambda i: attempt(starts[i], self._n_ctx // 2))
        if found is None:
            return self._alone(attempt, turns, starts[-1]), starts[-1]
        if n == 0 and not short and (whole := attempt(0, enough)) is not None:  # its characters deceived
            return whole, 0
        return found, starts[n]

    def _alone(self, attempt: _Attempt, turns: Sequence[Message], start: int) -> list[list[int]]:
        """Encode the last message alone, which need only leave room for one token."""
        if (encoded := attempt(start, limit := self._n_ctx - 1)) is None:
            raise ContextError(
                f"the message is {_count(attempt, turns, start, limit)} tokens long with its system prompt and leaves "
                f"no room for an answer: the context holds {self._n_ctx} per stream; shorten it or use a larger "
                "--ctx-size"
            )
        return encoded

    def _encode(
        self, preambles: Sequence[Preamble], turns: Sequence[Message], limit: int, check: Callable[[], None]
    ) -> list[list[int]] | None:
        try:
            return [
                self._template.encode([*before.messages, *turns], rows=self._rows(before), limit=limit, check=check)
                for before in preambles
            ]
        except TooLong:
            return None

    def _prefix(self, preamble: Preamble, check: Callable[[], None]) -> list[int]:
        found = self._prefixes.get(preamble)
        if found is None:
            if len(self._prefixes) > 64:
                self._prefixes.clear()
            found = self._template.prefix(preamble.messages, rows=self._rows(preamble), check=check)
            self._prefixes[preamble] = found
        return found

    def _rows(self, preamble: Preamble) -> Sequence[int]:
        return () if preamble.soft is None else self._table.add(preamble.soft.rows, preamble.soft.digest)


def _preamble(prompt: Positive, system: str | None, shots: tuple[Message, ...] = ()) -> Preamble:
    soft = prompt if isinstance(prompt, SoftPrompt) else None
    text = "\n\n".join(filter(None, (None if isinstance(prompt, SoftPrompt) else prompt, system)))
    return Preamble((*([Message("system", text)] if text else []), *shots), soft)


def _first_fit(n: int, attempt: Callable[[int], list[list[int]] | None]) -> tuple[int, list[list[int]] | None]:
    """Find the smallest of 0 .. n - 1 whose attempt succeeds, and what came of it, where larger ones make it easier.

    It begins at the end, so that what is tried is never much longer than what fits: about 2 log2(n) attempts. Templates
    may render less of a longer conversation; then what is found fits as well, but a smaller one might.
    """
    found, best, step = None, n, 1
    low = 0  # all below are taken to fail
    while low < best:
        middle = max(low, best - step) if step else (low + best) // 2
        tried = attempt(middle)
        if tried is None:
            low, step = middle + 1, 0
        else:
            found, best, step = tried, middle, 2 * step
    return best, found


def _count(attempt: _Attempt, turns: Sequence[Message], start: int, limit: int) -> str:
    """Count the tokens of the turns from `start` on, known to be over `limit`; for people."""
    if sum(len(turn.content) for turn in turns[start:]) <= _COUNTED and (encoded := attempt(start, 2**31)) is not None:
        return str(max(map(len, encoded)))
    return f"over {max(limit, 0)}"
