"""An engine holds a model and its two-stream caches and answers conversations."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

from acd_local import pairs, vectors
from acd_local.answers import OnEvent
from acd_local.chat import Chat
from acd_local.errors import (
    EngineBusyError,
    EngineClosedError,
    ModelError,
    PairError,
    UsageError,
    printable,
)
from acd_local.gate import Gate
from acd_local.gating import Conversation, Gating, read_parts
from acd_local.generation import Answering, AnswerStream, PromptMeter
from acd_local.models import resolve as resolve_model
from acd_local.options import ENGINE_RANGES, Options, refuse_unknown
from acd_local.pairs import PromptPair
from acd_local.runtime import llama, probe, rowcosts
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.choice import Vocabulary
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.lifetime import CLOSED
from acd_local.runtime.llama import DecodeAborted, Logits
from acd_local.runtime.prefixes import PrefixStore, common_prefix
from acd_local.runtime.prompts import Framing, Prompt, PromptBuilder
from acd_local.runtime.reading import Reader, read_at_once
from acd_local.runtime.rowcosts import MOST, RowClock
from acd_local.runtime.streams import Cache, Feed, Layout, Rows, Slot, Streams, extend
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.runtime.threads import default_threads
from acd_local.softpair import SoftPair
from acd_local.vectors import Vectors

DEFAULT_CTX_SIZE = 4096
FEW = 2  # conversations whose safe streams may run ahead; more are decoded together

# Never sampled unless they end the answer.
_NOT_TEXT = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED


class Engine:
    """A model, loaded once, that answers by contrasting two streams. Safe to use from several threads.

    Args:
        model: path of a GGUF file, "demo", or "hf:owner/repo/file.gguf".
        pair: a prompt pair or its name or path; "as-is": none, the model answers under its template's own system
            prompt. None takes a pair that is fitted to this model; where there is none, a check of some seconds, once
            per model, decides between the pair `default` and none. The check is made too, for a warning, where a pair
            is named that is not fitted to the model; a `PromptPair` is taken as it comes.
        ctx_size: tokens that each stream holds; None means 4096, or the model's own limit if that is smaller.
        conversations: how many conversations may be decoded at once; each costs two streams of KV memory.
        layout: "shared" decodes both streams in one llama_context, "split" gives each stream its own.
        kv_type: "f16" or "q8_0".
        threads: CPU threads; None means $ACD_THREADS, or the physical cores.
        gpu_layers: None offloads everything where the build can, nothing elsewhere.
        system_apart: True: every answer begins at its system prompt, which was decoded alone, so that it does not
            depend on those before it (nor beside it, but for near-ties); a conversation's earlier turns are decoded
            anew each time. False decodes a first prompt in one go, as llama.cpp does, and keeps what a prompt has in
            common with the last one. None: as False; where there are several conversations, system prompts are decoded
            alone.
        soft: use the pairs' soft prompts (NAME.safetensors beside NAME.toml) instead of their texts, in every answer;
            False: their texts. None: what each pair prefers on a model that it is fitted to.
        on_progress: told how much of the model is loaded, from 0 to 1: 0 once it is found, which may stand for long
            where a file is new and is checked first. What it raises ends the loading.
        on_check: told how far the check of the pair is, from 0 to 1, before the loading. What it raises ends both.

    Attributes:
        pair: the prompt pair in use; None: the model answers as it is.
        fitted: whether that pair is fitted to this model.
        soft: as given.
        info: what the model file's header says. n_params: how many weights it has.
        n_ctx: tokens that each stream holds.
        can_defer: whether the safe stream can run ahead: caches can forget their last tokens.

    Raises:
        ModelError, PairError, UsageError, OutOfMemoryError.
    """

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Python's own answer to an unknown name is a TypeError without a hint."""
        known = inspect.signature(cls.__init__).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in known.values()):
            refuse_unknown(given, known)
        return super().__new__(cls)

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
        system_apart: bool | None = None,
        soft: bool | None = None,
        on_progress: Callable[[float], object] | None = None,
        on_check: Callable[[float], object] | None = None,
    ) -> None:
        _check_counts(ctx_size=ctx_size, conversations=conversations, threads=threads)
        self.threads = threads or default_threads()
        path = resolve_model(str(model))
        if on_progress is not None:
            on_progress(0.0)
        self.info = probe.verify(path)
        self.soft = soft
        self._vectors: dict[tuple[object, ...], Vectors] = {}
        self._lock = threading.RLock()
        self.pair = self._first_pair(pair)  # what is wrong with it is said before the model is loaded
        self._found = self._check_pair(pair, on_check, threads=threads, gpu_layers=gpu_layers)
        self.fitted = self.pair is not None and pairs.fitted(self.pair, self.info)
        self._model = llama.Model(self.info.path, gpu_layers=gpu_layers, on_progress=on_progress)
        try:
            self.n_params = self._model.n_params
            limit = self._model.n_ctx_train
            self.n_ctx = ctx_size or (min(DEFAULT_CTX_SIZE, limit) if limit > 0 else DEFAULT_CTX_SIZE)
            self.template = ChatTemplate(self._model)
            self.vocab = self._model.vocab
            self._vocabulary = Vocabulary(self.vocab, _NOT_TEXT)
            self._builder = PromptBuilder(self.template, self.n_ctx, self._model.rows)
            self._soft_of(self.pair)
            self._streams = Streams(
                self._model,
                n_ctx=self.n_ctx,
                conversations=conversations,
                layout=layout,
                kv_type=kv_type,
                threads=self.threads,
                lock=self._lock,
                # A run has MOST tokens at most, drafts from the conversation included.
                outputs=MOST if conversations <= FEW else 1,
            )
        except BaseException:
            self._model.close()
            raise
        rewinds = not self._model.keeps_state and self._model.n_swa == 0
        self.can_defer = rewinds and conversations <= FEW
        self._reader: Reader | None = None
        self._kv_type = kv_type
        # Where the size of a context decides how positions turn, the reader's is the streams'.
        by_size = self._model.metadata(f"{self.info.architecture}.rope.scaling.original_context_length")
        self._read_tokens = min(read_at_once(self._streams.contexts[0].n_seq), self.n_ctx)
        self._read_ctx = self.n_ctx if by_size else self._read_tokens
        self._read_builder = PromptBuilder(self.template, self._read_tokens, self._model.rows)
        self._row_clock = RowClock(
            rowcosts.file_for(
                self.info.path,
                threads=self.threads,
                kv=kv_type,
                layout=layout,
                gpu=gpu_layers,
                offload=llama.supports_gpu_offload(),
            )
        )
        several = conversations > 1 if system_apart is None else False
        self._prefixes = PrefixStore(eager=several or not rewinds, exact=system_apart is True)
        self._open = _Open(self)
        self._free = threading.Condition()
        self._idle: list[Slot] = list(self._streams.slots)
        self._holders: list[int] = []  # thread ids of running answers
        self._closed = False

    @property
    def warning(self) -> str | None:
        """Something about model and pair that the user should know, one line."""
        notes = [self.template.warning]
        if 0 < self._model.n_ctx_train < self.n_ctx:
            notes.append(f"the model was trained for {self._model.n_ctx_train} tokens, not {self.n_ctx}")
        if self.pair is not None and not pairs.fits(self.pair, self.info):
            notes.append(f"the prompt pair {self.pair.name!r} was made for another model")
        notes.append(self._found)
        return "; ".join(filter(None, notes)) or None

    def generate(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        options: Options | None = None,
        *,
        system: str | None = None,
        pair: PromptPair | str | None = None,
        framing: Framing | None = None,
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
            pair: another pair for this answer; "as-is": none.
            framing: other texts around the conversation than the pair's two prompts, for comparing methods. The pair's
                gate is then asked only where options.gate is True.
            divergence: measure KL(S || A) at every position (some passes over the vocabulary per token).
            trace: record how the safe stream alone saw every token, and tell `on_event` of each.
            on_event: called, by whoever decodes, when turns had to be dropped (TurnsDropped), before every batch of the
                prompt (PromptProgress), when the pair's gate decided (GateDecision), and with `trace` for every sampled
                token (TokenRecord). It should return soon, and must not use the engine.
            cancel: set it to stop the answer from elsewhere; by default the stream has its own.

        Returns:
            An iterator over pieces of text, each a string. Decoding starts with the first `next`, errors of the
            conversation (UsageError, ContextError) come from there.
        """
        turns, own_system = _turns(messages)
        if own_system is not None and system is not None:
            raise UsageError("give the system prompt as `system` or as the first message, not both")
        chosen = self.pair if pair is None else _resolve_pair(pair)
        options = options or Options()
        gating = None if framing is not None and not options.gate else self._gating(chosen, options)
        soft = self.takes_soft(chosen)
        if framing is None:
            framing = Framing.of(chosen, self._soft_of(chosen))
        elif framing.negative is not None and chosen is None:
            raise UsageError("a framing with a negative prompt takes its numbers from a pair: give `pair`")
        work = Answering(
            self,
            turns,
            options,
            system if own_system is None else own_system,
            chosen,
            framing,
            soft,
            gating,
            divergence,
            trace,
            on_event,
            cancel or CancelToken(),
        )
        return AnswerStream(work)

    def gate_probability(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        *,
        system: str | None = None,
        pair: PromptPair | str | None = None,
    ) -> float:
        """How likely a conversation's last message asks for harm, in [0, 1], as the pair's gate reads it.

        Args:
            messages, system, pair: as in `generate`.

        Raises:
            PairError: the pair has no gate.
            UsageError, ContextError, ModelError: the conversation, or the model, cannot be read.
        """
        self._check_open()
        turns, own_system = _turns(messages)
        system = system if own_system is None else own_system
        chosen = self.pair if pair is None else _resolve_pair(pair)
        gating = self._gating(chosen, Options(gate=True))
        assert gating is not None
        prompt = self._builder.build(gating.base, system, turns, contrast=False, max_tokens=1, overflow="drop")
        with self._reading(gating.gate, []) as reader:
            return read_parts(self, reader, gating, Conversation(system, turns, prompt))

    def chat(
        self,
        *,
        system: str | None = None,
        options: Options | None = None,
        pair: PromptPair | str | None = None,
    ) -> Chat:
        """A conversation that remembers its turns; any number of them share the engine."""
        chosen = self.pair if pair is None else _resolve_pair(pair)
        return Chat(self, system=system, options=options, pair=chosen)

    def takes_soft(self, pair: PromptPair | None) -> bool:
        """Whether answers with a pair are made with its soft prompts."""
        if pair is None or self.soft is not None:
            return bool(pair and self.soft)
        return pair.soft_preferred and pairs.fitted(pair, self.info)

    def soft_pair(self, pair: PromptPair | None = None) -> SoftPair:
        """The soft prompts beside a pair (None: the engine's), checked against the model; read once per file.

        Raises:
            PairError: the pair has none, or they are broken or made for another model.
        """
        self._model.owned.check()
        wanted = self.pair if pair is None else pair
        if wanted is None:
            raise PairError("no prompt pair is in use, so there are no soft prompts: name a pair that has some")
        found = self._read_soft(wanted)
        self._builder.keep_negative(found.adversarial)
        return found

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Free model and caches. Answers that are still being streamed end with EngineClosedError.

        In a forked child this does nothing.
        """
        if self._closed or self._model.owned.foreign:
            return
        self._closed = True
        self._interrupt()
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            self._streams.close()
            self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError("an engine cannot be copied or sent to another process: load it where it is used")

    # -- used by AnswerStream -----------------------------------------------------------------------------------------

    @property
    def _has_free_slot(self) -> bool:
        return bool(self._idle)

    @contextmanager
    def _slot(self, prompt: Prompt, cancel: CancelToken) -> Iterator[Slot]:
        """The free slot that fits `prompt` best; waits for one unless this thread holds them all."""
        me = threading.get_ident()
        with self._free:
            while not self._idle:
                self._check_not_closed()
                if cancel.is_set:
                    raise DecodeAborted
                if all(holder == me for holder in self._holders):
                    raise EngineBusyError(
                        "this thread is still streaming another answer of this engine: finish or close it first, "
                        "or load with conversations=2"
                    )
                self._free.wait(0.05)
            slot = max(self._idle, key=lambda s: _gain(s.safe.tokens, prompt))  # of equals the longest unused
            self._idle.remove(slot)
            self._holders.append(me)
        try:
            yield slot
        finally:
            if not self._model.owned.foreign:  # there the lock may be held by a thread that did not come along
                with self._free:
                    self._idle.append(slot)
                    self._holders.remove(me)
                    self._free.notify()

    def _extend(self, work: Rows, cancels: Sequence[CancelToken], meter: PromptMeter | None = None) -> list[Logits]:
        """`streams.extend`, stopped by any of `cancels`."""
        with self._decoding(cancels):
            return self._timed(work, meter)

    @contextmanager
    def _decoding(self, cancels: Sequence[CancelToken]) -> Iterator[None]:
        """The engine, held open for decoding that any of `cancels` stops."""
        with self._open, ExitStack() as stack:
            for cancel in cancels:
                stack.enter_context(cancel.interrupting(self._interrupt))
            self._streams.resume()
            if self._reader is not None:
                self._reader.resume()
            self._check_not_closed()  # close() may have asked for a stop just before
            if any(cancel.is_set for cancel in cancels):
                raise DecodeAborted
            try:
                yield
            except DecodeAborted:
                self._check_not_closed()
                raise

    def _interrupt(self) -> None:
        self._streams.cancel()
        if (reader := self._reader) is not None:
            reader.cancel()

    @contextmanager
    def _reading(self, gate: Gate, cancels: Sequence[CancelToken]) -> Iterator[Reader]:
        """The engine, held open as by `_decoding`, and what reads its states; that is made when it is first needed."""
        with self._decoding(cancels):
            if self._reader is None or self._reader.layers != gate.layers:
                if self._reader is not None:
                    self._reader.close()
                self._reader = None
                self._reader = Reader(
                    self._model,
                    gate.layers,
                    n_ctx=self._read_ctx,
                    at_once=self._read_tokens,
                    threads=self.threads,
                    kv_type=self._kv_type,
                    n_seq=self._streams.contexts[0].n_seq,
                    lock=self._lock,
                )
            try:
                yield self._reader
            except ModelError as error:
                raise ModelError(f"{error}; --gate off (gate=False) does without") from None

    def _gating(self, pair: PromptPair | None, options: Options) -> Gating | None:
        settings = None if pair is None else pair.gate
        if options.gate is False or (settings is None and not options.gate):
            return None
        if pair is None or settings is None:
            name = "no pair is in use" if pair is None else f"pair {pair.name!r} has no gate"
            raise PairError(f"{name}: leave --gate on out, or make a gate with acd fit")
        if options.gate_threshold is not None:
            settings = replace(settings, threshold=options.gate_threshold)
        return Gating(self._read_gate(pair), settings)

    def _timed(self, work: Rows, meter: PromptMeter | None) -> list[Logits]:
        contexts = self._streams.contexts
        before = sum(context.seconds for context in contexts)
        logits = extend(work, meter)
        lengths = {len(feed.tokens) for feed in work}
        if len(work) <= 2 and len(lengths) == 1:
            self._row_clock.note(len(work), lengths.pop(), sum(context.seconds for context in contexts) - before)
        return logits

    def _prepare(
        self, work: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], cancel: CancelToken, meter: PromptMeter
    ) -> Rows:
        """What is left to decode of a prompt, after a new system prompt where that is decoded alone.

        Args:
            work: see `PrefixStore.prepare`.
        """

        def counted(items: Rows) -> None:
            self._extend(items, [cancel], meter)
            meter.settle(items)

        with self._open:
            self._prefixes.prepare(work, counted)
        return [Feed(cache, tokens[len(cache.tokens) :]) for cache, tokens, _ in work]

    def _check_open(self) -> None:
        """Whether an answer can be begun: not after `close`, nor in a forked child, nor while the process ends."""
        self._check_not_closed()
        self._model.owned.check()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise EngineClosedError(CLOSED)

    def _first_pair(self, pair: PromptPair | str | None) -> PromptPair | None:
        """The pair that is asked for, its soft prompts read where they are taken; or the fitted one."""
        found = pairs.best_for(self.info) if pair is None else _resolve_pair(pair)
        if found is None and pair is None and self.soft:
            raise PairError(
                f"no prompt pair was made for {_model_name(self.info)}, so there are no soft prompts: leave --soft "
                "out, or make a pair with acd optimize"
            )
        if found is not None and self.takes_soft(found):
            self._read_soft(found)
        return found

    def _check_pair(
        self, asked: PromptPair | str | None, on_check: Callable[[float], object] | None, **settings: Any
    ) -> str | None:
        """Choose between `default` and none where no pair is fitted; a line about what was found."""
        from acd_local import quickcheck  # which uses engines itself

        if asked == pairs.AS_IS or isinstance(asked, PromptPair):
            return None
        given: dict[str, Any] = {"soft": self.soft, "on_check": on_check, **settings}
        if self.pair is not None:
            if pairs.fitted(self.pair, self.info):
                return None
            verdict = quickcheck.check(self.info, self.pair, **given)
            return f"the pair {self.pair.name!r} does harm to this model ({verdict})" if verdict.harms else None
        lead = f"no prompt pair was made for {_model_name(self.info)}"
        default = next((pair for pair in pairs.available() if pair.name == pairs.DEFAULT), None)
        if default is None:
            return f"{lead}: it answers as it is; acd fit makes a pair"
        verdict = quickcheck.check(self.info, default, asked=False, **given)
        if verdict.helps:
            self.pair = default
            return f"{lead}: the pair {default.name!r} is used ({verdict}); acd fit makes a better one"
        return f"{lead}: it answers as it is ({verdict}); acd fit makes a pair"

    def _soft_of(self, pair: PromptPair | None) -> SoftPair | None:
        return self.soft_pair(pair) if self.takes_soft(pair) else None

    def _read_soft(self, pair: PromptPair) -> SoftPair:
        found = None if pair.vectors_path is None else self._read_vectors(pair, pair.vectors_path).soft
        if found is None:
            raise PairError(
                f"pair {pair.name!r} has no soft prompts ({pair.name}.safetensors beside it): take --no-soft, or make "
                "them with acd optimize"
            )
        return found

    def _read_gate(self, pair: PromptPair) -> Gate:
        found = None if pair.vectors_path is None else self._read_vectors(pair, pair.vectors_path).gate
        if found is None:
            raise PairError(
                f"pair {pair.name!r} has a [gate], but no {pair.name}.safetensors beside it with one: copy both files "
                "again, or make them with acd fit"
            )
        return found

    def _read_vectors(self, pair: PromptPair, path: Path) -> Vectors:
        """What stands beside a pair, checked against the model; read once per file."""
        seen = path.stat() if path.exists() else None
        key = (path, pair.sha256, seen and seen.st_mtime_ns, seen and seen.st_size)
        if key not in self._vectors:
            found = vectors.load(path, sha256=pair.sha256)
            for part in (found.soft, found.gate):
                if part is not None:
                    part.check(self.info)
            self._vectors[key] = found
        return self._vectors[key]


def measured_pair(model: str | Path, name: str | None = None) -> PromptPair:
    """The pair that a measurement takes: the named one, else the fitted one, else `default`, whatever it does.

    Raises:
        ModelError, PairError.
    """
    if name is not None:
        return pairs.find(name)
    return pairs.best_for(probe.verify(resolve_model(str(model)))) or pairs.find(pairs.DEFAULT)


def _resolve_pair(pair: PromptPair | str) -> PromptPair | None:
    if isinstance(pair, PromptPair):
        return pair
    return None if pair == pairs.AS_IS else pairs.find(pair)


def _model_name(info: GGUFInfo) -> str:
    return printable(info.name or info.path.name)[:80]


def _gain(held: Sequence[int], prompt: Prompt) -> tuple[int, int]:
    """What continuing in a slot saves, less what it forgets, in tokens; a system prompt is cheap to restore."""
    common = common_prefix(held, prompt.safe)
    return max(0, common - len(prompt.safe_prefix)) - (len(held) - common), common


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


class _Open:
    """`with engine._open:` holds the engine open: everything that touches llama.cpp's memory runs inside."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._lock = engine._lock

    def __enter__(self) -> None:
        engine = self._engine()
        if engine is not None and engine._model.owned.foreign:
            engine._check_open()  # instead of waiting for a lock that nobody releases here
        self._lock.acquire()
        if engine is None or engine._closed:
            self._lock.release()
            raise EngineClosedError(CLOSED)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        low, high = ENGINE_RANGES[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
