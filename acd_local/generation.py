"""How an engine makes one answer, and the handle through which a caller gets it.

An answer is a routine: a generator that yields text, or rows that it needs decoded and whose logits it is to be sent.
`AnswerStream` drives one routine; `batch.Batch` drives several and decodes their rows together.
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

from acd_local import pairs
from acd_local.answers import (
    Answer,
    AnswerEvent,
    ContrastStats,
    FinishReason,
    GateDecision,
    GateRecord,
    OnEvent,
    PromptProgress,
    Timings,
    TokenRecord,
    TurnsDropped,
)
from acd_local.errors import ContextError, UsageError
from acd_local.gating import AS_IS, Conversation, Gating, Watch, read_prompt
from acd_local.options import MAX_SEED, Options
from acd_local.pairs import PromptPair, refuse_adversarial
from acd_local.runtime import grammar, lookup
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.choice import Chooser, ContrastSettings, Step
from acd_local.runtime.deferred import deferred
from acd_local.runtime.generate import Need, Strategy, StreamLogits, advance, stepwise
from acd_local.runtime.llama import DecodeAborted, Logits
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.pace import Pace
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.prompts import Framing, Prompt
from acd_local.runtime.rowcosts import RowCosts
from acd_local.runtime.sampling import Guard, TokenSampler
from acd_local.runtime.streams import Cache, Feed, Rows, Slot
from acd_local.runtime.template import Message
from acd_local.runtime.text import TextStream

if TYPE_CHECKING:
    from acd_local.engine import Engine


_NO_CONTRAST = ContrastSettings(0.0, 0.0)
LEAD = 16  # tokens decoded stepwise where it is not known what rows cost
Item: TypeAlias = str | Rows
Routine: TypeAlias = Generator[Item, list[Logits], None]


class Work(Protocol):
    """What makes an answer. It must not know its handle: dropping the handle is what stops the work."""

    result: Answer | None
    cancel: CancelToken

    @property
    def text(self) -> str: ...

    def pieces(self) -> Generator[str, None, None]: ...


class Handle:
    """One answer while it is made: iterate for pieces of its text (whole characters), then read `answer`.

    Closing it early (close(), a `with` block, or dropping it) stops decoding and frees its slot.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._pieces = work.pieces()

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
        if self._work.result is None:
            raise UsageError("the answer is not finished: iterate over the stream first")
        return self._work.result

    @property
    def text(self) -> str:
        """The text so far."""
        return self._work.text

    def cancel(self) -> None:
        """End the answer within one decoding step, also during a long prompt. Safe from any thread."""
        self._work.cancel.set()

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerStream(Handle):
    """An answer of `Engine.generate`.

    Attributes:
        seed: the seed in use. settings: the contrast's numbers in use. pair: the prompt pair in use, None: none.
        soft: whether its soft prompts are.
    """

    def __init__(self, work: Answering) -> None:
        super().__init__(work)
        self._answering = work
        self.seed = work.seed
        self.settings = work.settings
        self.pair = work.pair
        self.soft = work.soft

    def skip(self) -> Answer:
        """Return the cancelled answer that it becomes if nobody begins to read it; nothing is decoded."""
        self.close()
        return self._answering.skip()


class PromptMeter:
    """Counts the rows of one prompt while they are decoded, and tells whoever wants to know how far it is.

    Args:
        streams: what holds it in the end, and its tokens.

    Attributes:
        decoded: rows of the batches that were finished.
    """

    def __init__(self, streams: Sequence[tuple[Cache, Sequence[int]]], on_event: OnEvent | None) -> None:
        self._streams = streams
        self._total = sum(len(tokens) for _, tokens in streams)
        self._on_event = on_event
        self._settled = self._before = 0
        self.decoded = 0

    def __call__(self, rows: int) -> None:
        """See `streams.extend`."""
        self.decoded = self._before + rows
        if self._on_event is not None:
            done = sum(common_prefix(cache.tokens, tokens) for cache, tokens in self._streams)
            self._on_event(PromptProgress(done, self._total))

    def settle(self, rows: Rows) -> None:
        """Count all of these as decoded."""
        self._settled += sum(len(feed.tokens) for feed in rows)
        self.decoded = self._before = self._settled

    def pause(self) -> None:
        """What is left of the rows comes by itself."""
        self._before = self.decoded


