"""An engine holds a model and its two-stream caches and answers conversations."""

from __future__ import annotations

import atexit
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from acd_local import pairs
from acd_local.answers import Answer, Chunk, ContrastStats, FinishReason, Timings, TokenRecord
from acd_local.chat import Chat
from acd_local.errors import EngineBusyError, EngineClosedError, UsageError
from acd_local.models import resolve as resolve_model
from acd_local.options import MAX_SEED, Options
from acd_local.pairs import PromptPair
from acd_local.runtime import grammar, llama, probe
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.generate import ContrastSettings, Step, Vocabulary, generate
from acd_local.runtime.llama import DecodeAborted, Logits
from acd_local.runtime.prefixes import PrefixStore, common_prefix
from acd_local.runtime.prompts import Prompt, PromptBuilder
from acd_local.runtime.sampling import GrammarGuard, TokenSampler
from acd_local.runtime.streams import Cache, Layout, Slot, Streams, extend
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.runtime.text import TextStream
from acd_local.runtime.threads import physical_cores

DEFAULT_CTX_SIZE = 4096

# Never sampled unless they end the answer.
_NOT_TEXT = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED


@dataclass(frozen=True)
class TurnsDropped:
    """Event: the context was full, so the oldest `messages` of the conversation were left out of both streams."""

    messages: int


OnEvent = Callable[[TurnsDropped], None]


