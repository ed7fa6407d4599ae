"""Decides by what a pair's gate reads who answers a request, and looks at answers again while they are made.

A prompt that fits the reader is decoded there, once, and handed over to the slot that answers. Of a longer one parts
are read, through half of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from acd_local.errors import ContextError
from acd_local.gate import Gate
from acd_local.pairs import Decision, GateSettings
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.guard import no_check
from acd_local.runtime.llama import Logits, States
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.prompts import Framing, Prompt
from acd_local.runtime.reading import Reader
from acd_local.runtime.streams import Feed, Rows, Slot, extend
from acd_local.runtime.template import Message

if TYPE_CHECKING:
    from acd_local.engine import Engine
    from acd_local.generation import PromptMeter

EXCERPT, EXCERPTS = 256, 4  # tokens of a message too long to be read whole that are read, and at how many places
# Latest tokens of an answer that are read at a look, since a row costs a third of a token's time; and tokens in all
# that are decoded for it, behind the system prompt, where an answer is too long for the reader.
LOOKED_AT, BEFORE = 8, 32
SINK = 4  # first tokens, on which models rest their attention: they stay where what follows is cut

AS_IS = Framing(None, None)


@dataclass(frozen=True)
class Gating:
    """A gate, and what is done by what it says."""

    gate: Gate
    settings: GateSettings

    @property
    def base(self) -> Framing:
        """What a request is read under: the helpful text, where there is one, or the model as it is."""
        return Framing(self.settings.helpful, None)

    def is_base(self, decision: Decision) -> bool:
        """Whether that is answered under `base`."""
        return decision == ("as-is" if self.settings.helpful is None else "helpful")

    @property
    def look(self) -> int:
        """Answer tokens between two readings of an answer; 0: it is not read again."""
        return 0 if self.gate.answer is None else self.settings.look


class Conversation(NamedTuple):
    """What a request is read from: its turns, and the prompt that they make under the gating's base framing."""

    system: str | None
    turns: Sequence[Message]
    prompt: Prompt


def read_prompt(
    engine: Engine,
    reader: Reader,
    gating: Gating,
    asked: Conversation,
    slot: Slot,
    meter: PromptMeter,
    check: Callable[[], None],
) -> tuple[float, Logits | None]:
    """The chance of harm; and where this very prompt is to be answered, and fits the reader, the logits behind it.

    In that case the slot holds the prompt.

    Args:
        reader: `Engine._reading` gave it.
        meter: counts the rows of the prompt in the reader's cache.
        check: see `PromptBuilder.build`.

    Raises:
        ModelError: this architecture's states cannot be read.
        llama.DecodeAborted: cancelled.
    """
    tokens, prefix = asked.prompt.safe, asked.prompt.safe_prefix
    if not _fits(reader, tokens):
        return read_parts(engine, reader, gating, asked, check), None

    def counted(items: Rows) -> None:
        extend(items, meter)
        meter.settle(items)

    start, _ = _last_message(engine, gating, asked, check)
    reader.forget_parts()
    held = common_prefix(slot.safe.tokens, tokens)
    if held > len(prefix) and not engine._prefixes.exact:
        if not slot.safe.context.model.keeps_state:
            slot.safe.rewind(min(held, start))  # it will hold another prompt; a saved window could not go back
        reader.adopt(slot.safe, tokens, start)
    engine._prefixes.prepare([(reader.cache, tokens[: start + 1], prefix)], counted)
    rows = [Feed(reader.cache, tokens[len(reader.cache.tokens) :])]
    states, logits = reader.decode(tokens, start, meter)
    meter.settle(rows)
    probability = gating.gate.request.highest(states)
    if not gating.is_base(gating.settings.decide(probability)):
        return probability, None  # the slot may hold what the others said so far
    slot.safe.restore(reader.cache.save())
    return probability, logits.copy()


def read_parts(
    engine: Engine, reader: Reader, gating: Gating, asked: Conversation, check: Callable[[], None] = no_check
) -> float:
    """The chance of harm, whatever the conversation's length, through the layers that are read alone.

    Of one that is too long the last turns that fit are read, of a message that is too long some excerpts: the worst
    counts. Arguments and errors as of `read_prompt`.
    """
    highest = gating.gate.request.highest
    return max(highest(reader.read(tokens, start)) for tokens, start in _parts(engine, reader, gating, asked, check))


