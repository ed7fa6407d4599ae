"""How an engine makes one answer, and the handle through which a caller gets it.

An answer is a routine: a generator that yields text, or rows that it needs decoded and whose logits it is to be sent.
`AnswerStream` drives one routine; `batch.Batch` drives several and decodes their rows together.
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

from acd_local import pairs
from acd_local.answers import (
    Answer,
    AnswerEvent,
    ContrastStats,
    FinishReason,
    OnEvent,
    PromptProgress,
    Timings,
    TokenRecord,
    TurnsDropped,
)
from acd_local.errors import UsageError
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
from acd_local.runtime.streams import Feed, Rows, Slot
from acd_local.runtime.template import Message
from acd_local.runtime.text import TextStream

if TYPE_CHECKING:
    from acd_local.session import Engine


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

    Attributes:
        decoded: rows of the batches that were finished.
    """

    def __init__(self, slot: Slot, prompt: Prompt, on_event: OnEvent | None) -> None:
        self._streams = [(slot.safe, prompt.safe)]
        if prompt.adversarial is not None:
            self._streams.append((slot.adversarial, prompt.adversarial))
        self._total = sum(len(tokens) for _, tokens in self._streams)
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
        self._divergence = divergence
        self._trace = trace
        self._on_event = on_event
        self.cancel = cancel
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed
        self.settings = resolve_contrast(options, pair, soft=soft)
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

    def routine(self, *, beside_others: bool = False) -> Routine:
        """Yields text, and rows to be decoded; is sent their logits, or DecodeAborted.

        The logits are read before the next item comes, never after. Started outside the engine's lock (it may wait for
        a slot), sent logits inside.

        Args:
            beside_others: the rows are decoded together with other answers' rows: one token per stream at a time.
        """
        started = first_logits = time.perf_counter()
        prompt: Prompt | None = None
        text = TextStream(self._options.stop)
        reason: FinishReason = "length"
        try:
            prompt, guard = self._prompt()
            with self._engine._slot(prompt, self.cancel) as slot:
                logits = yield from self._decode_prompt(slot, prompt)
                first_logits = time.perf_counter()
                first = logits[0][0], logits[1][0] if len(logits) > 1 else None
                strategy = self._strategy(prompt, first, guard, deferring=not beside_others)
                item = next(strategy, None)
                while item is not None:
                    if not isinstance(item, Step):
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

    def _decode_prompt(self, slot: Slot, prompt: Prompt) -> Generator[Item, list[Logits], list[Logits]]:
        """What is not in the slot's caches; counted, however it ends."""
        meter = self.meter = PromptMeter(slot, prompt, self._on_event)
        try:
            work = self._engine._prepare(slot, prompt, self.cancel, meter)
            logits = yield work
            meter.settle(work)
        finally:
            self._prompt_decoded, self.meter = meter.decoded, None
        return logits

    def _tell(self, event: AnswerEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _prompt(self) -> tuple[Prompt, Guard | None]:
        engine, options = self._engine, self._options
        engine._check_open()  # first: in a forked child no lock may be waited for
        guard = grammar.from_options(options, engine.vocab, engine.info.path)
        for text in filter(None, (self._system, *self._framing.positive_texts())):
            refuse_adversarial(text, self.pair)
        prompt = engine._builder.build(
            self._framing,
            self._system,
            self._turns,
            contrast=self.settings.contrasts(0),
            max_tokens=options.max_tokens,
            overflow=options.overflow,
            check=self._go_on,
        )
        if prompt.dropped:
            self._tell(TurnsDropped(prompt.dropped))
        return prompt, guard

    def _go_on(self) -> None:
        if self.cancel.is_set:
            raise DecodeAborted

    def _strategy(self, prompt: Prompt, first: StreamLogits, guard: Guard | None, *, deferring: bool) -> Strategy:
        engine, options = self._engine, self._options
        chooser = Chooser(
            TokenSampler(engine.vocab, options, self.seed, prompt.safe, n_ctx=engine.n_ctx),
            engine._vocabulary,
            self.settings,
            grammar=guard,
            divergence=self._divergence,
            trace=self._trace,
        )
        costs, asked = engine._row_clock.known, options.strategy
        if asked == "stepwise" or not deferring or not engine.can_defer:
            return stepwise(first, chooser, limit=prompt.room)
        return deferred(
            first,
            chooser,
            Pace(costs or RowCosts(), alpha=self.settings.alpha, greedy=options.temp == 0),
            Lookup(prompt.safe, lookup.GREEDY if options.temp == 0 else lookup.SAMPLED),
            limit=prompt.room,
            lead=LEAD if costs is None and asked == "auto" and self.settings.alpha > 0 else 1,
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
        n, window = len(self._records), self.settings.window
        seen = n if window is None else min(n, window)
        adversarial = 0 if prompt.adversarial is None else len(prompt.adversarial) + max(0, seen - 1)
        return len(prompt.safe) + max(0, n - 1), adversarial

    def _finish(self, reason: FinishReason, prompt: Prompt | None, times: tuple[float, float, float]) -> Answer:
        """The finished answer; without a prompt where it ended before that was known."""
        started, first_logits, ended = times
        records, s = self._records, self.settings
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
        return ContrastSettings(0.0, 0.0)
    alphas = (options.alpha, pair.soft_alpha if soft else None, pair.alpha, pairs.DEFAULT_ALPHA)
    betas = (options.beta, pair.soft_beta if soft else None, pair.beta, pairs.DEFAULT_BETA)
    alpha = next(v for v in alphas if v is not None)
    beta = next(v for v in betas if v is not None)
    return ContrastSettings(float(alpha), float(beta), options.raw_contrast, options.window)
