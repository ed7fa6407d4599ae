"""Decodes the rows that a model's answers ask for, one caller at a time.

A `Decoder` owns everything that answers share: the two-stream caches of every conversation (slots), the lock around
llama.cpp's memory, the system prompts that were decoded before, the context that reads hidden states, and the model
that drafts. It knows token ids and logits, no text and no pair.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from acd_local.errors import EngineBusyError, EngineClosedError
from acd_local.options import MAX_DRAFT
from acd_local.runtime import batch_costs, llama
from acd_local.runtime.apart import Apart, Beside, Kind
from acd_local.runtime.batch_costs import BatchCosts
from acd_local.runtime.cancel import CancelToken, Interrupting
from acd_local.runtime.draft_model import DraftModel
from acd_local.runtime.drafts import ModelDrafts, PromptLookup, Source
from acd_local.runtime.lifetime import CLOSED
from acd_local.runtime.llama import DecodeAborted, Logits
from acd_local.runtime.prefixes import PrefixStore, common_prefix
from acd_local.runtime.reading import Reader, read_at_once
from acd_local.runtime.states import StateStore
from acd_local.runtime.streams import Cache, DecodeBatch, DecodeRequest, Layout, Slot, Streams, extend

DRAFTING = 2  # conversations that may be drafted for; more are decoded together


class Decoder:
    """The caches of a model's conversations, and the only way to decode into them. Safe to use from several threads.

    Args:
        n_ctx: tokens per stream.
        conversations: how many answers can be made at once.
        slots: conversations whose caches are kept, two streams of KV memory each; None: as many as answers.
        layout, kv_type: see `streams.Streams` and `llama.Context`.
        system_apart: None: system prompts are decoded alone, once. True: and every prompt begins there. False: a first
            prompt is decoded in one go.
        states: where states are kept beyond this process; only where `system_apart` is None.
        costs: where it is kept what batches cost, see `batch_costs.file_for`. It is measured where it is not known.

    Attributes:
        model: the model that is decoded. It is closed with the decoder.
        conversations: as given.
        slots: the two streams of every conversation that is kept.
        contexts: the llama_contexts that hold them.
        can_draft: whether tokens can be drafted: caches can forget their last ones.
        costs: what batches cost, by which drafts are made.
        prefixes: system prompts that were decoded; to be used inside `open` alone.
        reader_tokens: how many tokens of a conversation are read at once, see `reading`.

    Raises:
        UsageError, OutOfMemoryError: see `llama.Context`.
    """

    def __init__(
        self,
        model: llama.Model,
        *,
        n_ctx: int,
        conversations: int = 1,
        slots: int | None = None,
        layout: Layout = "shared",
        kv_type: str = "f16",
        threads: int = 1,
        system_apart: bool | None = None,
        states: StateStore | None = None,
        costs: Path,
    ) -> None:
        self.model = model
        self.n_ctx = n_ctx
        self.conversations = conversations
        self.threads = threads
        self._kv_type = kv_type
        self._lock = threading.RLock()
        self.can_draft = model.rewinds and conversations <= DRAFTING
        self._streams = Streams(
            model,
            n_ctx=n_ctx,
            conversations=slots or conversations,
            layout=layout,
            kv_type=kv_type,
            threads=threads,
            lock=self._lock,
            outputs=1 + MAX_DRAFT if self.can_draft else 1,
        )
        self.slots, self.contexts = self._streams.slots, self._streams.contexts
        eager = system_apart is not False or not model.rewinds
        self.prefixes = PrefixStore(eager=eager, exact=system_apart is True, disk=states)
        self.reader_tokens = min(read_at_once(self.contexts[0].n_seq), n_ctx)
        self._reader: Reader | None = None
        self._apart: list[Apart] = []
        self._free = threading.Condition()
        self._idle = list(self.slots)
        self._asked: dict[Slot, Sequence[int]] = {}  # the prompt that a slot was taken for last
        self._holders: list[int] = []  # thread ids of running answers
        self._closed = False
        self._draft: DraftModel | None = None
        self._costs_file = costs
        self.costs = batch_costs.TYPICAL
        if self.can_draft:
            self.costs = batch_costs.kept(costs) or self.calibrate()

    # -- open and closed -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def check_open(self) -> None:
        """Refuse to begin an answer that cannot be made; never waits.

        Raises:
            EngineClosedError: the decoder was closed, this is a forked child, or the process is ending.
        """
        self._check_not_closed()
        self.model.owned.check()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise EngineClosedError(CLOSED)

    def open(self) -> AbstractContextManager[None]:
        """Keep others from decoding and from closing: whatever touches llama.cpp's memory runs inside.

        Raises:
            EngineClosedError: on entry, see `check_open`.
        """
        return _Open(self)

    def close(self) -> None:
        """Free caches and model, conversations kept on disk where they are to be; nothing in a forked child.

        Answers that are being made end with EngineClosedError.
        """
        if self._closed or self.model.owned.foreign:
            return
        self._closed = True
        self._interrupt()
        with self._lock:
            self._keep_all()
            for beside in self._beside():
                beside.close()
            self._streams.close()
            self.model.close()

    # -- slots ---------------------------------------------------------------------------------------------------------

    @property
    def has_free_slot(self) -> bool:
        """Whether `slot` would not wait."""
        return bool(self._idle)

    @contextmanager
    def slot(self, tokens: Sequence[int], prefix: Sequence[int], cancel: CancelToken) -> Iterator[Slot]:
        """Take the free slot that fits a safe stream's prompt best; waits for one.

        Args:
            tokens, prefix: the prompt, and its system prompt.

        Raises:
            EngineBusyError: this thread itself holds them all.
            EngineClosedError: the decoder was closed meanwhile.
            llama.DecodeAborted: `cancel` was set meanwhile.
        """
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
                self._free.wait(0.05)  # then look again: a cancel that is set notifies nobody
            # Of equals the longest unused.
            slot = max(self._idle, key=lambda idle: self._spared(idle, tokens, prefix))
            self._idle.remove(slot)
            self._holders.append(me)
        try:
            if self.prefixes.keeps_conversations and not self._spared(slot, tokens, prefix):
                with self.open():
                    self.prefixes.keep((slot.safe, slot.adversarial))
            self._asked[slot] = tokens
            yield slot
        finally:
            if not self.model.owned.foreign:  # there the lock may be held by a thread that did not come along
                with self._free:
                    self._idle.append(slot)
                    self._holders.remove(me)
                    self._free.notify()
                if not sys.is_finalizing():  # where nothing can be imported any more
                    self.prefixes.flush()

    def _spared(self, slot: Slot, tokens: Sequence[int], prefix: Sequence[int]) -> int:
        """Count the tokens that a slot spares a prompt; where a gate decides, it may hold an answer to another one."""
        return max(_kept(held, tokens, prefix) for held in (slot.safe.tokens, self._asked.get(slot, ())))

    def _keep_all(self) -> None:
        """Keep what is held of conversations, and new system prompts, beyond this process."""
        self.prefixes.flush()
        if self.prefixes.keeps_conversations:
            self.prefixes.keep(cache for slot in self.slots for cache in (slot.safe, slot.adversarial))
            if self._reader is not None:
                with suppress(EngineClosedError):  # the process is ending
                    self._reader.forget_parts()
                    self.prefixes.keep([self._reader.cache])

    # -- decoding ------------------------------------------------------------------------------------------------------

    @property
    def resumes_prompts(self) -> bool:
        """Whether a prompt that another answer's cancel interrupted can go on in the batches that it would have had."""
        return len(self.contexts) == 1 and not self.model.keeps_state

    def extend(
        self,
        work: DecodeBatch,
        cancels: Sequence[CancelToken],
        meter: PromptMeter | None = None,
        *,
        views: bool = False,
    ) -> list[Logits]:
        """Decode rows, stopped by any of `cancels`; see `streams.extend`.

        Args:
            meter: counts the rows.
            views: see `streams.extend`.

        Raises:
            EngineClosedError, ContextError, llama.DecodeAborted.
        """
        with self._decoding(cancels):
            return extend(work, meter, views=views)

    def prepare(
        self, work: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], cancel: CancelToken, meter: PromptMeter
    ) -> DecodeBatch:
        """Bring caches as far as they come without a prompt's new part, and return the rows that are left to decode.

        Args:
            work: see `PrefixStore.prepare`; a new system prompt may be decoded here. Caches of another kind begin anew.
            meter: counts what is decoded here.

        Raises:
            EngineClosedError, ContextError, llama.DecodeAborted.
        """

        def counted(rows: DecodeBatch) -> None:
            self.extend(rows, [cancel], meter)
            meter.settle(rows)

        with self.open():
            ours = [item for item in work if item[0].context in self.contexts]
            self.prefixes.prepare(ours, counted)
            for cache, _, _ in work:
                if cache.context not in self.contexts:
                    cache.clear()
        return [DecodeRequest(cache, tokens[len(cache.tokens) :]) for cache, tokens, _ in work]

    @contextmanager
    def reading(self, layers: tuple[int, ...], cancels: Sequence[CancelToken]) -> Iterator[Reader]:
        """Keep the decoder open and lend what reads the states of some layers; it is made when it is first needed.

        Args:
            cancels: any of them stops it.

        Raises:
            OutOfMemoryError, EngineClosedError, llama.DecodeAborted.
        """
        with self._decoding(cancels):
            if self._reader is None or self._reader.layers != layers:
                if self._reader is not None:
                    self._reader.close()
                self._reader = None
                self._reader = Reader(
                    self.model,
                    layers,
                    # Where the size of a context decides how positions turn, the reader's is the streams'.
                    n_ctx=self.n_ctx if self.model.rope_by_n_ctx else self.reader_tokens,
                    at_once=self.reader_tokens,
                    threads=self.threads,
                    kv_type=self._kv_type,
                    n_seq=self.contexts[0].n_seq,
                    lock=self._lock,
                )
            yield self._reader

    def apart(self, kind: Kind, slot: Slot) -> Cache:
        """Lend a slot's cache in a context of another kind, which is made when it is first needed.

        Raises:
            ModelError, OutOfMemoryError, EngineClosedError.
        """
        return self.open_apart(kind).caches[self.slots.index(slot)]

    def open_apart(self, kind: Kind) -> Apart:
        """Make a context of another kind where there is none yet.

        Raises:
            ModelError, OutOfMemoryError, EngineClosedError.
        """
        with self.open():
            found = next((one for one in self._apart if one.kind is kind), None)
            if found is None:
                settings: dict[str, Any] = {"kv_type": self._kv_type, "threads": self.threads, "lock": self._lock}
                found = Apart(kind, self.model, n_ctx=self.n_ctx, slots=len(self.slots), **settings)
                self._apart.append(found)
            return found

    def close_apart(self, kind: Kind) -> None:
        """Free the context of another kind, in which no answer is being made."""
        with self.open():
            for one in [one for one in self._apart if one.kind is kind]:
                self._apart.remove(one)
                one.close()

    # -- drafts --------------------------------------------------------------------------------------------------------

    def calibrate(self) -> BatchCosts:
        """Measure what batches cost here and now, and keep it. A slot's conversation is forgotten.

        Raises:
            EngineBusyError, EngineClosedError: see `slot`.
        """

        def decode(streams: int, rows: int) -> None:
            caches = (slot.safe, slot.adversarial)[:streams]
            extend([DecodeRequest(cache, [0] * rows, [True] * rows) for cache in caches])
            for cache in caches:
                cache.clear()

        with self.slot((), (), CancelToken()) as slot, self.open():
            for cache in (slot.safe, slot.adversarial):
                cache.clear()
            self.costs = batch_costs.keep(
                self._costs_file, batch_costs.measure(decode, followers=batch_costs.followers())
            )
        return self.costs

    def draft_by(self, model: llama.Model, costs: Path) -> None:
        """Let another model draft, which is closed with the decoder, also where it is refused.

        Args:
            costs: where it is kept what its rows cost.

        Raises:
            ModelError, OutOfMemoryError: see `DraftModel`.
        """
        self._draft = DraftModel(
            model,
            n_vocab=self.model.n_vocab,
            n_ctx=self.n_ctx,
            conversations=len(self.slots),
            kv_type=self._kv_type,
            threads=self.threads,
            costs=costs,
            lock=self._lock,
        )

    def draft_sources(self, slot: Slot, conversation: Sequence[int], cancel: CancelToken) -> list[Source]:
        """List what can draft for a slot's answer.

        Args:
            conversation: the safe stream's tokens so far.
            cancel: stops a model that drafts.
        """
        sources: list[Source] = [PromptLookup(conversation)]
        if (model := self._draft) is not None:
            number = self.slots.index(slot)

            def propose(tokens: Sequence[int], count: int) -> Sequence[int]:
                with self._decoding([cancel]):
                    return model.propose(number, tokens, count)

            sources.append(ModelDrafts(propose, model.seconds / self.costs.seconds, conversation))
        return sources

    # -- who may decode ------------------------------------------------------------------------------------------------

    def _decoding(self, cancels: Sequence[CancelToken]) -> AbstractContextManager[None]:
        """Do what `open` does, where any of `cancels` stops the decoding."""
        return _Decoding(self, cancels)

    def _interrupt(self) -> None:
        self._streams.cancel()
        for beside in self._beside():
            beside.cancel()

    def _beside(self) -> list[Beside]:
        """List what else decodes, in contexts of its own."""
        return [beside for beside in (self._reader, self._draft, *self._apart) if beside is not None]


