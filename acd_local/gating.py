"""Decides by what a pair's gate reads who answers a request, and looks at answers again while they are made.

A prompt that fits the reader is decoded there, once, and handed over to the slot that answers. Of a longer one parts
are read, through half of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from acd_local.errors import ContextError, ModelError
from acd_local.gate import Gate
from acd_local.pairs import Decision, GateSettings
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.decoder import Decoder, PromptMeter
from acd_local.runtime.guard import no_check
from acd_local.runtime.llama import Logits, States
from acd_local.runtime.prefixes import PrefixStore, common_prefix
from acd_local.runtime.prompts import Prompt, PromptBuilder, PromptSetup
from acd_local.runtime.reading import Reader
from acd_local.runtime.streams import DecodeBatch, DecodeRequest, Slot, extend
from acd_local.runtime.template import Message

EXCERPT, EXCERPTS = 256, 4  # tokens of a message too long to be read whole that are read, and at how many places
# Latest tokens of an answer that are read at a look, since a row costs a third of a token's time; and tokens in all
# that are decoded for it, behind the system prompt, where an answer is too long for the reader.
LOOKED_AT, BEFORE = 8, 32
SINK = 4  # first tokens, on which models rest their attention: they stay where what follows is cut


@dataclass(frozen=True)
class Gating:
    """A gate, and what is done by what it says."""

    gate: Gate
    settings: GateSettings

    @property
    def base(self) -> PromptSetup:
        """What a request is read under: the helpful text, where there is one, or the model as it is."""
        return PromptSetup(self.settings.helpful)

    def is_base(self, decision: Decision) -> bool:
        """Tell whether that is answered under `base`."""
        return decision == ("as-is" if self.settings.helpful is None else "helpful")

    @property
    def look(self) -> int:
        """Answer tokens between two readings of an answer; 0: it is not read again."""
        return 0 if self.gate.answer is None else self.settings.look


class Conversation(NamedTuple):
    """A request's turns, and the prompt that they make under the gating's base prompt setup."""

    system: str | None
    turns: Sequence[Message]
    prompt: Prompt


@contextmanager
def reading(
    decoder: Decoder,
    prompts: PromptBuilder,
    gating: Gating,
    cancels: Sequence[CancelToken] = (),
    check: Callable[[], None] = no_check,
) -> Iterator[GateReader]:
    """Keep the decoder open and lend what reads by a gate.

    Args:
        prompts: builds the conversations' prompts.
        cancels: any of them stops it.
        check: see `PromptBuilder.build`.

    Raises:
        ModelError: this architecture's states cannot be read.
        OutOfMemoryError, EngineClosedError, llama.DecodeAborted.
    """
    with decoder.reading(gating.gate.layers, cancels) as reader:
        try:
            yield GateReader(reader, decoder.prefixes, prompts, gating, check)
        except ModelError as error:
            raise ModelError(f"{error}; --gate off (gate=False) does without") from None


class GateReader:
    """Reads conversations, and answers, by a gate; `reading` lends it.

    Attributes:
        states: what reads the model's states.
    """

    def __init__(
        self,
        states: Reader,
        prefixes: PrefixStore,
        prompts: PromptBuilder,
        gating: Gating,
        check: Callable[[], None],
    ) -> None:
        self.states = states
        self._prefixes = prefixes
        self._prompts = prompts
        self._gating = gating
        self._check = check

    def read_prompt(self, asked: Conversation, slot: Slot, meter: PromptMeter) -> tuple[float, Logits | None]:
        """Return the chance of harm; and where this very prompt is to be answered, and fits, the logits behind it.

        In that case the slot holds the prompt.

        Args:
            meter: counts the rows of the prompt in the reader's cache.

        Raises:
            ModelError: this architecture's states cannot be read.
            llama.DecodeAborted: cancelled.
        """
        tokens, prefix = asked.prompt.safe, asked.prompt.safe_prefix
        states, gating = self.states, self._gating
        if not states.fits(tokens):
            return self.read_parts(asked), None

        def counted(items: DecodeBatch) -> None:
            extend(items, meter)
            meter.settle(items)

        start, _ = self._last_message(asked)
        states.forget_parts()
        held = common_prefix(slot.safe.tokens, tokens)
        if held > len(prefix) and not self._prefixes.exact:
            if not slot.safe.context.model.keeps_state:
                slot.safe.rewind(min(held, start))  # it will hold another prompt; a saved window could not go back
            states.adopt(slot.safe, tokens, start)
        self._prefixes.prepare([(states.cache, tokens[: start + 1], prefix)], counted)
        rows = [DecodeRequest(states.cache, tokens[len(states.cache.tokens) :])]
        found, logits = states.decode(tokens, start, meter)
        meter.settle(rows)
        probability = gating.gate.request.highest(found)
        if not gating.is_base(gating.settings.decide(probability)):
            return probability, None  # the slot may hold what the others said so far
        slot.safe.restore(states.cache.save())
        return probability, logits

    def read_parts(self, asked: Conversation) -> float:
        """Return the chance of harm, whatever the conversation's length, through the layers that are read alone.

        Of one that is too long the last turns that fit are read, of a message that is too long some excerpts: the
        worst counts. Errors as of `read_prompt`.
        """
        highest = self._gating.gate.request.highest
        return max(highest(self.states.read(tokens, start)) for tokens, start in self._parts(asked))

    def _parts(self, asked: Conversation) -> Iterable[tuple[Sequence[int], int]]:
        """List the tokens to be read, and from where on their states count."""
        tokens, most = asked.prompt.safe, self.states.at_once
        start, end = self._last_message(asked)
        if self.states.fits(tokens):
            return [(tokens, start)]
        try:
            turns = asked.turns[asked.prompt.dropped :]
            short = self._prompts.within(most).build(
                self._gating.base,
                asked.system,
                turns,
                contrast=False,
                max_tokens=1,
                overflow="drop",
                check=self._check,
            )
            return [(short.safe, self._last_message(asked._replace(turns=turns, prompt=short))[0])]
        except ContextError:
            return _excerpts(tokens, asked.prompt.safe_prefix, start, end, most)

    def _last_message(self, asked: Conversation) -> tuple[int, int]:
        turns = asked.turns[asked.prompt.dropped :]
        return self._prompts.last_message(self._gating.base, asked.system, turns, asked.prompt.safe, self._check)


class Watch:
    """Reads an answer's latest tokens, every so many, while it is not contrasted; what precedes them is copied.

    Args:
        prompt, slot: of the answer, and what holds it.

    Attributes:
        looks: (answer token, probability) of what was read; the tokens before it were seen.
    """

    def __init__(self, gating: Gating, prompt: Prompt, slot: Slot) -> None:
        self._gating, self._prompt, self._slot = gating, prompt, slot
        self.looks: list[tuple[int, float]] = []

    def due(self, said: int) -> bool:
        """Tell whether an answer of so many tokens is to be looked at."""
        return 0 < self._gating.look <= said - self._seen

    def look(self, reader: GateReader, said: Sequence[int]) -> bool:
        """Read the latest tokens; tell whether the answer is to go on contrasted.

        Raises:
            llama.DecodeAborted: cancelled.
        """
        probe = self._gating.gate.answer
        assert probe is not None
        probability = probe.probability(self._read(reader.states, said).mean(axis=1))
        self.looks.append((len(said), probability))
        return probability >= self._gating.settings.answer_threshold

    @property
    def _seen(self) -> int:
        return self.looks[-1][0] if self.looks else 0

    def _read(self, reader: Reader, said: Sequence[int]) -> States:
        tokens, cache = [*self._prompt.safe, *said], self._slot.safe
        rewinds = cache.context.model.rewinds
        start = len(tokens) - (min(LOOKED_AT, len(said) - self._seen) if rewinds else 1)
        if not reader.fits(tokens):
            head, first = _shortened(self._prompt.safe_prefix, reader.n_ctx // 4), len(tokens) - BEFORE
            return reader.read([*head, *tokens[first:]], len(head) + start - first)
        reader.adopt(cache, tokens, start)
        return reader.read(tokens, start)


def _excerpts(
    tokens: Sequence[int], prefix: Sequence[int], start: int, end: int, most: int
) -> list[tuple[Sequence[int], int]]:
    """Cut the message at tokens[start:end] into pieces (beginning, end and between), each behind the system prompt."""
    head, tail = _shortened(prefix, most // 2), tokens[end:][: most // 4]
    message = tokens[start:end]
    room = most - len(head) - len(tail)
    piece = len(message) if len(message) <= room else min(EXCERPT, room)
    last = len(message) - piece
    places = sorted({last * i // (EXCERPTS - 1) for i in range(EXCERPTS)})
    return [([*head, *message[at : at + piece], *tail], len(head)) for at in places]


def _shortened(prefix: Sequence[int], most: int) -> Sequence[int]:
    return prefix if len(prefix) <= most else [*prefix[:SINK], *prefix[SINK - most :]]
