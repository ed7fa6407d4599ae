"""From a conversation to the two token sequences that the streams decode, within one stream's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from acd_local.errors import ContextError, UsageError
from acd_local.pairs import PromptPair, refuse_adversarial
from acd_local.runtime.template import ChatTemplate, Message

# Room for the answer, where max_tokens does not say how much: a quarter of the context, at most this many tokens.
ANSWER_ROOM = 512


@dataclass(frozen=True)
class Prompt:
    """What both streams have to hold before an answer starts.

    Attributes:
        safe, adversarial: token ids of the whole conversation under either system prompt; the latter is None where no
            contrast is taken.
        safe_prefix, adversarial_prefix: the part that the system prompt alone decides.
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
    """Renders conversations under a pair's two system prompts and keeps them within `n_ctx` tokens."""

    def __init__(self, template: ChatTemplate, n_ctx: int) -> None:
        self._template = template
        self._n_ctx = n_ctx
        self._prefixes: dict[str, list[int]] = {}

    def build(
        self,
        pair: PromptPair,
        system: str | None,
        turns: Sequence[Message],
        *,
        contrast: bool,
        max_tokens: int | None,
        overflow: str,
    ) -> Prompt:
        """The prompt of the next answer.

        Args:
            system: the application's own system prompt; it follows the pair's, the same in both streams.
            turns: user and assistant messages, the last from the user.
            contrast: whether the adversarial stream is needed.
            max_tokens: the answer's room, None for a default.
            overflow: where it does not fit, "drop" the oldest whole turns until half the context is free, or "error".

        Raises:
            ContextError: the last message alone does not fit, or turns would have to be dropped under "error".
            UsageError: no user message at the end, or the adversarial prompt is handed in as `system`.
        """
        if not turns or turns[-1].role != "user":
            raise UsageError("the conversation must end with a user message")
        if system:
            refuse_adversarial(system, pair)
        systems = [_join(pair.safe, system)]
        if contrast:
            systems.append(_join(pair.adversarial.reveal_for_negative_stream(), system))
        room = min(self._n_ctx // 4, ANSWER_ROOM) if max_tokens is None else max_tokens
        encoded, dropped = self._fit(systems, turns, room, overflow, explicit=max_tokens is not None)
        longest = max(map(len, encoded))
        prefixes = [self._prefix(s) for s in systems]
        return Prompt(
            safe=encoded[0],
            adversarial=encoded[1] if contrast else None,
            safe_prefix=prefixes[0],
            adversarial_prefix=prefixes[-1],
            dropped=dropped,
            room=self._n_ctx - longest if max_tokens is None else min(max_tokens, self._n_ctx - longest),
        )

    def _fit(
        self, systems: Sequence[str], turns: Sequence[Message], room: int, overflow: str, *, explicit: bool
    ) -> tuple[list[list[int]], int]:
        encoded = self._encode(systems, turns)
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
            encoded = self._encode(systems, turns[start:])
            if max(map(len, encoded)) <= self._n_ctx // 2:
                break
        longest = max(map(len, encoded))
        if longest >= self._n_ctx:
            raise ContextError(
                f"the message is {longest} tokens long with its system prompt and leaves no room for an answer: the "
                f"context holds {self._n_ctx} per stream; shorten it or use a larger --ctx-size"
            )
        return encoded, start

    def _encode(self, systems: Sequence[str], turns: Sequence[Message]) -> list[list[int]]:
        return [self._template.encode([Message("system", system), *turns]) for system in systems]

    def _prefix(self, system: str) -> list[int]:
        if system not in self._prefixes:
            if len(self._prefixes) > 64:
                self._prefixes.clear()
            self._prefixes[system] = self._template.system_prefix(system)
        return self._prefixes[system]


def _join(prompt: str, system: str | None) -> str:
    return f"{prompt}\n\n{system}" if system else prompt
