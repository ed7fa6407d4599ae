"""Gives answers under asyncio: threads load and decode, the event loop never waits for them.

    from acd_local import aio

    async with await aio.load("demo", conversations=4) as engine:
        chat = engine.chat(system="You write for children.")
        async for text in chat.stream("Why is the sky blue?"):
            print(text, end="")
        answer = await chat.ask("And at night?", max_tokens=60)

One thread decodes whatever an engine has been asked for: up to `conversations` answers together, a token of each per
step, the others in their turn. Errors, options and records are those of `acd_local`; callbacks run in the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from acd_local.answers import Answer, AnswerEvent, OnEvent
from acd_local.batch import BatchRunner
from acd_local.chat import Chat, ChatStream
from acd_local.engine import Engine
from acd_local.errors import InternalError, UsageError
from acd_local.generation import AnswerStream
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import Message

AHEAD = 64  # pieces of text that an answer may be ahead of its reader


class _LoadStopped(Exception):
    """Whoever awaited the model was cancelled."""


async def load(
    model: str | Path,
    *,
    on_progress: Callable[[float], object] | None = None,
    on_check: Callable[[float], object] | None = None,
    **settings: Any,
) -> AsyncEngine:
    """Load a model in a thread, as `acd_local.load` does. Cancelled while it checks or reads, it stops soon."""
    loop, stopped = asyncio.get_running_loop(), threading.Event()

    def report(fraction: float, *, to: Callable[[float], object] | None) -> None:
        if stopped.is_set():
            raise _LoadStopped
        if to is not None:
            loop.call_soon_threadsafe(to, fraction)

    def build() -> Engine:
        loading, checking = (partial(report, to=to) for to in (on_progress, on_check))
        engine = Engine(model, on_progress=loading, on_check=checking, **settings)
        if stopped.is_set():
            engine.close()
            raise _LoadStopped
        return engine

    try:
        return AsyncEngine(await asyncio.to_thread(build))
    except asyncio.CancelledError:
        stopped.set()
        raise


class AsyncEngine:
    """An `Engine` whose answers are awaited. Make it with `load`, or around an engine of yours.

    Attributes:
        engine: the engine itself, with its model, pair and warning.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._decoder = _DecodingThread(engine)

    def generate(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        options: Options | None = None,
        *,
        on_event: OnEvent | None = None,
        **how: Any,
    ) -> AsyncStream:
        """See `Engine.generate`."""
        job = _Job(on_event)
        stream = self.engine.generate(messages, options, on_event=job.on_event, cancel=job.cancel, **how)
        job.begin = lambda: stream
        return AsyncStream(self._decoder, job)

    def chat(
        self, *, system: str | None = None, options: Options | None = None, pair: PromptPair | str | None = None
    ) -> AsyncChat:
        """See `Engine.chat`."""
        return AsyncChat(self.engine.chat(system=system, options=options, pair=pair), self._decoder)

    async def close(self) -> None:
        """Free model and caches. Answers that are still being made end with EngineClosedError."""
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncChat:
    """A `Chat` whose answers are awaited.

    Attributes:
        chat: the chat itself: its turns, options and pair, and undo, clear, save and load.
    """

    def __init__(self, chat: Chat, decoder: _DecodingThread) -> None:
        self.chat = chat
        self._decoder = decoder

    def stream(self, text: str, *, on_event: OnEvent | None = None, **options: Any) -> AsyncStream:
        """See `Chat.stream`."""
        return self._start(lambda forward: self.chat.stream(text, on_event=forward, **options), on_event)

    async def ask(self, text: str, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """See `Chat.ask`."""
        return await self.stream(text, **options).run(on_text)

    def regenerate(self, *, on_event: OnEvent | None = None, **options: Any) -> AsyncStream:
        """See `Chat.regenerate`."""
        return self._start(lambda forward: self.chat.regenerate(on_event=forward, **options), on_event)

    def _start(self, make: Callable[[OnEvent | None], ChatStream], on_event: OnEvent | None) -> AsyncStream:
        job = _Job(on_event)
        turn = make(job.on_event).turn
        job.begin, job.end, job.cancel = turn.begin, turn.end, turn.cancel
        return AsyncStream(self._decoder, job)


class AsyncStream:
    """One answer while it is made: `async for` gives pieces of its text (whole characters), then read `answer`.

    It begins with the first piece that is asked for. If the task that waits for a piece is cancelled, so is the answer,
    and its slot is free before the task goes on. Dropping the stream cancels it too.
    """

    def __init__(self, decoder: _DecodingThread, job: _Job) -> None:
        self._decoder = decoder
        self._job = job
        self._answer: Answer | None = None
        self._begun = self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._begun:
            self._decoder.submit(self._job)
            self._begun = True
        if self._ended:
            raise StopAsyncIteration
        try:
            what = await self._take()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(what, str):
            return what
        if isinstance(what, Exception):
            raise what
        self._answer = what
        raise StopAsyncIteration

    async def run(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Wait for the whole answer, handing text to `on_text` as it comes."""
        async with self:
            async for text in self:
                if on_text is not None:
                    on_text(text)
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

    def cancel(self) -> None:
        """End the answer within one decoding step, also during a long prompt; the iteration then ends."""
        self._decoder.cancel(self._job)

    async def aclose(self) -> None:
        """Stop here; the answer's slot is free afterwards."""
        if self._begun and not self._ended:
            self._decoder.cancel(self._job)
            while not self._ended:
                await self._take()

    async def _take(self) -> str | Answer | Exception:
        what = await self._job.queue.get()
        if isinstance(what, str):
            self._decoder.note_read(self._job)
        else:
            self._ended = True
            self._job.queue.put_nowait(what)  # another task may wait as well: the last item stays
        return what

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._job.cancel.set()


class _Job:
    """One answer on its way from the thread that decodes it to the task that reads it."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self.cancel = CancelToken()
        self.begin: Callable[[], AnswerStream]
        self.end: Callable[[Answer | Exception], None] = lambda _: None
        self.stream: AnswerStream
        self.queue: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
        self.unread = 0
        self.on_event = None if on_event is None else lambda event: self.post(on_event, event)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stream = self.begin()

    def put(self, what: str | Answer | Exception) -> None:
        """From the decoding thread."""
        if not isinstance(what, str):
            self.end(what)
        self.post(self.queue.put_nowait, what)

    def post(self, call: Callable[[Any], object], value: str | Answer | Exception | AnswerEvent) -> None:
        try:
            self.loop.call_soon_threadsafe(call, value)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel.set()


class _DecodingThread:
    """The thread that decodes an engine's answers; there is one only while there are answers to decode."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._thread: threading.Thread | None = None

    def submit(self, job: _Job) -> None:
        self._engine.decoder.check_open()  # in a forked child there is no thread, and its lock may be held for ever
        job.start()
        with self._changed:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="acd-decoder", daemon=True)
                self._thread.start()

    def cancel(self, job: _Job) -> None:
        job.cancel.set()
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.put(job.stream.skip())

    def note_read(self, job: _Job) -> None:
        with self._changed:
            job.unread -= 1
            self._changed.notify()

    def _run(self) -> None:
        try:
            with BatchRunner(self._engine) as batch:
                while self._admit(batch):
                    for event in batch.step(resting=self._resting()):
                        self._deliver(event.key, event.what)  # type: ignore[arg-type]
        except Exception as error:
            self._fail(InternalError(f"internal error: {type(error).__name__}: {error}"))

    def _admit(self, batch: BatchRunner) -> bool:
        """Fill free conversations; waits while all readers are behind. False: all is done, and the thread ends."""
        with self._changed:
            while True:
                while self._waiting and batch.room:
                    job = self._waiting.popleft()
                    self._running.add(job)
                    batch.add(job, job.stream)
                if not self._running:
                    self._thread = None
                    return False
                if len(self._resting()) < len(self._running):
                    return True
                self._changed.wait(0.1)  # a cancel or the engine's end comes without notice

    def _resting(self) -> set[_Job]:
        """Answers whose readers are too far behind."""
        if self._engine.closed:
            return set()
        behind = (job for job in self._running if job.unread >= AHEAD)
        return {job for job in behind if not (job.cancel.is_set or job.loop.is_closed())}

    def _deliver(self, job: _Job, what: str | Answer | Exception) -> None:
        with self._changed:
            if isinstance(what, str):
                job.unread += 1
            else:
                self._running.discard(job)
        job.put(what)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            jobs = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._thread = None
        for job in jobs:
            job.put(error)
