"""Hands what happens to an answer over from the thread that decodes to the task that writes it to a client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from acd_local.answers import AnswerEvent
from acd_local.dispatch import Told
from acd_local.runtime.cancel import CancelToken

AHEAD = 64  # things that an answer may be ahead of its reader

News: TypeAlias = Told | AnswerEvent


class Feed:
    """One answer's news, in their order. Made in the event loop, where `take` is awaited; told from any thread."""

    def __init__(self) -> None:
        self.cancel = CancelToken()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[News] = asyncio.Queue()
        self._told = self._taken = 0  # each is counted by one side

    def tell(self, news: News) -> None:
        """Returns at once; the reader is told later."""
        self._told += 1
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel.set()

    def lags(self) -> bool:
        """Whether the reader is so far behind that the answer should rest."""
        return self._told - self._taken >= AHEAD

    async def take(self, patience: float | None) -> Sequence[News]:
        """What there is; waits for the first, but so many seconds at most: then nothing comes."""
        try:
            async with asyncio.timeout(patience):
                found = [await self._queue.get()]
        except TimeoutError:
            return ()
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        self._taken += len(found)
        return found