class Answering:
    """One answer in the making: builds the prompt, decodes it, runs the loop, turns tokens into text.

    Attributes:
        meter: what the rows are to be counted with while they are the prompt's.
    """

    def __init__(
        self,
        engine: Engine,
        turns: Sequence[Message],
        options: Options,
        system: str | None,
        pair: PromptPair | None,
        framing: Framing,
        soft: bool,
        gating: Gating | None,
        divergence: bool,
        trace: bool,
        on_event: OnEvent | None,
        cancel: CancelToken,
    ) -> None:
        self._engine = engine
        self._turns = turns
        self._options = options
        self._system = system
        self.pair = pair
        self.soft = soft
        self._framing = framing
        self._gating = gating
        self._divergence = divergence
        self._trace = trace
        self._on_event = on_event
        self.cancel = cancel
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed
        self.settings = resolve_contrast(options, pair, soft=soft)
        self._in_force = self.settings if gating is None else _NO_CONTRAST
        self._decided: GateRecord | None = None
        self.result: Answer | None = None
        self.meter: PromptMeter | None = None
        self._prompt_decoded = 0
        self._records: list[TokenRecord] = []
        self._text: list[str] = []
        self._divergences: list[float] = []
        self._compared = 0

    @property
    def text(self) -> str:
        return "".join(self._text)

    def pieces(self) -> Generator[str, None, None]:
        """Drive the routine alone."""
        routine = self.routine()
        try:
            item = next(routine, None)
            while item is not None:
                if isinstance(item, str):
                    yield item
                    item = next(routine, None)
                else:
                    item = self._decode(routine, item)
        finally:
            routine.close()

    def _decode(self, routine: Routine, rows: Rows) -> Item | None:
        try:
            with self._engine._open:  # the logits are valid until somebody else decodes
                return advance(routine, self._engine._extend(rows, [self.cancel], self.meter))
        except DecodeAborted as aborted:
            return abort(routine, aborted)

    def routine(self, *, beside: Callable[[], Sequence[CancelToken]] | None = None) -> Routine:
        """Yields text, and rows to be decoded; is sent their logits, or DecodeAborted.

        The logits are read before the next item comes, never after. Started outside the engine's lock (it may wait for
        a slot), sent logits inside.

        Args:
            beside: the rows are decoded together with other answers' rows, one token per stream at a time; tells what
                cancels one of these. No rows at all are asked for where such a cancel is to be seen to first.
        """
        started = first_logits = time.perf_counter()
        prompt: Prompt | None = None
        text = TextStream(self._options.stop)
        reason: FinishReason = "length"
        try:
            guard = self._check_request()
            prompt = self._build(self._framing if self._gating is None else self._gating.base)
            with self._engine._slot(prompt, self.cancel) as slot:
                prompt, first = yield from self._begin(slot, prompt, beside or tuple)
                first_logits = time.perf_counter()
                chooser = self._chooser(prompt, guard)
                watch = self._watch(prompt, slot)
                strategy = self._strategy(chooser, prompt, first, deferring=beside is None)
                item = next(strategy, None)
                while item is not None:
                    if not isinstance(item, Step):
                        # All that the chooser chose was said: it can go on in another prompt.
                        if watch is not None and watch.due(len(self._records)) and self._look(watch):
                            strategy.close()
                            watch = None
                            if (turned := (yield from self._turn(slot))) is None:
                                break  # there is no room for the pair's prompt
                            prompt, first = turned
                            chooser.settings = self._in_force
                            strategy = self._strategy(chooser, prompt, first, deferring=beside is None)
                            item = next(strategy, None)
                            continue
                        item = advance(strategy, (yield [_feed(need, slot, prompt) for need in item]))
                        continue
                    self._go_on()  # a run holds many steps
                    piece = self._record(item)
                    if item.ends:
                        reason = "stop"
                        break
                    if shown := text.push(piece):
                        self._text.append(shown)
                        yield shown
                    if text.stopped_by is not None:
                        reason = "stop_string"
                        break
                    item = next(strategy, None)
                else:
                    if len(self._records) < prompt.room:  # the grammar is complete
                        reason = "stop"
        except DecodeAborted:
            reason = "cancelled"
        if rest := text.finish():
            self._text.append(rest)
            yield rest
        self._engine._row_clock.settle()
        self.result = self._finish(reason, prompt, (started, first_logits, time.perf_counter()))

    def skip(self) -> Answer:
        """Return the answer of one that is cancelled before it begins."""
        self.result = self._finish("cancelled", None, (0.0, 0.0, 0.0))
        return self.result

    def _begin(
        self, slot: Slot, prompt: Prompt, beside: Callable[[], Sequence[CancelToken]]
    ) -> Generator[Item, list[Logits], tuple[Prompt, StreamLogits]]:
        """The prompt that answers, decoded, and the logits behind it. Where there is a gate, `prompt` is its base's."""
        gating = self._gating
        if gating is not None:
            probability, logits = yield from self._read(gating, slot, prompt, beside)
            decision = gating.settings.decide(probability)
            self._decided = GateRecord(probability, decision, 0 if decision == "contrast" else None)
            self._tell(GateDecision(probability, decision))
            if decision == "contrast":
                self._in_force = self.settings
                prompt = self._build(self._framing)
            elif not gating.is_base(decision):
                prompt = self._build(AS_IS)
            elif logits is not None:
                self._tell_dropped(prompt)
                return prompt, (logits, None)
        self._tell_dropped(prompt)
        return prompt, (yield from self._decode_prompt(slot, prompt))

    def _read(
        self, gating: Gating, slot: Slot, prompt: Prompt, beside: Callable[[], Sequence[CancelToken]]
    ) -> Generator[Item, list[Logits], tuple[float, Logits | None]]:
        """See `read_prompt`; another answer's cancel makes it begin again, once that was seen to."""
        asked = Conversation(self._system, self._turns, prompt)
        while True:
            others = beside()
            try:
                with self._engine._reading(gating.gate, [self.cancel, *others]) as reader:
                    meter = PromptMeter([(reader.cache, prompt.safe)], self._on_event)
                    try:
                        return read_prompt(self._engine, reader, gating, asked, slot, meter, self._go_on)
                    finally:
                        self._prompt_decoded += meter.decoded
            except DecodeAborted:
                if self.cancel.is_set or not any(cancel.is_set for cancel in others):
                    raise
            yield []

    def _decode_prompt(
        self, slot: Slot, prompt: Prompt, said: Sequence[int] = ()
    ) -> Generator[Item, list[Logits], StreamLogits]:
        """What is not in the slot's caches of a prompt and an answer's tokens; counted, however it ends."""
        streams = [(slot.safe, [*prompt.safe, *said], prompt.safe_prefix)]
        if prompt.adversarial is not None:
            streams.append((slot.adversarial, [*prompt.adversarial, *said], prompt.adversarial_prefix))
        meter = self.meter = PromptMeter([(cache, tokens) for cache, tokens, _ in streams], self._on_event)
        try:
            work = self._engine._prepare(streams, self.cancel, meter)
            logits = yield work
            meter.settle(work)
        finally:
            self._prompt_decoded += meter.decoded
            self.meter = None
        return logits[0][0], logits[1][0] if len(logits) > 1 else None

    def _watch(self, prompt: Prompt, slot: Slot) -> Watch | None:
        gating, decided = self._gating, self._decided
        if gating is None or decided is None or decided.contrast_from is not None or not gating.look:
            return None
        return Watch(self._engine, gating, prompt, slot, self.cancel)

    def _look(self, watch: Watch) -> bool:
        """Read the answer again; whether it goes on under the pair."""
        turns = watch.look([record.token for record in self._records])
        position, probability = watch.looks[-1]
        assert self._decided is not None
        self._decided = replace(self._decided, looks=tuple(watch.looks), contrast_from=position if turns else None)
        if turns:
            self._tell(GateDecision(probability, "contrast", position))
        return turns

    def _turn(self, slot: Slot) -> Generator[Item, list[Logits], tuple[Prompt, StreamLogits] | None]:
        """The pair's prompt and the answer so far, decoded, and the logits behind it; None: there is no room."""
        said = [record.token for record in self._records]
        try:
            prompt = self._build(self._framing)
        except ContextError:
            return None
        if prompt.room <= len(said):
            return None
        self._in_force = replace(self.settings, begin=len(said))
        self._tell_dropped(prompt)
        return prompt, (yield from self._decode_prompt(slot, prompt, said))

    def _tell(self, event: AnswerEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _tell_dropped(self, prompt: Prompt) -> None:
        if prompt.dropped:
            self._tell(TurnsDropped(prompt.dropped))

    def _check_request(self) -> Guard | None:
        engine, options = self._engine, self._options
        engine._check_open()  # first: in a forked child no lock may be waited for
        guard = grammar.from_options(options, engine.vocab, engine.info.path)
        if self.pair is not None:
            for text in filter(None, (self._system, *self._framing.positive_texts())):
                refuse_adversarial(text, self.pair)
        return guard

    def _build(self, framing: Framing) -> Prompt:
        options = self._options
        return self._engine._builder.build(
            framing,
            self._system,
            self._turns,
            contrast=framing is self._framing and self.settings.contrasts(0),
            max_tokens=options.max_tokens,
            overflow=options.overflow,
            check=self._go_on,
        )

    def _go_on(self) -> None:
        if self.cancel.is_set:
            raise DecodeAborted

    def _chooser(self, prompt: Prompt, guard: Guard | None) -> Chooser:
        engine = self._engine
        return Chooser(
            TokenSampler(engine.vocab, self._options, self.seed, prompt.safe, n_ctx=engine.n_ctx),
            engine._vocabulary,
            self._in_force,
            grammar=guard,
            divergence=self._divergence,
            trace=self._trace,
        )

    def _strategy(self, chooser: Chooser, prompt: Prompt, first: StreamLogits, *, deferring: bool) -> Strategy:
        """What says the rest of the answer; `first` are the logits behind what was said."""
        engine, options, alpha = self._engine, self._options, self._in_force.alpha
        costs, asked = engine._row_clock.known, options.strategy
        said = [record.token for record in self._records]
        if asked == "stepwise" or not deferring or not engine.can_defer:
            return stepwise(first, chooser, limit=prompt.room, start=len(said))
        return deferred(
            first,
            chooser,
            Pace(costs or RowCosts(), alpha=alpha, greedy=options.temp == 0),
            Lookup(prompt.safe, lookup.GREEDY if options.temp == 0 else lookup.SAMPLED),
            limit=prompt.room,
            said=said,
            lead=LEAD if costs is None and asked == "auto" and alpha > 0 else 1,
            patient=asked == "deferred" or costs is None,
            clock=engine._row_clock if costs is None else None,
        )

    def _record(self, step: Step) -> bytes:
        vocab = self._engine.vocab
        piece = b"" if step.ends else vocab.piece(step.token)
        safe_piece = piece if step.safe_choice == step.token else vocab.piece(step.safe_choice)
        record = TokenRecord(
            step.token,
            piece.decode("utf-8", "replace"),
            step.safe_choice,
            safe_piece.decode("utf-8", "replace"),
            None if step.trace is None else step.trace.safe_logprob,
            None if step.trace is None else step.trace.safe_rank,
        )
        self._records.append(record)
        if self._trace:
            self._tell(record)
        self._compared += step.compared
        if step.divergence is not None:
            self._divergences.append(step.divergence)
        return piece

    def _used(self, prompt: Prompt) -> tuple[int, int]:
        """Tokens of either stream: the prompt, and the answer but for its last token."""
        n, contrast = len(self._records), self._in_force
        seen = n if contrast.window is None else min(n, contrast.begin + contrast.window)
        adversarial = 0 if prompt.adversarial is None else len(prompt.adversarial) + max(0, seen - 1)
        return len(prompt.safe) + max(0, n - 1), adversarial

    def _finish(self, reason: FinishReason, prompt: Prompt | None, times: tuple[float, float, float]) -> Answer:
        """The finished answer; without a prompt where it ended before that was known."""
        started, first_logits, ended = times
        records, s = self._records, self._in_force
        completion = sum(1 for r in records if r.token not in self._engine._vocabulary.eog)
        seconds = ended - first_logits if records else 0.0
        return Answer(
            text=self.text,
            finish_reason=reason,
            prompt_tokens=0 if prompt is None else len(prompt.safe),
            prompt_decoded=self._prompt_decoded,
            completion_tokens=completion,
            seed=self.seed,
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
                prompt_seconds=(first_logits if records else ended) - started,
                answer_seconds=seconds,
                tokens_per_second=len(records) / seconds if len(records) > 1 and seconds > 0 else 0.0,
            ),
            context_used=self._used(prompt) if prompt and (records or reason != "cancelled") else (0, 0),
            gate=self._decided,
            dropped_turns=0 if prompt is None else prompt.dropped,
            tokens=tuple(records),
        )