class Watch:
    """Reads an answer's latest tokens, every so many, while it is not contrasted; what precedes them is copied.

    Attributes:
        looks: (answer token, probability) of what was read; the tokens before it were seen.
    """

    def __init__(self, engine: Engine, gating: Gating, prompt: Prompt, slot: Slot, cancel: CancelToken) -> None:
        self._engine, self._gating, self._cancel = engine, gating, cancel
        self._prompt, self._slot = prompt, slot
        self.looks: list[tuple[int, float]] = []

    def due(self, said: int) -> bool:
        """Whether an answer of so many tokens is to be looked at."""
        return 0 < self._gating.look <= said - self._seen

    def look(self, said: Sequence[int]) -> bool:
        """Read the latest tokens; whether the answer is to go on contrasted.

        Raises:
            llama.DecodeAborted: cancelled.
        """
        probe = self._gating.gate.answer
        assert probe is not None
        with self._engine._reading(self._gating.gate, [self._cancel]) as reader:
            states = self._read(reader, said)
        probability = probe.probability(states.mean(axis=1))
        self.looks.append((len(said), probability))
        return probability >= self._gating.settings.answer_threshold

    @property
    def _seen(self) -> int:
        return self.looks[-1][0] if self.looks else 0

    def _read(self, reader: Reader, said: Sequence[int]) -> States:
        tokens, cache = [*self._prompt.safe, *said], self._slot.safe
        model = cache.context.model
        goes_back = not model.keeps_state and model.n_swa == 0
        start = len(tokens) - (min(LOOKED_AT, len(said) - self._seen) if goes_back else 1)
        if not _fits(reader, tokens):
            head, first = _shortened(self._prompt.safe_prefix, reader.n_ctx // 4), len(tokens) - BEFORE
            return reader.read([*head, *tokens[first:]], len(head) + start - first)
        reader.adopt(cache, tokens, start)
        return reader.read(tokens, start)


def _fits(reader: Reader, tokens: Sequence[int]) -> bool:
    return len(tokens) <= reader.at_once


def _last_message(engine: Engine, gating: Gating, asked: Conversation, check: Callable[[], None]) -> tuple[int, int]:
    turns = asked.turns[asked.prompt.dropped :]
    return engine._builder.last_message(gating.base, asked.system, turns, asked.prompt.safe, check)


def _parts(
    engine: Engine, reader: Reader, gating: Gating, asked: Conversation, check: Callable[[], None]
) -> Iterable[tuple[Sequence[int], int]]:
    """Tokens to be read, and from where on their states count."""
    tokens = asked.prompt.safe
    start, end = _last_message(engine, gating, asked, check)
    if _fits(reader, tokens):
        return [(tokens, start)]
    try:
        turns = asked.turns[asked.prompt.dropped :]
        short = engine._read_builder.build(
            gating.base, asked.system, turns, contrast=False, max_tokens=1, overflow="drop", check=check
        )
        return [(short.safe, _last_message(engine, gating, asked._replace(turns=turns, prompt=short), check)[0])]
    except ContextError:
        return _excerpts(tokens, asked.prompt.safe_prefix, start, end, reader.at_once)


def _excerpts(
    tokens: Sequence[int], prefix: Sequence[int], start: int, end: int, most: int
) -> list[tuple[Sequence[int], int]]:
    """The message at tokens[start:end] behind the system prompt, whole or in pieces: beginning, end and between."""
    head, tail = _shortened(prefix, most // 2), tokens[end:][: most // 4]
    message = tokens[start:end]
    room = most - len(head) - len(tail)
    piece = len(message) if len(message) <= room else min(EXCERPT, room)
    last = len(message) - piece
    places = sorted({last * i // (EXCERPTS - 1) for i in range(EXCERPTS)})
    return [([*head, *message[at : at + piece], *tail], len(head)) for at in places]


def _shortened(prefix: Sequence[int], most: int) -> Sequence[int]:
    return prefix if len(prefix) <= most else [*prefix[:SINK], *prefix[SINK - most :]]