class _Open(AbstractContextManager[None]):
    """Holds a decoder open. A generator would take some ten times as long to enter and leave, at every token."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __enter__(self) -> None:
        decoder = self._decoder
        if decoder.model.owned.foreign:
            decoder.check_open()  # instead of waiting for a lock that nobody releases here
        decoder._lock.acquire()
        if decoder._closed:
            decoder._lock.release()
            raise EngineClosedError(CLOSED)

    def __exit__(self, *_: object) -> None:
        self._decoder._lock.release()


class _Decoding(_Open):
    """Holds a decoder open, and lets any of some tokens stop what it decodes."""

    def __init__(self, decoder: Decoder, cancels: Sequence[CancelToken]) -> None:
        super().__init__(decoder)
        self._cancels, self._interrupting = cancels, Interrupting(cancels, decoder._interrupt)

    def __enter__(self) -> None:
        decoder = self._decoder
        super().__enter__()
        try:
            self._interrupting.__enter__()
            decoder._streams.resume()
            for beside in decoder._beside():
                beside.resume()
            decoder._check_not_closed()  # close() may have asked for a stop just before
            if any(cancel.is_set for cancel in self._cancels):
                raise DecodeAborted
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *ended: object) -> None:
        self._leave()
        if isinstance(ended[1], DecodeAborted):
            self._decoder._check_not_closed()

    def _leave(self) -> None:
        try:
            self._interrupting.__exit__()
        finally:
            super().__exit__()


class PromptMeter:
    """Counts the rows of one prompt while they are decoded, and tells whoever wants to know how far it is.

    Args:
        streams: what holds it in the end, and its tokens.
        on_progress: told how many rows are there and how many there will be, before every batch.

    Attributes:
        decoded: rows of the batches that were finished.
    """

    def __init__(
        self,
        streams: Sequence[tuple[Cache, Sequence[int]]],
        on_progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self._streams = streams
        self._total = sum(len(tokens) for _, tokens in streams)
        self._on_progress = on_progress
        self._settled = self._before = 0
        self.decoded = 0

    def __call__(self, rows: int) -> None:
        """Count rows that were decoded; see `streams.extend`."""
        self.decoded = self._before + rows
        if self._on_progress is not None:
            done = sum(common_prefix(cache.tokens, tokens) for cache, tokens in self._streams)
            self._on_progress(done, self._total)

    def settle(self, rows: DecodeBatch) -> None:
        """Count all of these as decoded."""
        self._settled += sum(len(request.tokens) for request in rows)
        self.decoded = self._before = self._settled

    def pause(self, decoded: int = 0) -> None:
        """Expect what is left of the rows by itself, after so many of them that were decoded to the end."""
        self._before = self.decoded = self.decoded + decoded


def _kept(held: Sequence[int], tokens: Sequence[int], prefix: Sequence[int]) -> int:
    """Tokens behind the system prompt, which is cheap to restore, that a slot spares a prompt of its conversation.

    0 where it holds another conversation, with which it has less than half of the shorter one in common: those of
    two requests that begin with the same words are not to be forgotten for the few tokens of these words.
    """
    common = common_prefix(held, tokens) - len(prefix)
    return common if common > 0 and 2 * common >= min(len(held), len(tokens)) - len(prefix) else 0