def _feed(need: Need, slot: Slot, prompt: Prompt) -> Feed:
    if need.stream == "safe":
        return Feed(slot.safe, need.tokens, need.wanted, len(prompt.safe) + need.start)
    return Feed(slot.adversarial, need.tokens, need.wanted, len(prompt.adversarial or ()) + need.start)


def abort(routine: Routine, aborted: DecodeAborted) -> Item | None:
    """Tell a routine that its rows were not decoded."""
    try:
        return routine.throw(aborted)
    except StopIteration:
        return None


def resolve_contrast(options: Options, pair: PromptPair | None, *, soft: bool = False) -> ContrastSettings:
    """Which numbers apply: the option, else the pair's, else the default; `plain` is the safe prompt alone.

    Without a pair nothing is contrasted, whatever the options say. With `soft` the numbers of the pair's soft prompts
    come before its own.
    """
    if options.plain or pair is None:
        return _NO_CONTRAST
    alphas = (options.alpha, pair.soft_alpha if soft else None, pair.alpha, pairs.DEFAULT_ALPHA)
    betas = (options.beta, pair.soft_beta if soft else None, pair.beta, pairs.DEFAULT_BETA)
    alpha = next(v for v in alphas if v is not None)
    beta = next(v for v in betas if v is not None)
    return ContrastSettings(float(alpha), float(beta), options.raw_contrast, options.window)
