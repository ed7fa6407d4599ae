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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from acd_local.answers import Answer, AnswerEvent, OnEvent
from acd_local.chat import Chat, ChatStream
from acd_local.dispatch import Dispatcher, Job, Started, Told
from acd_local.engine import Engine
from acd_local.errors import UsageError
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
        self._dispatcher = Dispatcher(engine, threaded=True)

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
        return AsyncStream(self._dispatcher, job)

    def chat(
        self, *, system: str | None = None, options: Options | None = None, pair: PromptPair | str | None = None
    ) -> AsyncChat:
        """See `Engine.chat`."""
        return AsyncChat(self.engine.chat(system=system, options=options, pair=pair), self._dispatcher)

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

    def __init__(self, chat: Chat, dispatcher: Dispatcher) -> None:
        self.chat = chat
        self._dispatcher = dispatcher

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
        return AsyncStream(self._dispatcher, job)


class AsyncStream:
    """One answer while it is made: `async for` gives pieces of its text (whole characters), then read `answer`.

    It begins with the first piece that is asked for. If the task that waits for a piece is cancelled, so is the answer,
    and its slot is free before the task goes on. Dropping the stream cancels it too.
    """

    def __init__(self, dispatcher: Dispatcher, job: _Job) -> None:
        self._dispatcher = dispatcher
        self._job = job
        self._answer: Answer | None = None
        self._begun = self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._begun:
            self._job.submit(self._dispatcher)
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
        self._job.cancel.set()
        if self._begun:
            self._dispatcher.cancel(self._job.work)

    async def aclose(self) -> None:
        """Stop here; the answer's slot is free afterwards."""
        if self._begun and not self._ended:
            self._dispatcher.cancel(self._job.work)
            while not self._ended:
                await self._take()

    async def _take(self) -> str | Answer | Exception:
        what = await self._job.queue.get()
        if isinstance(what, str):
            if self._job.take():
                self._dispatcher.wake()
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
        self.work: Job
        self.queue: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
        self._told = self._taken = 0  # pieces of text; each is counted by one thread
        self.on_event = None if on_event is None else lambda event: self.post(on_event, event)

    @property
    def unread(self) -> int:
        return self._told - self._taken

    def submit(self, dispatcher: Dispatcher) -> None:
        dispatcher.check_open()  # else a chat would go on waiting for its answer
        self.loop = asyncio.get_running_loop()
        stream = self.begin()
        self.work = Job(lambda: stream, self._tell, self.cancel, self._lags)
        dispatcher.submit(self.work)

    def take(self) -> bool:
        """Count a piece as read; whether that is news for whoever waits for this reader."""
        lagged = self._lags()
        self._taken += 1
        return lagged

    def post(self, call: Callable[[Any], object], value: str | Answer | Exception | AnswerEvent) -> None:
        try:
            self.loop.call_soon_threadsafe(call, value)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel.set()

    def _tell(self, what: Told) -> None:
        if isinstance(what, Started):
            return
        if isinstance(what, str):
            self._told += 1
        else:
            self.end(what)
        self.post(self.queue.put_nowait, what)

    def _lags(self) -> bool:
        return self.unread >= AHEAD and not self.loop.is_closed()