class Engine:
    """A model, loaded once, that answers by contrasting two streams. Safe to use from several threads.

    Args:
        model: path of a GGUF file, "demo", or "hf:owner/repo/file.gguf".
        pair: a prompt pair or its name or path; None takes the best one for this model.
        ctx_size: tokens that each stream holds; None means 4096, or the model's own limit if that is smaller.
        conversations: how many conversations may be decoded at once; each costs two streams of KV memory.
        layout: "shared" decodes both streams in one llama_context, "split" gives each stream its own.
        kv_type: "f16" or "q8_0".
        threads: CPU threads; None means the physical cores.
        gpu_layers: None offloads everything where the build can, nothing elsewhere.

    Raises:
        ModelError, PairError, UsageError, OutOfMemoryError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        pair: PromptPair | str | None = None,
        ctx_size: int | None = None,
        conversations: int = 1,
        layout: Layout = "shared",
        kv_type: str = "f16",
        threads: int | None = None,
        gpu_layers: int | None = None,
    ) -> None:
        _check_counts(ctx_size=ctx_size, conversations=conversations, threads=threads)
        self.info = probe.verify(resolve_model(str(model)))
        self.pair = self._resolve_pair(pair)
        self._model = llama.Model(self.info.path, gpu_layers=gpu_layers)
        try:
            limit = self._model.n_ctx_train
            self.n_ctx = ctx_size or (min(DEFAULT_CTX_SIZE, limit) if limit > 0 else DEFAULT_CTX_SIZE)
            self.template = ChatTemplate(self._model)
            self.vocab = self._model.vocab
            self._vocabulary = Vocabulary(self.vocab, _NOT_TEXT)
            self._builder = PromptBuilder(self.template, self.n_ctx)
            self._streams = Streams(
                self._model,
                n_ctx=self.n_ctx,
                conversations=conversations,
                layout=layout,
                kv_type=kv_type,
                threads=threads or physical_cores(),
            )
        except BaseException:
            self._model.close()
            raise
        rewinds = not self._model.keeps_state and self._model.n_swa == 0
        self._prefixes = PrefixStore(eager=conversations > 1 or not rewinds)
        self._lock = threading.RLock()  # held during every call into llama.cpp's contexts
        self._free = threading.Condition()
        self._idle: list[Slot] = list(self._streams.slots)
        self._holders: list[int] = []  # thread ids of running answers
        self._closed = False
        _open_engines.add(self)

    @property
    def warning(self) -> str | None:
        """Something about model and pair that the user should know, one line."""
        notes = [self.template.warning]
        if 0 < self._model.n_ctx_train < self.n_ctx:
            notes.append(f"the model was trained for {self._model.n_ctx_train} tokens, not {self.n_ctx}")
        if not pairs.fits(self.pair, self.info):
            notes.append(f"the prompt pair {self.pair.name!r} was made for another model")
        return "; ".join(filter(None, notes)) or None

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
    ) -> AnswerStream:
        """Answer a conversation.

        Args:
            messages: user and assistant turns in order, optionally a system message first; or just the user's text.
            options: sampling, contrast and limits of this answer.
            system: the application's system prompt; it follows the pair's in both streams.
            pair: another pair for this answer.
            divergence: measure KL(S || A) at every position (0.2 ms per token at a vocabulary of 49k).
            trace: record both streams' log probabilities per token.
            on_event: called when turns had to be dropped.
            cancel: set it to stop the answer from elsewhere; by default the stream has its own.

        Returns:
            An iterator over text chunks. Decoding starts with the first `next`, errors of the conversation (UsageError,
            ContextError) come from there.
        """
        turns, own_system = _turns(messages)
        if own_system is not None and system is not None:
            raise UsageError("give the system prompt as `system` or as the first message, not both")
        return AnswerStream(
            self,
            turns,
            options or Options(),
            system if own_system is None else own_system,
            self.pair if pair is None else self._resolve_pair(pair),
            divergence,
            trace,
            on_event,
            cancel or CancelToken(),
        )

    def chat(
        self,
        *,
        system: str | None = None,
        options: Options | None = None,
        pair: PromptPair | str | None = None,
    ) -> Chat:
        """A conversation that remembers its turns; any number of them share the engine."""
        return Chat(self, system=system, options=options, pair=None if pair is None else self._resolve_pair(pair))

    def close(self) -> None:
        """Free model and caches. Answers that are still being streamed end with EngineClosedError."""
        if self._closed:
            return
        self._closed = True
        self._streams.cancel()
        with self._lock:
            self._streams.close()
            self._model.close()
        _open_engines.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- used by AnswerStream -----------------------------------------------------------------------------------------

    @contextmanager
    def _slot(self, prompt: Sequence[int], cancel: CancelToken) -> Iterator[Slot]:
        """The free slot that already holds most of `prompt`; waits for one unless this thread holds them all."""
        me = threading.get_ident()
        with self._free:
            while not self._idle:
                if self._closed:
                    raise EngineClosedError("the engine was closed")
                if cancel.is_set:
                    raise DecodeAborted
                if all(holder == me for holder in self._holders):
                    raise EngineBusyError(
                        "this thread is still streaming another answer of this engine: finish or close it first, "
                        "or load with conversations=2"
                    )
                self._free.wait(0.05)
            slot = max(self._idle, key=lambda s: common_prefix(s.safe.tokens, prompt))
            self._idle.remove(slot)
            self._holders.append(me)
        try:
            yield slot
        finally:
            with self._free:
                self._idle.append(slot)
                self._holders.remove(me)
                self._free.notify()

    def _extend(self, work: Sequence[tuple[Cache, Sequence[int]]], cancel: CancelToken) -> list[Logits]:
        with self._open():
            self._streams.resume()
            cancel.interrupting(self._streams.cancel)
            try:
                if cancel.is_set:
                    raise DecodeAborted
                return extend(work)
            except DecodeAborted:
                self._check_open()
                raise
            finally:
                cancel.interrupting(None)

    def _prefill(self, slot: Slot, prompt: Prompt, cancel: CancelToken) -> tuple[tuple[Logits, Logits | None], int]:
        """Logits after the prompt, and how many rows were decoded for them."""
        work: list[tuple[Cache, Sequence[int], Sequence[int]]] = [(slot.safe, prompt.safe, prompt.safe_prefix)]
        if prompt.adversarial is not None:
            work.append((slot.adversarial, prompt.adversarial, prompt.adversarial_prefix))
        rows = 0

        def counted(items: Sequence[tuple[Cache, Sequence[int]]]) -> list[Logits]:
            nonlocal rows
            rows += sum(len(tokens) for _, tokens in items)
            return self._extend(items, cancel)

        with self._open():
            self._prefixes.prepare(work, counted)
        logits = counted([(cache, tokens[len(cache.tokens) :]) for cache, tokens, _ in work])
        return (logits[0], logits[1] if len(logits) > 1 else None), rows

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the engine open: everything that touches llama.cpp's memory runs inside."""
        with self._lock:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine was closed")

    def _resolve_pair(self, pair: PromptPair | str | None) -> PromptPair:
        if pair is None:
            return pairs.best_for(self.info)
        found = pairs.find(pair) if isinstance(pair, str) else pair
        return found


