"""Makes one answer: decides what is decoded, chooses tokens, and turns them into text; and streams it to a caller.

A `Generation` goes on by steps: a generator that yields text, or rows to be decoded, whose logits it is to be sent.
`AnswerStream` drives one of them; `batch.BatchRunner` drives several and decodes their rows together.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from acd_local import pairs
from acd_local.answers import (
    Answer,
    AnswerEvent,
    ContrastStats,
    FinishReason,
    GateDecision,
    GateRecord,
    LikelyToken,
    OnEvent,
    PromptProgress,
    Timings,
    TokenRecord,
    TurnsDropped,
)
from acd_local.errors import ContextError, UsageError
from acd_local.gating import Conversation, Gating, Watch, reading
from acd_local.options import MAX_DRAFT, Options
from acd_local.pairs import PromptPair, refuse_adversarial
from acd_local.runtime import grammar
from acd_local.runtime.apart import Kind
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.choice import NO_CONTRAST, Chooser, ContrastSettings, SpecialTokens, TokenChoice
from acd_local.runtime.decoder import Decoder, PromptMeter
from acd_local.runtime.drafts import Drafter
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.lifetime import Closing
from acd_local.runtime.llama import DecodeAborted, Logits
from acd_local.runtime.prompts import Prompt, PromptBuilder, PromptSetup
from acd_local.runtime.sampling import Guard, TokenSampler
from acd_local.runtime.speculative import Choices, Rows, StreamLogits, advance, choose_tokens
from acd_local.runtime.streams import DecodeBatch, DecodeRequest, Slot
from acd_local.runtime.template import Message
from acd_local.runtime.text import TextStream

StepEvent: TypeAlias = str | DecodeBatch  # a piece of text, or rows to be decoded
Steps: TypeAlias = Generator[StepEvent, list[Logits], None]


@dataclass(frozen=True)
class GenerationRequest:
    """All that is known of an answer before it begins; `Engine.generate` makes it.

    Attributes:
        turns: user and assistant messages. system: the application's system prompt.
        options: sampling and limits.
        prompt_setup: what stands around the conversation in either stream.
        contrast: the contrast's numbers.
        seed: of the draws.
        pair: the prompt pair in use; None: none. soft: whether its soft prompts are.
        gating: the gate that is asked; None: none is.
        apart: the kind of context that answers in the pair's place, see `runtime.apart`; None: the usual one.
        divergence, trace, logprobs, on_event, cancel: as in `Engine.generate`.
    """

    turns: Sequence[Message]
    options: Options
    prompt_setup: PromptSetup
    contrast: ContrastSettings
    seed: int
    system: str | None = None
    pair: PromptPair | None = None
    soft: bool = False
    gating: Gating | None = None
    apart: Kind | None = None
    divergence: bool = False
    trace: bool = False
    logprobs: int | None = None
    on_event: OnEvent | None = None
    cancel: CancelToken = field(default_factory=CancelToken)


class Producer(Protocol):
    """The maker of an answer. It must not know its stream: dropping the stream is what stops it."""

    result: Answer | None

    @property
    def cancel(self) -> CancelToken: ...

    @property
    def text(self) -> str: ...

    def pieces(self) -> Generator[str, None, None]: ...


class BaseStream(Closing):
    """One answer while it is made: iterate for pieces of its text (whole characters), then read `answer`.

    Closing it early (close(), a `with` block, or dropping it) stops decoding and frees its slot.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._pieces = producer.pieces()

    @property
    def begun(self) -> bool:
        """Whether anybody asked for its first piece."""
        return inspect.getgeneratorstate(self._pieces) != inspect.GEN_CREATED

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def run(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Decode to the end, handing text to `on_text` as it comes."""
        with self:
            for text in self:
                if on_text is not None:
                    on_text(text)
        return self.answer

    @property
    def answer(self) -> Answer:
        """The finished answer; only there once the iteration ended.

        Raises:
            UsageError: it has not.
        """
        if self._producer.result is None:
            raise UsageError("the answer is not finished: iterate over the stream first")
        return self._producer.result

    @property
    def text(self) -> str:
        """The text so far."""
        return self._producer.text

    def cancel(self) -> None:
        """End the answer within one decoding step, also during a long prompt. Safe from any thread."""
        self._producer.cancel.set()

    def close(self) -> None:
        """Stop the answer here."""
        self._pieces.close()


class AnswerStream(BaseStream):
    """An answer of `Engine.generate`.

    Attributes:
        seed: the seed in use. settings: the contrast's numbers in use. pair: the prompt pair in use, None: none.
        soft: whether its soft prompts are.
        generation: what makes it, for whoever drives it in this stream's place.
    """

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation)
        self.generation = generation
        request = generation.request
        self.seed, self.settings, self.pair, self.soft = request.seed, request.contrast, request.pair, request.soft

    def skip(self) -> Answer:
        """Return the cancelled answer that it becomes if nobody begins to read it; nothing is decoded."""
        self.close()
        return self.generation.skip()


class Answerer(Protocol):
    """An `Engine`, as chats, batches and checks see it."""

    info: GGUFInfo
    decoder: Decoder

    def generate(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        options: Options | None = None,
        *,
        system: str | None = None,
        pair: PromptPair | str | None = None,
        divergence: bool = False,
        trace: bool = False,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
    ) -> AnswerStream: ...

    def close(self) -> None: ...


class Generation:
    """One answer in the making: builds the prompt, decodes it, runs the loop, turns tokens into text.

    Args:
        prompts, special: of the decoder's model.

    Attributes:
        meter: what the rows are to be counted with while they are the prompt's.
        result: the finished answer; None while it is made.
    """

    def __init__(
        self, decoder: Decoder, prompts: PromptBuilder, special: SpecialTokens, request: GenerationRequest
    ) -> None:
        self.decoder = decoder
        self.request = request
        self._prompts = prompts
        self._special = special
        self._contrast = request.contrast if request.gating is None else NO_CONTRAST
        self._decided: GateRecord | None = None
        self.result: Answer | None = None
        self.meter: PromptMeter | None = None
        self._prompt: Prompt | None = None
        self._prompt_decoded = 0
        self._started = self._first_logits = 0.0
        self._records: list[TokenRecord] = []
        self._text = TextStream(request.options.stop)
        self._shown: list[str] = []
        self._divergences: list[float] = []
        self._compared = 0
        self._drafters: list[Drafter] = []

    @property
    def cancel(self) -> CancelToken:
        return self.request.cancel

    @property
    def text(self) -> str:
        return "".join(self._shown)

    @property
    def _tokens(self) -> list[int]:
        """What was chosen so far."""
        return [record.token for record in self._records]

    def pieces(self) -> Generator[str, None, None]:
        """Drive the steps alone."""
        steps = self.steps()
        try:
            event = next(steps, None)
            while event is not None:
                if isinstance(event, str):
                    yield event
                    event = next(steps, None)
                else:
                    event = self._decode(steps, event)
        finally:
            steps.close()

    def _decode(self, steps: Steps, rows: DecodeBatch) -> StepEvent | None:
        try:
            with self.decoder.open():  # samplers read the vocabulary: nobody may free it meanwhile
                # A single row is chosen from at once; of several, other answers may be read in between.
                views = all(request.outputs == 1 for request in rows)
                return advance(steps, self.decoder.extend(rows, [self.cancel], self.meter, views=views))
        except DecodeAborted as aborted:
            return abort(steps, aborted)

    def steps(self, *, beside: Callable[[], Sequence[CancelToken]] | None = None) -> Steps:
        """Yield text, and rows to be decoded; take in their logits, or DecodeAborted.

        Started outside `Decoder.open` (it may wait for a slot), sent logits inside: nobody frees the vocabulary, which
        samplers read.

        Args:
            beside: the rows are decoded together with other answers' rows, one token per stream at a time; tells what
                cancels one of these. No rows at all are asked for where such a cancel is to be seen to first.
        """
        self._started = self._first_logits = time.perf_counter()
        reason: FinishReason = "cancelled"
        try:
            self._check_request()
            guard = grammar.from_options(self.request.options, self.decoder.model.vocab, self.decoder.model.path)
            gating = self.request.gating
            prompt = self._prompt = self._build(self.request.prompt_setup if gating is None else gating.base)
            with self.decoder.slot(prompt.safe, prompt.safe_prefix, self.cancel) as slot:
                reason = yield from self._answer(slot, prompt, guard, beside)
        except DecodeAborted:
            pass
        if rest := self._text.finish():
            self._shown.append(rest)
            yield rest
        self.result = self._finish(reason, time.perf_counter())

    def _answer(
        self, slot: Slot, prompt: Prompt, guard: Guard | None, beside: Callable[[], Sequence[CancelToken]] | None
    ) -> Generator[StepEvent, list[Logits], FinishReason]:
        """Decode the prompt and say the answer, but for text that is held back; return why it ended."""
        prompt, first = yield from self._decode_first(slot, prompt, beside or tuple)
        self._prompt, self._first_logits = prompt, time.perf_counter()
        chooser = self._chooser(prompt, guard)
        watch, home = self._watch(prompt, slot), self._home(slot)
        choices = self._choices(chooser, prompt, first, home, alone=beside is None)
        event = next(choices, None)
        while event is not None:
            if isinstance(event, TokenChoice):
                self._check_cancel()  # a run holds many choices
                piece = self._record(event)
                if event.ends:
                    return "stop"
                if shown := self._text.push(piece):
                    self._shown.append(shown)
                    yield shown
                if self._text.stopped_by is not None:
                    return "stop_string"
                event = next(choices, None)
            elif watch is not None and watch.due(len(self._records)) and self._read_answer(watch):
                # All that the chooser chose was said: it can go on in another prompt.
                choices.close()
                watch = None
                if (switched := (yield from self._switch_to_pair(slot))) is None:
                    return "length"
                prompt, first = switched
                self._prompt, chooser.settings, home = prompt, self._contrast, self._home(slot)
                choices = self._choices(chooser, prompt, first, home, alone=beside is None)
                event = next(choices, None)
            else:
                event = advance(choices, (yield _placed(event, home, prompt)))
        return "length" if len(self._records) >= prompt.room else "stop"  # the grammar is complete

    def skip(self) -> Answer:
        """Return the answer of one that is cancelled before it begins."""
        self.result = self._finish("cancelled", self._started)
        return self.result

    def _decode_first(
        self, slot: Slot, prompt: Prompt, beside: Callable[[], Sequence[CancelToken]]
    ) -> Generator[StepEvent, list[Logits], tuple[Prompt, StreamLogits]]:
        """Decode the prompt that answers; return it and the logits behind it.

        Where there is a gate, `prompt` is its base's.
        """
        gating = self.request.gating
        if gating is not None:
            probability, logits = yield from self._ask_gate(gating, slot, prompt, beside)
            decision = gating.settings.decide(probability)
            self._decided = GateRecord(probability, decision, 0 if decision == "contrast" else None)
            self._tell(GateDecision(probability, decision))
            if decision == "contrast":
                self._contrast = self.request.contrast
                prompt = self._build(self.request.prompt_setup)
            elif not gating.is_base(decision):
                prompt = self._build(PromptSetup())
            elif logits is not None:
                self._tell_dropped(prompt)
                return prompt, (logits, None)
        self._tell_dropped(prompt)
        return prompt, (yield from self._decode_prompt(self._home(slot), prompt))

    def _home(self, slot: Slot) -> Slot:
        """Return what holds the answer: another kind of context's cache, where that answers in the pair's place."""
        kind, decided = self.request.apart, self._decided
        if kind is None or (decided is not None and decided.contrast_from is None):
            return slot
        return Slot(self.decoder.apart(kind, slot), slot.adversarial)

    def _ask_gate(
        self, gating: Gating, slot: Slot, prompt: Prompt, beside: Callable[[], Sequence[CancelToken]]
    ) -> Generator[StepEvent, list[Logits], tuple[float, Logits | None]]:
        """Ask the gate; begin again where another answer's cancel interrupts the reading."""
        asked = Conversation(self.request.system, self.request.turns, prompt)
        while True:
            others = beside()
            try:
                with reading(self.decoder, self._prompts, gating, [self.cancel, *others], self._check_cancel) as reader:
                    meter = PromptMeter([(reader.states.cache, prompt.safe)], self._tell_progress)
                    try:
                        return reader.read_prompt(asked, slot, meter)
                    finally:
                        self._prompt_decoded += meter.decoded
            except DecodeAborted:
                if self.cancel.is_set or not any(cancel.is_set for cancel in others):
                    raise
            yield []

    def _decode_prompt(
        self, slot: Slot, prompt: Prompt, said: Sequence[int] = ()
    ) -> Generator[StepEvent, list[Logits], StreamLogits]:
        """Decode what the slot's caches lack of the prompt and of `said`; these rows are counted, cancelled or not."""
        streams = [(slot.safe, [*prompt.safe, *said], prompt.safe_prefix)]
        if prompt.adversarial is not None:
            streams.append((slot.adversarial, [*prompt.adversarial, *said], prompt.adversarial_prefix))
        meter = self.meter = PromptMeter([(cache, tokens) for cache, tokens, _ in streams], self._tell_progress)
        try:
            work = self.decoder.prepare(streams, self.cancel, meter)
            logits = yield work
            meter.settle(work)
        finally:
            self._prompt_decoded += meter.decoded
            self.meter = None
        return logits[0][0], logits[1][0] if len(logits) > 1 else None

    def _watch(self, prompt: Prompt, slot: Slot) -> Watch | None:
        gating, decided = self.request.gating, self._decided
        if gating is None or decided is None or decided.contrast_from is not None or not gating.look:
            return None
        return Watch(gating, prompt, slot)

    def _read_answer(self, watch: Watch) -> bool:
        """Read the answer again; tell whether it goes on under the pair."""
        assert self.request.gating is not None
        with reading(self.decoder, self._prompts, self.request.gating, [self.cancel]) as reader:
            turns = watch.look(reader, self._tokens)
        position, probability = watch.looks[-1]
        assert self._decided is not None
        self._decided = replace(self._decided, looks=tuple(watch.looks), contrast_from=position if turns else None)
        if turns:
            self._tell(GateDecision(probability, "contrast", position))
        return turns

    def _switch_to_pair(self, slot: Slot) -> Generator[StepEvent, list[Logits], tuple[Prompt, StreamLogits] | None]:
        """Decode the pair's prompt and the answer so far; return prompt and logits, None where there is no room."""
        said = self._tokens
        try:
            prompt = self._build(self.request.prompt_setup)
        except ContextError:
            return None
        if prompt.room <= len(said):
            return None
        self._contrast = replace(self.request.contrast, begin=len(said))
        self._tell_dropped(prompt)
        return prompt, (yield from self._decode_prompt(self._home(slot), prompt, said))

    def _tell(self, event: AnswerEvent) -> None:
        if self.request.on_event is not None:
            self.request.on_event(event)

    def _tell_progress(self, done: int, total: int) -> None:
        self._tell(PromptProgress(done, total))

    def _tell_dropped(self, prompt: Prompt) -> None:
        if prompt.dropped:
            self._tell(TurnsDropped(prompt.dropped))

    def _check_request(self) -> None:
        """Refuse a closed decoder, and the adversarial text in the positive stream."""
        self.decoder.check_open()  # first: in a forked child no lock may be waited for
        request, gating = self.request, self.request.gating
        texts = [request.system, *request.prompt_setup.positive_texts()]
        texts += [] if gating is None else gating.base.positive_texts()
        for text in filter(None, texts):
            refuse_adversarial(text, request.pair)

    def _build(self, prompt_setup: PromptSetup) -> Prompt:
        request = self.request
        return self._prompts.build(
            prompt_setup,
            request.system,
            request.turns,
            contrast=prompt_setup is request.prompt_setup and request.contrast.contrasts(0),
            max_tokens=request.options.max_tokens,
            overflow=request.options.overflow,
            check=self._check_cancel,
        )

    def _check_cancel(self) -> None:
        if self.cancel.is_set:
            raise DecodeAborted

    def _chooser(self, prompt: Prompt, guard: Guard | None) -> Chooser:
        request, decoder = self.request, self.decoder
        return Chooser(
            TokenSampler(decoder.model.vocab, request.options, request.seed, prompt.safe, n_ctx=decoder.n_ctx),
            self._special,
            self._contrast,
            grammar=guard,
            divergence=request.divergence,
            trace=request.trace,
            logprobs=request.logprobs,
        )

    def _choices(self, chooser: Chooser, prompt: Prompt, first: StreamLogits, slot: Slot, *, alone: bool) -> Choices:
        """Return what says the rest of the answer.

        Args:
            first: the logits behind what was said.
            alone: its rows are not decoded together with others': they may hold drafts.
        """
        said = self._tokens
        self._drafters.append(self._drafter(slot, [*prompt.safe, *said], alone=alone))
        return choose_tokens(first, chooser, self._drafters[-1], limit=prompt.room, said=said)

    def _drafter(self, slot: Slot, conversation: Sequence[int], *, alone: bool) -> Drafter:
        decoder, most = self.decoder, self.request.options.draft_max
        if not alone or not decoder.can_draft or most == 0 or slot not in decoder.slots:
            return Drafter((), decoder.costs, 0)
        sources = decoder.draft_sources(slot, conversation, self.cancel)
        return Drafter(sources, decoder.costs, MAX_DRAFT if most is None else most)

    def _record(self, choice: TokenChoice) -> bytes:
        vocab = self.decoder.model.vocab
        piece = b"" if choice.ends else vocab.piece(choice.token)
        safe_piece = piece if choice.safe_choice == choice.token else vocab.piece(choice.safe_choice)
        record = TokenRecord(
            choice.token,
            piece.decode("utf-8", "replace"),
            choice.safe_choice,
            safe_piece.decode("utf-8", "replace"),
            None if choice.trace is None else choice.trace.safe_logprob,
            None if choice.trace is None else choice.trace.safe_rank,
            self._likely(choice),
            choice.divergence,
        )
        self._records.append(record)
        if self.request.trace or self.request.logprobs is not None:
            self._tell(record)
        self._compared += choice.compared
        if choice.divergence is not None:
            self._divergences.append(choice.divergence)
        return piece

    def _likely(self, choice: TokenChoice) -> tuple[LikelyToken, ...] | None:
        if choice.logprobs is None:
            return None
        vocab, found = self.decoder.model.vocab, []
        for token, logprob in choice.logprobs:
            piece = vocab.piece(token)
            text = piece.decode("utf-8", "replace") if piece else vocab.literal(token)
            found.append(LikelyToken(token, text, piece, logprob))
        return tuple(found)

    def _used(self, prompt: Prompt) -> tuple[int, int]:
        """Count the tokens in either stream: the prompt, and the answer but for its last token."""
        n, contrast = len(self._records), self._contrast
        seen = n if contrast.window is None else min(n, contrast.begin + contrast.window)
        adversarial = 0 if prompt.adversarial is None else len(prompt.adversarial) + max(0, seen - 1)
        return len(prompt.safe) + max(0, n - 1), adversarial

    def _finish(self, reason: FinishReason, ended: float) -> Answer:
        """Make the finished answer; without a prompt where it ended before that was known."""
        prompt, records, s = self._prompt, self._records, self._contrast
        completion = sum(1 for r in records if r.token not in self._special.eog)
        seconds = ended - self._first_logits if records else 0.0
        return Answer(
            text=self.text,
            finish_reason=reason,
            prompt_tokens=0 if prompt is None else len(prompt.safe),
            prompt_decoded=self._prompt_decoded,
            completion_tokens=completion,
            seed=self.request.seed,
            contrast=ContrastStats(
                alpha=s.alpha,
                beta=s.beta,
                raw=s.raw,
                positions=len(records),
                changed_tokens=sum(r.changed for r in records),
                compared=self._compared,
                mean_divergence=sum(self._divergences) / len(self._divergences) if self._divergences else None,
            ),
            timings=Timings(
                prompt_seconds=(self._first_logits if records else ended) - self._started,
                answer_seconds=seconds,
                tokens_per_second=len(records) / seconds if len(records) > 1 and seconds > 0 else 0.0,
                drafted=sum(drafter.drafted for drafter in self._drafters),
                accepted=sum(drafter.accepted for drafter in self._drafters),
            ),
            context_used=self._used(prompt) if prompt and (records or reason != "cancelled") else (0, 0),
            gate=self._decided,
            dropped_turns=0 if prompt is None else prompt.dropped,
            tokens=tuple(records),
        )


def _placed(rows: Rows, slot: Slot, prompt: Prompt) -> DecodeBatch:
    """Place an answer's rows behind the prompt in the streams' caches."""
    streams = ((slot.safe, prompt.safe), (slot.adversarial, prompt.adversarial or ()))
    wanted = [True] * len(rows.tokens) if len(rows.tokens) > 1 else None
    return [
        DecodeRequest(cache, rows.tokens, wanted, len(ids) + rows.start)
        for cache, ids in streams[: 2 if rows.contrasts else 1]
    ]


def abort(steps: Steps, aborted: DecodeAborted) -> StepEvent | None:
    """Tell a generation that its rows were not decoded."""
    try:
        return steps.throw(aborted)
    except StopIteration:
        return None


def resolve_contrast(options: Options, pair: PromptPair | None, *, soft: bool = False) -> ContrastSettings:
    """Choose the contrast's numbers: the option, else the pair's, else the default; `plain` is the safe prompt alone.

    Without a pair nothing is contrasted, whatever the options say. With `soft` the numbers of the pair's soft prompts
    come before its own.
    """
    if options.plain or pair is None:
        return NO_CONTRAST
    alphas = (options.alpha, pair.soft_alpha if soft else None, pair.alpha, pairs.DEFAULT_ALPHA)
    betas = (options.beta, pair.soft_beta if soft else None, pair.beta, pairs.DEFAULT_BETA)
    alpha = next(v for v in alphas if v is not None)
    beta = next(v for v in betas if v is not None)
    return ContrastSettings(float(alpha), float(beta), options.raw_contrast, options.window)