class AnswerStream:
    """One answer while it is made: iterate for text chunks, then read `answer`.

    Closing it early (close(), a `with` block, or dropping it) stops decoding and frees its slot.
    """

    def __init__(
        self,
        engine: Engine,
        turns: Sequence[Message],
        options: Options,
        system: str | None,
        pair: PromptPair,
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
        self._divergence = divergence
        self._trace = trace
        self._on_event = on_event
        self._cancel = cancel
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed
        self.settings = resolve_contrast(options, pair)
        self._records: list[TokenRecord] = []
        self._text: list[str] = []
        self._divergences: list[float] = []
        self._answer: Answer | None = None
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def run(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Decode to the end, handing text to `on_text` as it comes."""
        for chunk in self:
            if on_text is not None:
                on_text(chunk.text)
        return self.answer

    @property
    def answer(self) -> Answer:
        """The finished answer; only there once the iteration ended.

        Raises:
            UsageError: it has not.
        """
        if self._answer is None:
            raise UsageError("the answer is not finished: iterate over the stream first")
        return self._answer

    @property
    def complete(self) -> bool:
        """Whether the answer came to its own end: not running, failed, closed or cancelled."""
        return self._answer is not None and self._answer.finish_reason != "cancelled"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def cancel(self) -> None:
        """End the answer within one decoding step, also during a long prompt. Safe from any thread."""
        self._cancel.set()

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> Generator[Chunk, None, None]:
        """Build the prompt, decode it, run the loop, turn tokens into text."""
        started = time.perf_counter()
        engine, options, settings = self._engine, self._options, self.settings
        gbnf = grammar.from_options(options, engine.info.path)
        with engine._open():
            prompt = engine._builder.build(
                self.pair,
                self._system,
                self._turns,
                contrast=settings.alpha > 0,
                max_tokens=options.max_tokens,
                overflow=options.overflow,
            )
        if prompt.dropped and self._on_event is not None:
            self._on_event(TurnsDropped(prompt.dropped))
        text = TextStream(options.stop)
        reason: FinishReason
        used, rows = (0, 0), 0
        first_logits = started
        try:
            with engine._slot(prompt.safe, self._cancel) as slot:
                first, rows = engine._prefill(slot, prompt, self._cancel)
                first_logits = time.perf_counter()
                steps = self._steps(slot, prompt, first, gbnf)
                while True:
                    with engine._open():
                        step = next(steps, None)
                        piece = b"" if step is None else self._record(step)
                        used = (len(slot.safe.tokens), len(slot.adversarial.tokens))
                    if step is None:
                        reason = "length" if len(self._records) >= prompt.room else "stop"
                        break
                    if step.ends:
                        reason = "stop"
                        break
                    if shown := text.push(piece):
                        self._text.append(shown)
                        yield Chunk(shown)
                    if text.stopped_by is not None:
                        reason = "stop_string"
                        break
        except DecodeAborted:
            reason = "cancelled"
        if rest := text.finish():
            self._text.append(rest)
            yield Chunk(rest)
        self._answer = self._finish(reason, prompt, used, rows, (started, first_logits, time.perf_counter()))

    def _steps(
        self, slot: Slot, prompt: Prompt, first: tuple[Logits, Logits | None], gbnf: str | None
    ) -> Iterator[Step]:
        engine = self._engine
        caches = [slot.safe] if prompt.adversarial is None else [slot.safe, slot.adversarial]

        def decode(token: int) -> tuple[Logits, Logits | None]:
            logits = engine._extend([(cache, [token]) for cache in caches], self._cancel)
            return logits[0], logits[1] if len(logits) > 1 else None

        return generate(
            first,
            decode,
            TokenSampler(engine.vocab, self._options, self.seed, prompt.safe),
            engine._vocabulary,
            self.settings,
            limit=prompt.room,
            grammar=None if gbnf is None else GrammarGuard(engine.vocab, gbnf),
            divergence=self._divergence,
            trace=self._trace,
        )

    def _record(self, step: Step) -> bytes:
        vocab = self._engine.vocab
        piece = b"" if step.ends else vocab.piece(step.token)
        safe_piece = piece if step.safe_choice == step.token else vocab.piece(step.safe_choice)
        self._records.append(
            TokenRecord(
                step.token,
                piece.decode("utf-8", "replace"),
                step.safe_choice,
                safe_piece.decode("utf-8", "replace"),
                step.trace,
            )
        )
        if step.divergence is not None:
            self._divergences.append(step.divergence)
        return piece

    def _finish(
        self,
        reason: FinishReason,
        prompt: Prompt,
        used: tuple[int, int],
        rows: int,
        times: tuple[float, float, float],
    ) -> Answer:
        started, first_logits, ended = times
        records, s = self._records, self.settings
        completion = sum(1 for r in records if r.token not in self._engine._vocabulary.eog)
        seconds = ended - first_logits if records else 0.0
        return Answer(
            text=self.text,
            finish_reason=reason,
            prompt_tokens=len(prompt.safe),
            completion_tokens=completion,
            seed=self.seed,
            contrast=ContrastStats(
                alpha=s.alpha,
                beta=s.beta,
                raw=s.raw,
                positions=len(records),
                changed=sum(r.changed for r in records),
                mean_divergence=sum(self._divergences) / len(self._divergences) if self._divergences else None,
            ),
            timings=Timings(
                prompt_tokens=rows,
                prompt_seconds=(first_logits if records else ended) - started,
                answer_seconds=seconds,
                tokens_per_second=len(records) / seconds if len(records) > 1 and seconds > 0 else 0.0,
            ),
            context_used=used,
            dropped_turns=prompt.dropped,
            tokens=tuple(records),
        )


def resolve_contrast(options: Options, pair: PromptPair) -> ContrastSettings:
    """Which numbers apply: the option, else the pair's, else the default; `plain` is the safe prompt alone."""
    if options.plain:
        return ContrastSettings(0.0, 0.0)
    alpha = next(v for v in (options.alpha, pair.alpha, pairs.DEFAULT_ALPHA) if v is not None)
    beta = next(v for v in (options.beta, pair.beta, pairs.DEFAULT_BETA) if v is not None)
    return ContrastSettings(float(alpha), float(beta), options.raw_contrast)


def check_messages(messages: Any) -> None:
    """Whether `messages` can be given to `Engine.generate`.

    Raises:
        UsageError: they cannot.
    """
    _turns(messages)


def _turns(messages: Sequence[Message | Mapping[str, str]] | str) -> tuple[list[Message], str | None]:
    """User and assistant turns, and the system message if one comes first."""
    if isinstance(messages, str):
        return [Message("user", messages)], None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError("messages must be a non-empty list of {role, content}")
    turns = [m if isinstance(m, Message) else _message(m) for m in messages]
    system = turns.pop(0).content if turns[0].role == "system" else None
    if any(turn.role == "system" for turn in turns):
        raise UsageError("only the first message may have the role 'system'")
    return turns, system


def _message(raw: Mapping[str, Any]) -> Message:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("content"), str):
        raise UsageError("each message must be an object with a role and a text content")
    role = raw.get("role")
    if role not in ("system", "user", "assistant"):
        raise UsageError(f"a message's role must be system, user or assistant, not {role!r}")
    return Message(role, raw["content"])


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a whole number >= 1, not {value!r}")


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """llama.cpp must be released before the interpreter tears down what its callbacks use."""
    for engine in list(_open_engines):
        engine.close()
